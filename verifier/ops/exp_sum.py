"""Sums of exponentials, of which some may be too large for floating point: masked scores in a softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core import sums
from verifier.core.interval import Interval
from verifier.core.numerics import gamma, tiny
from verifier.graph.op import NonlinearOp, Params, Relaxation, UnaryPlanes, times_intercept
from verifier.ops.exponential import Exp
from verifier.ops.layout import sane

_INF = float("inf")
_EXP_ULPS = 16  # of one exponential, in which its curve is evaluated


@dataclass(frozen=True)
class ExpSumPlanes(Relaxation):
    """Sums of planes of single exponentials, or constants; see :class:`ExpSum`.

    Attributes:
        slopes: of the lower and the upper planes, (B, 1, *in_shape).
        intercepts: of their sums, (B, 1, *shape), rounded outward.
        dim: of the input, summed over, counted from its end.
    """

    slopes: tuple[Tensor, Tensor]
    intercepts: tuple[Tensor, Tensor]
    dim: int

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        wide = a.unsqueeze(self.dim)
        const = times_intercept(a, torch.where(a > 0, *self.intercepts))
        return (wide * torch.where(wide > 0, *self.slopes),), sums.last_dim(const.flatten(2), const.dtype)

    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        wide = a.unsqueeze(self.dim)
        slope = torch.where(wide > 0, *self.slopes)
        return (slope * zs[0]).sum(self.dim) + torch.where(a > 0, *self.intercepts)

    def constant_magnitude(self, a: Tensor) -> Tensor:
        return times_intercept(a, torch.where(a > 0, *self.intercepts)).abs().flatten(2).sum(-1)


@dataclass(frozen=True)
class ExpSum(NonlinearOp):
    """y = sum of exp z over ``dim``.

    Sound: the sum of planes of its terms, whose intercepts are added with all roundings accounted for. A sum of
    positive numbers is at least each of them: where one of them is sure to exceed the largest number of the type, that
    number is the lower plane, however the others lie.
    """

    dim: int

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return torch.exp(xs[0]).sum(self._after_batch(xs[0]))

    def _after_batch(self, x: Tensor) -> int:
        """The dim counted from the end, so that it is the same with further dims in front."""
        return self.dim if self.dim < 0 else self.dim + 1 - x.dim()

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        dim, info = self._after_batch(low), torch.finfo(low.dtype)
        loss = gamma(low.shape[dim] + 2 * _EXP_ULPS, low.dtype)
        least = torch.exp(low).sum(dim).clamp(max=info.max) * (1 - loss) - low.shape[dim] * tiny(low.dtype)
        most = torch.exp(up).sum(dim) * (1 + loss) + low.shape[dim] * _EXP_ULPS * tiny(low.dtype)
        return Interval(least.clamp(min=0), most)

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> ExpSumPlanes:
        image = self.interval(xs, ())
        dim = self._after_batch(xs[0].lower)
        planes = Exp().relax(xs)
        assert isinstance(planes, UnaryPlanes)
        count, dtype = xs[0].lower.shape[dim], xs[0].lower.dtype
        sides, slopes = [], []
        for slope, intercept, end, sign in (
            (planes.lower_slope, planes.lower_intercept, image.lower[:, None], -1.0),
            (planes.upper_slope, planes.upper_intercept, image.upper[:, None], 1.0),
        ):
            size = intercept.abs().sum(dim)
            total = intercept.sum(dim) + sign * (2 * gamma(count + 2, dtype) * size + tiny(dtype))
            # Slopes that are summed as coefficients stay single products.
            sure = torch.isfinite(total) & torch.isfinite(slope).all(dim)
            if sign < 0:
                sure = sure & (end < torch.finfo(dtype).max / 2)
            sides.append(torch.where(sure, total, end))
            slopes.append(torch.where(sure.unsqueeze(dim), slope, torch.zeros_like(slope)))
        return ExpSumPlanes((slopes[0], slopes[1]), (sides[0], sides[1]), dim)
