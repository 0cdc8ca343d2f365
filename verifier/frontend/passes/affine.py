"""Constant factors and offsets are folded into the affine op before them.

Only steps with few roundings per weight are taken: scaling the rows of a weight matrix and adding to a bias. Offsets
*before* an affine op stay (W t would be a sum over the whole fan-in). Nothing is folded where a product leaves the
range of normal float64 numbers: its error would exceed that of its roundings.
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


def _roundings(scale: Tensor | None, weight: Tensor, bias: Tensor | None, shift: Tensor | None) -> int:
    """Roundings of one more step: a product and, when two offsets meet, a sum; none where float32 holds the result.

    Args:
        scale: factor of every row of the weight and of the bias, all float64; None for one.
    """
    product = scale is not None and not all(_moves_exponents(scale, p) for p in (weight, bias) if p is not None)
    if bias is None or shift is None:
        return int(product)
    old = bias if scale is None else bias * scale
    total = old + shift
    part = total - old
    lost = (old - (total - part)) + (shift - part)  # exactly what the sum lacks (Knuth)
    return product + (not _float32(total) or bool((lost != 0).any()))


def _float32(t: Tensor) -> bool:
    """Whether all numbers are float32 numbers."""
    return bool((t.float().double() == t).all())


def _moves_exponents(scale: Tensor, p: Tensor) -> bool:
    """Whether a parameter times any of the factors is a normal float32 number without rounding."""
    if bool((scale.abs() == 1).all()):
        return True
    factors, size = scale.abs(), p.abs()[p != 0]
    if not bool((torch.frexp(factors).mantissa == 0.5).all()) or not _float32(p):
        return False
    return size.numel() == 0 or bool(
        (size.min() * factors.min() >= 2.0**-126) and (size.max() * factors.max() < 2.0**128)
    )


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


def _reach(r: Rewriter, scale: Tensor | None, inner: Linear | Conv | ScaleShift, outer: ScaleShift) -> float:
    """How far numbers between the steps of a run can be from those of the folded op and of its inputs, as a factor.

    What a factor f follows is 1 / |f| times the result, and at most |W| |x| + |b| where x was read: the lesser counts,
    so that factors of zero matter only behind large weights.
    """
    own = 1.0
    if scale is not None and scale.numel():
        size = scale.abs()
        before = torch.minimum(1 / size, _norms(r, inner, scale))
        own = max(1.0, float(size.max()), float(before.max()))
    return own * inner.reach * outer.reach


def _norms(r: Rewriter, op: Linear | Conv | ScaleShift, like: Tensor) -> Tensor:
    """|W| 1 + |b| by output channel (by entry of a ScaleShift), or the largest of all; broadcasts with ``like``."""
    if isinstance(op, ScaleShift):
        weights = r.value(op.scale, 1.0).abs()
    else:
        weight = r.value(op.weight).abs()
        transposed = isinstance(op, Conv) and op.transposed
        weights = weight.flatten(1).sum(1).amax().mul(len(weight)) if transposed else weight.flatten(1).sum(1)
    offset = op.shift_magnitude or op.shift if isinstance(op, ScaleShift) else op.bias_magnitude or op.bias
    total = weights if offset is None else weights + r.value(offset).abs()
    try:
        torch.broadcast_shapes(total.shape, like.shape)
    except RuntimeError:
        return total.amax()
    return total


def _hides(bias: Tensor | None, behind: Tensor | None) -> bool:
    """Whether offsets cancel where they are folded: a run has their own magnitudes in its numbers."""
    return bias is not None and behind is not None and bool((behind > bias.abs()).any())


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
        + _roundings(scale, r.value(inner.scale, 1.0), old, None if op.shift is None else r.value(op.shift))
    )
    if not folded and _hides(shift, behind):
        return None
    merged = ScaleShift(
        None if inner.scale is None and op.scale is None else r.param(both, f"{node.name}.scale"),
        None if shift is None else r.param(shift, f"{node.name}.shift"),
        None if behind is None or not folded else r.param(behind, f"{node.name}.shift_magnitude"),
        folded=folded,
        reach=_reach(r, scale, inner, op),
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
    return out["scale"], ScaleShift(store["scale"], store["shift"], store["shift_magnitude"], op.folded, op.reach)


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
        reach=_reach(r, scale, inner, op),
        run=inner.run,
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
        reach=_reach(r, scale, inner, op),
    )
    return r.emit(merged, below.inputs, node.shape, node.name)


def _fold(
    r: Rewriter, op: ScaleShift, scale: Tensor | None, inner: Linear | Conv
) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Weight as stored, new bias, magnitudes behind it, roundings."""
    old = None if inner.bias is None else r.value(inner.bias)
    magnitude = None if inner.bias_magnitude is None else r.value(inner.bias_magnitude)
    weight, (bias, behind) = r.value(inner.weight), _offset(r, op, scale, old, magnitude)
    folded = (
        folded_terms(inner.folded, inner.bias_magnitude)
        + folded_terms(op.folded, op.shift_magnitude)
        + _roundings(scale, weight, old, None if op.shift is None else r.value(op.shift))
    )
    return weight, bias, behind, folded or int(_hides(bias, behind))
