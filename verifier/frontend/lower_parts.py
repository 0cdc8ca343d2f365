"""Nodes that several translators of nonlinear functions make."""

from __future__ import annotations

import math

from torch import Tensor

from verifier.frontend.builder import broadcast
from verifier.frontend.lowering import Lowering
from verifier.ops.exponential import Exp
from verifier.ops.power import Sqrt, Square
from verifier.ops.product import Mul
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.reduce import Mean, Sum
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Permute, Reshape
from verifier.ops.within import Within

# More than what a few float64 operations lose.
ROUNDED = 2.0**-40


def relu_of(s: Lowering, x: int, name: str, slope: float = 0.0) -> int:
    return s.emit(Relu(slope), [x], s.shape(x), name)


def masked(s: Lowering, x: int, keep: Tensor, name: str) -> int:
    """Zero where ``keep`` is 0, else x. No claim about runs covers factors of zero."""
    shape = broadcast(s.shape(x), keep.shape)
    return s.emit(ScaleShift(s.param(keep, f"{name}.keep"), reach=math.inf), [x], shape, name)


def multiplied(s: Lowering, a: int, b: int, name: str) -> int:
    """Product of two values; a value with itself is a square."""
    if a == b:
        return s.emit(Square(), [a], s.shape(a), name)
    return s.emit(Mul(), [a, b], broadcast(s.shape(a), s.shape(b)), name)


def reciprocal_of(s: Lowering, x: int, name: str, row: int = 0) -> int:
    return s.emit(Reciprocal(row), [x], s.shape(x), name)


def root_of(s: Lowering, x: int, name: str) -> int:
    return s.emit(Sqrt(), [bounded(s, x, name)], s.shape(x), name)


def within(s: Lowering, x: int, low: float, high: float, name: str) -> int:
    """The same value, known to lie in a range."""
    return s.emit(Within(low, high), [x], s.shape(x), name)


def bounded(s: Lowering, x: int, name: str) -> int:
    """The same value, with the lower bound that its making gives it when that is not negative."""
    low = _least(s, x)
    if low is None or isinstance(s.builder.nodes[x].op, Square | Exp | Relu):
        return x
    return within(s, x, low, math.inf, f"{name}/bounded")


def _least(s: Lowering, x: int) -> float | None:
    """A number that is not negative and not above any element, by the ops that made them; None where there is none."""
    node = s.builder.nodes[x]
    op = node.op
    if isinstance(op, Square | Exp) or (isinstance(op, Relu) and op.negative_slope <= 0):
        return 0.0
    if isinstance(op, Within):
        return op.low if op.low >= 0 else None
    if not isinstance(op, Mean | Sum | Reshape | Permute | ScaleShift):
        return None
    inner = _least(s, node.inputs[0])
    if inner is None or not isinstance(op, ScaleShift):
        return 0.0 if isinstance(op, Sum) and inner is not None else inner
    scale, shift = (None if h is None else s.builder.parameters[h].double() for h in (op.scale, op.shift))
    if scale is not None and bool((scale < 0).any()):
        return None
    low = inner * (1.0 if scale is None else float(scale.min())) + (0.0 if shift is None else float(shift.min()))
    low *= 1 - ROUNDED
    return low if low >= 0 else None
