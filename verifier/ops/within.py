"""Ranges that values have by construction: sums of squares, the denominator of a softmax, normalised numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.runtime import RunModel
from verifier.graph.op import NonlinearOp, Params, ParamSpec, UnaryPlanes
from verifier.ops.layout import sane

_INF = float("inf")


@dataclass(frozen=True)
class Within(NonlinearOp):
    """The same numbers, of which is known that they lie in [low, high] whatever the input is.

    Bounds of an input lose what its elements have to do with one another; this op puts back what follows from it.
    Sound: y = z and low <= y <= high, so y is at least every mixture of z and ``low``, and at most every one of z and
    ``high``.
    Parameters: ``lower`` and ``upper`` in [0, 1], the share of z.
    """

    low: float = -_INF
    high: float = _INF

    elementwise = True

    @property
    def cuts(self) -> None:
        """Splits do not make its planes tighter: those of what it reads do."""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0]

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """An interval beside the range, which rounding can leave, becomes an end of it."""
        low, up = sane(xs[0])
        return Interval(low.clamp(min=self.low, max=self.high), up.clamp(min=self.low, max=self.high))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> float | None:
        """None for the denominator of a softmax, whose error is that of its last step. Other runs are not covered."""
        return 0.0 if self.low == 1.0 and self.high == _INF else None

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        """All of z, unless its interval is much longer than what is left of it."""
        low, up = sane(xs[0])
        found = self.interval(xs, ())
        near = (up - low) <= 2 * (found.upper - found.lower)
        share = torch.where(near, 1.0, 0.0).to(low.dtype)[:, None]
        return {"lower": ParamSpec(share, 0.0, 1.0), "upper": ParamSpec(share, 0.0, 1.0)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        chosen = {k: spec.initial for k, spec in self.parameters(xs).items()} if params is None else params
        below, d_below = _side(chosen["lower"], self.low, -1.0)
        above, d_above = _side(chosen["upper"], self.high, 1.0)
        return UnaryPlanes(below[0], below[1], above[0], above[1], {"lower": d_below}, {"upper": d_above})


def _side(share: Tensor, end: float, sign: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Slope and intercept of a mixture, moved outward by its rounding, and their derivatives by the share."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    if abs(end) == _INF:
        return (one, zero), (zero, zero)
    share = share.clamp(0.0, 1.0)
    intercept = (1 - share) * end
    intercept = intercept + sign * abs(end) * (4 * torch.finfo(share.dtype).eps)
    return (share, torch.where(share == 1, zero, intercept)), (one, torch.full_like(share, -end))
