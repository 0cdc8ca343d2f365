"""Powers: Square, Power, Sqrt, Reciprocal; and Abs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.runtime import TINY, UNIT, RunModel
from verifier.graph.op import Params
from verifier.ops.curves import Curve, CurveOp, measured
from verifier.ops.layout import sane

_INF = float("inf")


def _minus_half_over_root_cubed(z: Tensor) -> Tensor:
    return -0.25 / (z * torch.sqrt(z))


SQUARE = Curve(lambda z: z * z, lambda z: 2 * z, lambda z: torch.full_like(z, 2.0), inflection=_INF, ulps=2.0)
SQRT = Curve(
    torch.sqrt,
    lambda z: 0.5 / torch.sqrt(z),
    _minus_half_over_root_cubed,
    inflection=-_INF,
    ulps=4.0,
    domain=(0.0, _INF),
    closed=True,
)


@dataclass(frozen=True)
class Square(CurveOp):
    """f(z) = z^2."""

    @property
    def curve(self) -> Curve:
        return SQUARE

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor:
        """One product, whether it is written as one or as a power."""
        return found.magnitude() * (2 * UNIT) + TINY

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return _even(self, xs)


@dataclass(frozen=True)
class Power(CurveOp):
    """f(z) = z^n for an integer n >= 2, or z^e for a real e > 0 and z >= 0; e < 0 needs z > 0."""

    exponent: float

    @property
    def curve(self) -> Curve:
        """Odd powers are concave first: their mirror image (-z)^n is listed."""
        e = float(self.exponent)
        sign = -1.0 if self.mirrored else 1.0
        whole = _whole(e)
        ulps = 16.0 + 2 * abs(e)
        return Curve(
            lambda z: sign * _power(z, e),
            lambda z: sign * e * _power(z, e - 1),
            lambda z: sign * e * (e - 1) * _power(z, e - 2),
            inflection=0.0 if self.mirrored else (-_INF if 0 < e < 1 else _INF),
            ulps=ulps,
            domain=(-_INF, _INF) if whole else (0.0, _INF),
            closed=e > 0,
        )

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | None:
        return measured(model, f"Pow({self.exponent:g})", found)

    @property
    def mirrored(self) -> bool:
        return _whole(self.exponent) and int(self.exponent) % 2 == 1

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        if _whole(self.exponent) and not self.mirrored:
            return _even(self, xs)
        if self.exponent > 0:
            return super().interval(xs, p)
        low, up = sane(xs[0])
        return self.widened(self.curve.value(up), self.curve.value(low), self.curve.contains(low, up))


@dataclass(frozen=True)
class Sqrt(CurveOp):
    """f(z) = sqrt z, for z >= 0."""

    @property
    def curve(self) -> Curve:
        return SQRT

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(torch.where(xs[0].lower >= 0, low.clamp(min=0), low), up)


def _power(z: Tensor, e: float) -> Tensor:
    return torch.pow(z, e)


def _whole(e: float) -> bool:
    return e >= 2 and float(e).is_integer()


def _even(op: CurveOp, xs: Sequence[Interval]) -> Interval:
    """Range of a non-negative even convex function with its minimum 0 at 0."""
    low, up = sane(xs[0])
    at_low, at_up = op.curve.value(low), op.curve.value(up)
    least = torch.where((low <= 0) & (up >= 0), 0.0, torch.minimum(at_low, at_up))
    found = op.widened(least, torch.maximum(at_low, at_up), torch.ones_like(low, dtype=torch.bool))
    return Interval(found.lower.clamp(min=0), found.upper)
