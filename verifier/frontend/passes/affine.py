"""Constant factors and offsets go into the affine op before them.

Only steps with a few roundings per parameter are taken: scaling the rows of a weight and adding to a bias. Offsets
*before* an affine op stay (W t would be a sum over the whole fan-in). Nothing is folded where a product leaves the
range of normal float64 numbers: it would be off by more than its roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.core.numerics import tiny
from verifier.frontend.passes.rewriter import Rewriter, rewrite
from verifier.graph.graph import Graph, Node
from verifier.graph.op import folded_terms
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear
from verifier.ops.scale import ScaleShift


def fold_affine(graph: Graph) -> Graph:
    """ScaleShift after Linear, Conv or ScaleShift merges into it, where nobody else reads the value between."""

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        if not isinstance(node.op, ScaleShift) or not r.only_reader(node):
            return None
        below = r.nodes[inputs[0]]
        if isinstance(below.op, ScaleShift):
            return _merge(r, node, node.op, below, below.op)
        if below.shape != node.shape:
            return None
        if isinstance(below.op, Linear):
            return _into_linear(r, node, node.op, below, below.op)
        if isinstance(below.op, Conv):
            return _into_conv(r, node, node.op, below, below.op)
        return None

    return rewrite(graph, visit)


def _leaves_range(r: Rewriter, scale: Tensor | None, inner: Linear | Conv | ScaleShift) -> bool:
    """Whether a factor times some parameter of an op may underflow or overflow in float64."""
    if scale is None:
        return False
    least, most = _range(scale)
    for handle in inner.handles:
        low, high = _range(r.value(handle))
        if least * low < tiny(torch.float64) or most * high == float("inf"):
            return True
    return False


def _range(values: Tensor) -> tuple[float, float]:
    """The smallest absolute value that is not zero, and the largest."""
    size = values.abs()
    size = size[size > 0]
    return (float(size.min()), float(size.max())) if size.numel() else (1.0, 0.0)


def _roundings(scale: Tensor | None, had_shift: bool, has_shift: bool) -> int:
    """Roundings of one more step: a product unless the factor is a sign, a sum when two offsets meet."""
    product = scale is not None and not bool(torch.all(scale.abs() == 1))
    return product + (had_shift and has_shift)


def _offset(
    r: Rewriter, op: ScaleShift, scale: Tensor | None, bias: Tensor | None, magnitude: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """New offset s b + t and the magnitudes behind it."""
    if bias is None and op.shift is None:
        return None, None
    shift = None if op.shift is None else r.value(op.shift)
    behind = shift if op.shift_magnitude is None else r.value(op.shift_magnitude)
    behind = None if behind is None else behind.abs()
    if bias is None:
        return shift, behind
    grown = bias.abs() if magnitude is None else magnitude.abs()
    if scale is not None:
        bias, grown = bias * scale, grown * scale.abs()
    if shift is None or behind is None:
        return bias, grown
    return bias + shift, grown + behind


def _merge(r: Rewriter, node: Node, op: ScaleShift, below: Node, inner: ScaleShift) -> int | None:
    scale = None if op.scale is None else r.value(op.scale)
    if _leaves_range(r, scale, inner):
        return None
    old = None if inner.shift is None else r.value(inner.shift)
    magnitude = None if inner.shift_magnitude is None else r.value(inner.shift_magnitude)
    shift, behind = _offset(r, op, scale, old, magnitude)
    both = r.value(inner.scale, 1.0) * r.value(op.scale, 1.0)
    folded = (
        folded_terms(inner.folded, inner.shift_magnitude)
        + folded_terms(op.folded, op.shift_magnitude)
        + _roundings(scale, inner.shift is not None, op.shift is not None)
    )
    merged = ScaleShift(
        None if inner.scale is None and op.scale is None else r.param(both, f"{node.name}.scale"),
        None if shift is None else r.param(shift, f"{node.name}.shift"),
        None if behind is None or not folded else r.param(behind, f"{node.name}.shift_magnitude"),
        folded=folded,
    )
    return r.emit(merged, below.inputs, node.shape, node.name)


def _per_channel(t: Tensor, shape: tuple[int, ...], axis: int) -> Tensor | None:
    """A constant as a vector over one dim of a value, when it varies along no other dim; expects it not to widen."""
    full = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
    if len(full) != len(shape) or any(d != 1 for i, d in enumerate(full) if i != axis):
        return None
    return t.reshape(-1).expand(shape[axis])


def _folded_constants(
    r: Rewriter, op: ScaleShift, shape: tuple[int, ...], axis: int
) -> tuple[Tensor | None, ScaleShift] | None:
    """Scale as a vector and the op with all its parameters as vectors; None when it varies along other dims."""
    out: dict[str, Tensor | None] = {}
    for name in ("scale", "shift", "shift_magnitude"):
        handle = getattr(op, name)
        vector = None if handle is None else _per_channel(r.value(handle), shape, axis)
        if handle is not None and vector is None:
            return None
        out[name] = vector
    store = {k: None if v is None else r.param(v, f"folded.{k}") for k, v in out.items()}
    return out["scale"], ScaleShift(store["scale"], store["shift"], store["shift_magnitude"], folded=op.folded)


def _into_linear(r: Rewriter, node: Node, op: ScaleShift, below: Node, inner: Linear) -> int | None:
    found = _folded_constants(r, op, node.shape, len(node.shape) - 1)
    if found is None or _leaves_range(r, found[0], inner):
        return None
    scale, vectors = found
    weight, bias, magnitude, folded = _fold(r, vectors, scale, inner)
    if scale is not None:
        weight = weight * scale[:, None]
    merged = Linear(
        inner.weight if scale is None else r.param(weight, f"{node.name}.weight"),
        None if bias is None else r.param(bias, f"{node.name}.bias"),
        None if magnitude is None or not folded else r.param(magnitude, f"{node.name}.bias_magnitude"),
        folded=folded,
    )
    return r.emit(merged, below.inputs, node.shape, node.name)


def _into_conv(r: Rewriter, node: Node, op: ScaleShift, below: Node, inner: Conv) -> int | None:
    axis = len(node.shape) - inner.dims - 1
    found = _folded_constants(r, op, node.shape, axis)
    if found is None or _leaves_range(r, found[0], inner):
        return None
    scale, vectors = found
    weight, bias, magnitude, folded = _fold(r, vectors, scale, inner)
    if scale is not None:
        taps = [1] * inner.dims
        if inner.transposed:
            rows = scale.reshape(inner.groups, 1, -1, *taps)
            grouped = weight.reshape(inner.groups, -1, *weight.shape[1:])
            weight = (grouped * rows).reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, 1, *taps)
    merged = Conv(
        inner.weight if scale is None else r.param(weight, f"{node.name}.weight"),
        None if bias is None else r.param(bias, f"{node.name}.bias"),
        None if magnitude is None or not folded else r.param(magnitude, f"{node.name}.bias_magnitude"),
        inner.stride,
        inner.padding,
        inner.dilation,
        inner.groups,
        inner.output_padding,
        inner.transposed,
        inner.dims,
        folded=folded,
    )
    return r.emit(merged, below.inputs, node.shape, node.name)


def _fold(
    r: Rewriter, op: ScaleShift, scale: Tensor | None, inner: Linear | Conv
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Weight as stored, new bias, magnitudes behind it, roundings."""
    old = None if inner.bias is None else r.value(inner.bias)
    magnitude = None if inner.bias_magnitude is None else r.value(inner.bias_magnitude)
    bias, behind = _offset(r, op, scale, old, magnitude)
    folded = (
        folded_terms(inner.folded, inner.bias_magnitude)
        + folded_terms(op.folded, op.shift_magnitude)
        + _roundings(scale, inner.bias is not None, op.shift is not None)
    )
    return r.value(inner.weight), bias, behind, folded
