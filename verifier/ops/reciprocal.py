"""1 / z on intervals that do not contain zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.runtime import TINY, UNIT, RunModel, rate
from verifier.graph.op import NonlinearOp, Params, ParamSpec, UnaryPlanes
from verifier.ops.curves import Below, Curve, measured, tangent_limits
from verifier.ops.layout import sane

_INF = float("inf")


def _bend(z: Tensor) -> Tensor:
    return 2 / (z * z * z)


# Convex on the positive half line; the negative half is its mirror image, -1 / (-z).
RECIPROCAL = Curve(
    torch.reciprocal, lambda z: -torch.reciprocal(z * z), _bend, inflection=_INF, ulps=4.0, domain=(0.0, _INF)
)


_SMALLEST_EXPONENT = 105.0
_SECOND_ORDER = 0.05


@dataclass(frozen=True)
class Reciprocal(NonlinearOp):
    """f(z) = 1 / z; without bounds where the interval contains zero.

    Parameter ``point``: where the tangent touches (lower plane for z > 0, upper plane for z < 0).

    Attributes:
        row: length of the softmax whose last step this is, all of whose error in a run is then this step's; -1 for one
            that is computed in other steps than ours, 0 for a plain reciprocal.
    """

    row: int = 0

    elementwise = True

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return torch.reciprocal(xs[0])

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        inside = (low > 0) | (up < 0)
        least, most = torch.reciprocal(up), torch.reciprocal(low)
        least, most = least - RECIPROCAL.error(least), most + RECIPROCAL.error(most)
        return Interval(torch.where(inside, least, -_INF), torch.where(inside, most, _INF))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | float | None:
        return measured(model, self.kind, found) if self.row == 0 else softmax_error(model, self.row, found)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        low, up = sane(xs[0])
        initial, start, end = (x[:, None] for x in tangent_limits(RECIPROCAL, low, up))
        return {"point": ParamSpec(initial, start, end)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """On z > 0 tangent below and chord above; on z < 0 the same for -1 / (-z). Sound: f is convex on z > 0."""
        return self.prepared(xs)(params)

    def prepared(self, xs: Sequence[Interval]) -> Callable[[Mapping[str, Tensor] | None], UnaryPlanes]:
        low, up = (x[:, None] for x in sane(xs[0]))
        reach = self.interval(xs, ())
        minus = up < 0
        a, b = torch.where(minus, -up, low), torch.where(minus, -low, up)
        least = torch.where(minus, -reach.upper[:, None], reach.lower[:, None])
        most = torch.where(minus, -reach.lower[:, None], reach.upper[:, None])
        below = Below(RECIPROCAL, a, b, least)
        chord = Below(RECIPROCAL.negated_mirror(), -b, -a, -most).at(-a)  # which touches nowhere
        chord_above = -chord.intercept

        def planes(params: Mapping[str, Tensor] | None) -> UnaryPlanes:
            point = (self.parameters(xs) if params is None else params)["point"]
            t = point.initial if isinstance(point, ParamSpec) else point
            tangent = below.at(torch.where(minus, -t, t))
            zero = torch.zeros_like(tangent.d_slope)
            d_slope = torch.where(minus, -tangent.d_slope, tangent.d_slope)
            lower = {"point": (torch.where(minus, zero, d_slope), torch.where(minus, zero, tangent.d_intercept))}
            upper = {"point": (torch.where(minus, d_slope, zero), torch.where(minus, tangent.d_intercept, zero))}
            return UnaryPlanes(
                torch.where(minus, chord.slope, tangent.slope),
                torch.where(minus, -chord_above, tangent.intercept),
                torch.where(minus, tangent.slope, chord.slope),
                torch.where(minus, -tangent.intercept, chord_above),
                lower,
                upper,
            )

        return planes


def softmax_error(model: RunModel, row: int, found: Interval) -> Tensor | None:
    """Error of one softmax of ``row`` numbers with results in ``found``, at the numbers that a run fed it.

    A run subtracts the largest number, takes exponentials, adds them up in some order and divides. A difference d has
    the relative error of one rounding, which an exponential turns into |d| of it; where |d| > 104 the exponential is
    less than half of the smallest float32 number. The sum is at least 1.
    """
    exp = model.functions.get("Softmax")
    if exp is None or row < 1:
        return None
    power = exp.relative + _SMALLEST_EXPONENT * UNIT
    relative = (2 * power + rate(row) + row * (exp.absolute + TINY)) * (1 + _SECOND_ORDER)
    if not relative < _SECOND_ORDER / 2:
        return None
    return found.magnitude() * relative + 2 * exp.absolute + 4 * TINY
