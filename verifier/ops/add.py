"""Signed sums of several values."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.linear_forms import Dense, Form, OneHot
from verifier.graph.op import AffineOp, Crossing, Params, Shape
from verifier.ops.layout import align, reduce_count, unbroadcast


@dataclass(frozen=True)
class Add(AffineOp):
    """y = sum_i signs[i] x_i with broadcasting; subtraction is signs (1, -1)."""

    signs: tuple[float, ...] = (1.0, 1.0)

    elementwise = True
    plain_sums = True

    @property
    def exact_weights(self) -> bool:
        return all(math.frexp(abs(s))[0] == 0.5 and abs(s) >= 1 for s in self.signs)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return _total(self.signs, xs)

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return _total(self.signs, xs)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return tuple(unbroadcast(_times(s, a), shape) for s, shape in zip(self.signs, in_shapes, strict=True))

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """The same elements or windows of every input that is not broadcast, times its sign."""
        if isinstance(form, Dense) or any(shape != form.shape for shape in in_shapes):
            return None
        if isinstance(form, OneHot):
            parts = [OneHot(form.index, form.values * sign, form.shape) for sign in self.signs]
        else:
            parts = [replace(form, a=form.a * sign) for sign in self.signs]
        return Crossing(form, parts, None, self.backward_terms(in_shapes, form.shape))

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return _total([abs(s) for s in self.signs], rs)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self.spread(ms, p)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        pairs = [(x.lower, x.upper) if s > 0 else (x.upper, x.lower) for s, x in zip(self.signs, xs, strict=True)]
        return Interval(_total(self.signs, [q[0] for q in pairs]), _total(self.signs, [q[1] for q in pairs]))

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return len(self.signs) - 1 + self._products

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return max(reduce_count(s, out_shape) for s in in_shapes) - 1 + self._products

    @property
    def _products(self) -> int:
        """Roundings of a sign's product, and of the sign where it is no float32 number."""
        if all(abs(s) == 1 for s in self.signs):
            return 0
        return 1 if all(_is_float32(s) for s in self.signs) else 2


def _is_float32(a: float) -> bool:
    return abs(a) < 2.0**127 and struct.unpack("f", struct.pack("f", a))[0] == a


def _times(sign: float, x: Tensor) -> Tensor:
    if sign == 1:
        return x
    return -x if sign == -1 else x * sign


def _total(signs: Sequence[float], xs: Sequence[Tensor]) -> Tensor:
    rank = max(x.ndim for x in xs) - 1
    terms = [align(x, rank) for x in xs]
    total = _times(signs[0], terms[0])
    for sign, x in zip(signs[1:], terms[1:], strict=True):
        total = total - x if sign == -1 else total + _times(sign, x)
    return total
