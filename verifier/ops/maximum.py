"""Maximum along one dim. Max pooling is a Gather of the windows (padding repeats an entry) followed by this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.numerics import gamma, tiny
from verifier.core.runtime import RunModel
from verifier.graph.op import NonlinearOp, Params, Relaxation, Shape, Split, times_intercept
from verifier.ops.layout import kept_dim, sane

_INF = float("inf")


@dataclass(frozen=True)
class MaximumPlanes(Relaxation):
    """Lower plane: the entry ``pick`` marks with one. Upper plane: slopes on all entries and an intercept.

    ``pick``, ``slopes`` (B, 1, *in_shape) with the reduced dim at ``dim`` (negative); ``intercept`` likewise,
    of length one there.
    """

    pick: Tensor
    slopes: Tensor
    intercept: Tensor
    dim: int
    keepdim: bool

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        wide = self._wide(a)
        const = times_intercept(wide.clamp(max=0), self.intercept).flatten(2).sum(-1)
        return (wide * torch.where(wide > 0, self.pick, self.slopes),), const

    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        low = (zs[0] * self.pick).sum(self.dim, keepdim=self.keepdim)
        up = self.intercept + (zs[0] * self.slopes).sum(self.dim, keepdim=True)
        return torch.where(a > 0, low, up if self.keepdim else up.squeeze(self.dim))

    def constant_magnitude(self, a: Tensor) -> Tensor:
        return times_intercept(self._wide(a).clamp(max=0), self.intercept).abs().flatten(2).sum(-1)

    def _wide(self, a: Tensor) -> Tensor:
        return a if self.keepdim else a.unsqueeze(self.dim)


@dataclass(frozen=True)
class MaxReduce(NonlinearOp):
    """y = max over ``dim`` of the value (negative dims count from the end)."""

    dim: int = -1
    keepdim: bool = False

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        dim = kept_dim(dims[0], (self.dim,), in_shapes[0], self.keepdim)
        return None if dim is None else Split(dim, self, (), False)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].amax(self._after_lead(1), keepdim=self.keepdim)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        return Interval(self.forward([low], p), self.forward([up], p))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> float:
        return 0.0

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> MaximumPlanes:
        """Lower plane: the entry b with the largest lower bound c. Upper plane: x_b + sum over the others of the chord
        of relu(x_k - c), or the constant largest upper bound where that is lower in the middle of the box.

        Sound: x_b >= c, so a larger x_k is at most x_b + (x_k - c). Chords are checked at their two ends, rounded up.
        """
        low, up = (t[:, None] for t in sane(xs[0]))
        rank = low.ndim
        dim = self._after_lead(2) - rank if self.dim >= 0 else self.dim
        dtype, eps = low.dtype, torch.finfo(low.dtype).eps
        c, best = low.max(dim, keepdim=True)
        pick = torch.zeros_like(low).scatter_(dim, best, 1.0)
        beyond = (up > c) & (pick == 0)
        slope = torch.where(beyond, (up - c) / (up - low), 0.0)
        rise = up - c
        at_low = -(slope * low)
        at_up = rise - slope * up
        error = (rise.abs() + (slope * up).abs() + at_low.abs()) * (4 * eps) + 8 * tiny(dtype)
        need = torch.where(beyond, torch.maximum(at_low, at_up) + error, 0.0)
        count = low.shape[dim]
        total = need.sum(dim, keepdim=True)
        total = total + gamma(count, dtype) * need.abs().sum(dim, keepdim=True)
        slopes = torch.where(pick > 0, 1.0, slope).to(dtype)
        most = up.amax(dim, keepdim=True)
        middle = total + (slopes * (low / 2 + up / 2)).sum(dim, keepdim=True)
        finite = torch.isfinite(slopes).all(dim, keepdim=True) & torch.isfinite(total) & torch.isfinite(middle)
        linear = finite & (middle <= most)
        exact = ~beyond.any(dim, keepdim=True)
        slopes = torch.where(exact, pick, torch.where(linear, slopes, 0.0))
        intercept = torch.where(exact, 0.0, torch.where(linear, total, most)).to(dtype)
        return MaximumPlanes(pick, slopes, intercept, dim, self.keepdim)

    def _after_lead(self, lead: int) -> int:
        return self.dim + lead if self.dim >= 0 else self.dim
