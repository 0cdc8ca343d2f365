"""ReLU and LeakyReLU."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verifier.core import sums
from verifier.core.interval import Interval
from verifier.core.numerics import tiny
from verifier.core.runtime import TINY, UNIT, RunModel
from verifier.graph.op import (
    NonlinearOp,
    Params,
    ParamSpec,
    Pieces,
    UnaryPlanes,
    times_intercept,
)
from verifier.ops.layout import sane


@dataclass(frozen=True)
class Relu(NonlinearOp):
    """f(z) = z for z >= 0, k z for z < 0, with k = ``negative_slope``; any finite k.

    k is rounded to float32, which is what a float32 network computes with.
    """

    negative_slope: float = 0.0

    elementwise = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.negative_slope) or abs(self.negative_slope) > 1e30:
            raise ValueError(f"the negative slope of a leaky ReLU must be finite, not {self.negative_slope}")
        rounded = struct.unpack("f", struct.pack("f", self.negative_slope))[0]
        object.__setattr__(self, "negative_slope", rounded)

    @property
    def kind(self) -> str:
        return "LeakyRelu" if self.negative_slope else "Relu"

    @property
    def pieces(self) -> Pieces:
        return Pieces((0.0,), (self.negative_slope, 1.0))

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        x, k = xs[0], self.negative_slope
        return x.clamp(min=0) if k == 0 else torch.where(x > 0, x, x * k)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """Exact for k = 0; otherwise the product k z is rounded outward."""
        low, up = sane(xs[0])
        k = self.negative_slope
        if k == 0:
            return Interval(low.clamp(min=0), up.clamp(min=0))
        if k > 0:
            return Interval(_leaky(low, k, -1), _leaky(up, k, 1))
        least = torch.minimum(_leaky(low, k, -1), _leaky(up, k, -1)).clamp(min=0)
        return Interval(
            torch.where((low <= 0) & (up >= 0), 0.0, least), torch.maximum(_leaky(low, k, 1), _leaky(up, k, 1))
        )

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | float:
        """A choice is exact, the product k z is rounded."""
        if self.negative_slope in (-1.0, 0.0, 1.0):
            return 0.0
        return found.magnitude() * (2 * UNIT) + TINY

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        """``alpha``: slope through the origin of unstable neurons (lower plane; upper plane when k > 1)."""
        low, up = xs[0]
        k = self.negative_slope
        one_side = torch.where(up > -low, 1.0, k).to(low.dtype)
        return {"alpha": ParamSpec(one_side[:, None], min(k, 1.0), max(k, 1.0))}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        return self._prepared(xs, once=True)(params)

    def parallel(self, xs: Sequence[Interval]) -> UnaryPlanes:
        """With k in [0, 1] the lower line through the origin may have the slope of the chord."""
        planes = self.relax(xs)
        return self.relax(xs, {"alpha": planes.upper_slope}) if 0 <= self.negative_slope <= 1 else planes

    def prepared(self, xs: Sequence[Interval]) -> Callable[[Mapping[str, Tensor] | None], UnaryPlanes]:
        return self._prepared(xs, once=False)

    def _prepared(self, xs: Sequence[Interval], once: bool) -> Callable[[Mapping[str, Tensor] | None], UnaryPlanes]:
        """Chord on one side, any line through the origin with a slope between k and 1 on the other.

        Sound: f is convex (k <= 1) or concave (k > 1), so the chord needs checking at the two end points only, and its
        intercept is the larger requirement of the two, enlarged by more than its three roundings and what underflow
        costs; a z with a between
        k and 1 lies on the other side of f everywhere. Stable neurons are exact: the limits of the slope coincide.
        Infinite bounds: slope 1 for u = inf, k for l = -inf, an infinite intercept for both.

        Args:
            once: not worth working anything out for later planes.
        """
        low, up = sane(xs[0])
        k, dtype = self.negative_slope, low.dtype
        unstable = (low < 0) & (up > 0)
        minus, plus = low.clamp(max=0), up.clamp(min=0)
        share = (plus / (plus - minus)).nan_to_num(nan=1.0)  # 0/0: both zero; inf/inf: u = inf
        slope = share if k == 0 else torch.lerp(torch.full_like(share, k), torch.ones_like(share), share)
        # Stable neurons with one-sided infinite bounds: share is 0 or 1 and the slope exact.
        side = 1.0 if k <= 1 else -1.0
        gap = torch.fmax((k - slope) * (side * minus), (1 - slope) * (side * plus))  # 0 * inf never wins
        gap = gap * (1 + 4 * torch.finfo(dtype).eps) + 4 * max(1.0, abs(k)) * tiny(dtype)
        chord = torch.where(unstable, side * gap, 0.0)[:, None]
        slope = slope[:, None]

        at_least = torch.where(low >= 0, 1.0, k).to(dtype)[:, None]
        at_most = torch.where((low < 0) & (up <= 0), k, 1.0).to(dtype)[:, None]
        if k > 1:
            at_least, at_most = at_most, at_least
        zero = torch.zeros_like(chord)
        delta = {"alpha": (unstable.to(dtype)[:, None], zero)}
        columns = _chords(chord, look=True) if not once and k <= 1 else None

        def planes(params: Mapping[str, Tensor] | None) -> UnaryPlanes:
            alpha = self.parameters(xs)["alpha"].initial if params is None else params["alpha"]
            free = torch.clamp(alpha, at_least, at_most)
            if k <= 1:
                return OriginPlanes(free, zero, slope, chord, d_lower=delta, columns=columns)
            return UnaryPlanes(slope, chord, free, zero, d_upper=delta)

        return planes


@dataclass(frozen=True)
class OriginPlanes(UnaryPlanes):
    """Planes whose lower ones pass through the origin: only negative coefficients meet an intercept.

    Where all rows share them, the sum is one matrix product, (B, S, n) with (B, n, 2): the finite intercepts, and a
    second column that tells rows that need an infinite one.

    Both parts of a coefficient are multiplied with their slopes and added, one of them being zero: the same numbers as
    from choosing the slope, which takes several times as long on a CPU.

    Attributes:
        columns: (B, n, 2), or (B, n, 1) where no intercept is infinite; None: worked out when it is needed.
    """

    columns: Tensor | None = None
    one_sign: ClassVar[bool] = True  # no upper intercept is negative; one that is no number loses its rows

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        negative = a.clamp(max=0)
        if self.upper_intercept.shape[1] > 1:
            const = sums.last_dim(times_intercept(negative, self.upper_intercept).flatten(2), a.dtype)
        else:
            columns = _chords(self.upper_intercept) if self.columns is None else self.columns
            totals = sums.wide_product(negative.flatten(2), columns)
            const = totals[..., 0]
            if columns.shape[-1] > 1:
                const = const.masked_fill(totals[..., 1] < 0, -float("inf"))
        positive, slopes = a.clamp(min=0), (self.lower_slope, self.upper_slope)
        if all(s.shape[i] in (1, a.shape[i]) for s in slopes for i in (0, 1)):
            return (positive.mul_(slopes[0]).addcmul_(negative, slopes[1]),), const
        return (torch.addcmul(positive * slopes[0], negative, slopes[1]),), const

    def terms(self, a: Tensor) -> Tensor:
        return times_intercept(a.clamp(max=0), self.upper_intercept)

    def mapped(self, view: Callable[[Tensor], Tensor]) -> OriginPlanes:
        chord = view(self.upper_intercept)
        return OriginPlanes(view(self.lower_slope), chord.new_zeros(()), view(self.upper_slope), chord)

    def gradients(self, a: Tensor, zs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        given = self.d_lower or {}
        return {name: torch.mul(a.clamp(min=0), zs[0]).mul_(slope) for name, (slope, _) in given.items()}


def _chords(chord: Tensor, look: bool = False) -> Tensor:
    """The columns of :class:`OriginPlanes`.

    Args:
        chord: (B, 1, *shape).
        look: whether the host looks for infinite intercepts, to leave the second column out.
    """
    chord = chord.flatten(2)
    lost = torch.isinf(chord)
    if look and not bool(lost.any()):
        return chord.transpose(1, 2).contiguous()
    return torch.stack((chord.masked_fill(lost, 0.0), lost.to(chord.dtype)), -1).squeeze(1)


def _leaky(x: Tensor, k: float, side: int) -> Tensor:
    """f(x) rounded up (side 1) or down (side -1); k is not zero."""
    most = torch.finfo(x.dtype).max
    product = (x * k).clamp(min=-most) if side > 0 else (x * k).clamp(max=most)
    product = product + side * (product.abs() * torch.finfo(x.dtype).eps + tiny(x.dtype))
    return torch.where(x >= 0, x, product)
