"""Elementwise affine maps with constant factors and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.core.numerics import underflow
from verifier.graph.linear_forms import Form, OneHot, Patches, one_window, scaled, windows
from verifier.graph.op import AffineOp, Crossing, Params, Shape, Split, folded_terms
from verifier.ops.layout import align, broadcast_shape, reduce_count, unbroadcast


@dataclass(frozen=True)
class ScaleShift(AffineOp):
    """y = scale x + shift; the constants broadcast against the value's own shape (without N) and may widen it.

    Attributes:
        scale: factor; None for one.
        shift: offset; None for zero.
        shift_magnitude: like shift, sum of the magnitudes folded into it; given when parameters were folded.
        folded: roundings behind one stored parameter; FOLDED_TERMS when left out with a ``shift_magnitude``.
        reach: by which factor numbers between the steps that were folded can differ from those of the op itself.
    """

    scale: Handle | None = None
    shift: Handle | None = None
    shift_magnitude: Handle | None = None
    folded: int = 0
    reach: float = 1.0

    elementwise = True
    plain_sums = True

    @property
    def exact_weights(self) -> bool:
        return self.folded == 0 and self.shift_magnitude is None

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        """Constants that vary along the dim are cut with it."""
        if in_shapes[0] != out_shape or not out_shape:
            return None
        at = [dims[0] - len(out_shape) + len(h.shape) for h in self.handles]
        cut = tuple(d if d >= 0 and h.shape[d] > 1 else None for d, h in zip(at, self.handles, strict=True))
        return Split(dims[0], self, cut, whole=False)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        y = self.linear(xs, p)
        return y + p[self._shift_at] if self.shift is not None else y

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        x = align(xs[0], self._rank)
        if self.scale is not None:
            x = x * p[0]
        return x.expand(x.shape[0], *broadcast_shape(tuple(x.shape[1:]), *(h.shape for h in self.handles)))

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (unbroadcast(a if self.scale is None else a * p[0], in_shapes[0]),)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        if self.shift is None:
            return None
        return a.flatten(1) @ p[self._shift_at].expand(a.shape[1:]).flatten()

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Windows see the factors and offsets at their places."""
        if isinstance(form, OneHot):
            form = one_window(form)
        if not isinstance(form, Patches) or in_shapes[0] != form.shape:
            return None
        constant = None
        if self.shift is not None:
            shift = windows(p[self._shift_at].expand(form.shape)[None, None], form)
            constant = (form.a * shift).flatten(2).sum(-1, dtype=total)
        part = form if self.scale is None else scaled(form, p[0])
        return Crossing(form, [part], constant, self.backward_terms(in_shapes, form.shape))

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self.linear(rs, tuple(q.abs() for q in p))

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        y = self.linear(ms, tuple(q.abs() + underflow(q.dtype) for q in p))
        return y + p[-1].abs() if self.shift is not None else y

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = self.forward([xs[0].lower], p), self.forward([xs[0].upper], p)
        if self.scale is None:
            return Interval(low, up)
        inf = float("inf")
        low, up = torch.minimum(low, up), torch.maximum(low, up)
        return Interval(low.nan_to_num(nan=-inf, posinf=inf, neginf=-inf), up.nan_to_num(inf, inf, -inf))

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return (self.scale is not None) + (self.shift is not None) + self._folded

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return (self.scale is not None) + reduce_count(in_shapes[0], out_shape) - 1 + self._folded

    @property
    def _shift_at(self) -> int:
        return 1 if self.scale is not None else 0

    @property
    def _rank(self) -> int:
        return max((len(h.shape) for h in self.handles), default=0)

    @property
    def _folded(self) -> int:
        return folded_terms(self.folded, self.shift_magnitude)
