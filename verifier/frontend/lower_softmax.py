"""Translators of softmax and its logarithm, with elements that take no part in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verifier.frontend.builder import broadcast
from verifier.frontend.capture import Call
from verifier.frontend.lower_parts import masked, multiplied, reciprocal_of, within
from verifier.frontend.lower_shape import reshaped
from verifier.frontend.lowering import CannotLower, Lowering
from verifier.ops.add import Add
from verifier.ops.exp_sum import ExpSum
from verifier.ops.exponential import Exp, Log
from verifier.ops.reduce import Sum
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Permute, Reshape

MAX_SOFTMAX_TERMS = 1 << 20
FAR_BELOW = 256.0


def softmax(s: Lowering, call: Call) -> int:
    """1 / sum_j exp(x_j - x_i): the differences see what the elements have in common; long rows use exp and a sum.

    Elements that are minus infinity have no part in a sum, and are zero.
    """
    x, name, keep = s.the_node(call.args["self"]), call.names[0], _kept(s, call)
    inner = name if keep is None else f"{name}/kept"
    total, row = _sum_of_exp(s, x, call.args["dim"], name, keep)
    if row is None:
        total = within(s, total, 1.0, math.inf, f"{name}/denominator")
        out = reciprocal_of(s, total, inner, s.shape(x)[call.args["dim"]])
    else:
        out = multiplied(s, row, reciprocal_of(s, total, f"{name}/reciprocal", -1), inner)
    return out if keep is None else masked(s, out, keep, name)


def log_softmax(s: Lowering, call: Call) -> int:
    """-log sum_j exp(x_j - x_i)."""
    x, name, keep = s.the_node(call.args["self"]), call.names[0], _kept(s, call)
    total, row = _sum_of_exp(s, x, call.args["dim"], name, keep)
    total = total if row is not None else within(s, total, 1.0, math.inf, f"{name}/denominator")
    log = s.emit(Log(), [total], s.shape(total), f"{name}/log")
    if keep is not None:
        s.made[0] = keep == 0
    if row is None:
        return s.emit(Add((-1.0,)), [log], s.shape(x), name)
    return s.emit(Add((1.0, -1.0)), [x, log], s.shape(x), name)


def _kept(s: Lowering, call: Call) -> Tensor | None:
    """1 for elements that are finite and 0 for those that are minus infinity; None where all are finite."""
    gone = s.infinite(call.args["self"])
    if gone is None or not bool(gone.any()):
        return None
    if call.func != "_safe_softmax" and bool(gone.all(call.args["dim"]).any()):
        raise CannotLower("of a row that is minus infinity altogether")
    return (~gone).to(torch.float64)


def _sum_of_exp(s: Lowering, x: int, dim: int, name: str, keep: Tensor | None = None) -> tuple[int, int | None]:
    """(sum_j exp(x_j - x_i), None), or for long rows (sum_j exp(x_j), exp(x)).

    Args:
        keep: 1 for elements that take part, 0 for others; for those that do not the first sum is 1.
    """
    shape = s.shape(x)
    if not shape:
        raise CannotLower("softmax of a single number")
    axis = dim % len(shape)
    if math.prod(shape) * shape[axis] > MAX_SOFTMAX_TERMS:
        row = s.emit(Exp(), [x], shape, f"{name}/exp")
        row = row if keep is None else masked(s, row, keep, f"{name}/kept_exp")
        small = tuple(1 if i == axis else n for i, n in enumerate(shape))
        if keep is not None and bool((keep.sum(axis) == 0).any()):
            raise CannotLower("of a row that is minus infinity altogether")
        return s.emit(Sum((axis,), True), [row], small, f"{name}/sum"), row
    over_j = (*shape[:axis], 1, *shape[axis:])
    over_i = (*shape[: axis + 1], 1, *shape[axis + 1 :])
    pairs = broadcast(over_j, over_i)
    left, right = reshaped(s, x, over_j, f"{name}/j"), reshaped(s, x, over_i, f"{name}/i")
    gaps = s.emit(Add((1.0, -1.0)), [left, right], pairs, f"{name}/differences")
    both = None if keep is None else _pairs(keep.reshape(over_j), keep.reshape(over_i), axis)
    gaps = gaps if both is None else masked(s, gaps, both, f"{name}/kept_differences")
    if both is None and _far_below(s, x):
        return s.emit(ExpSum(axis + 1), [gaps], shape, f"{name}/sum"), None
    grown = s.emit(Exp(), [gaps], pairs, f"{name}/exp")
    grown = grown if both is None else masked(s, grown, both, f"{name}/kept_exp")
    return s.emit(Sum((axis + 1,)), [grown], shape, f"{name}/sum"), None


def _far_below(s: Lowering, x: int) -> bool:
    """Whether some elements have such large constants taken from them, as masks do, that exponentials of differences
    may leave floating point."""
    node = s.builder.nodes[x]
    while isinstance(node.op, Reshape | Permute):
        node = s.builder.nodes[node.inputs[0]]
    if not isinstance(node.op, ScaleShift) or node.op.shift is None:
        return False
    shift = s.builder.parameters[node.op.shift]
    return bool(shift.double().max() - shift.double().min() > FAR_BELOW)


def _pairs(over_j: Tensor, over_i: Tensor, axis: int) -> Tensor:
    """1 for pairs of elements that take part, and for what does not with itself."""
    n = over_i.shape[axis]
    same = torch.eye(n, dtype=torch.float64).reshape([n if d in (axis, axis + 1) else 1 for d in range(over_i.dim())])
    return over_j * over_i + (1 - over_i) * same
