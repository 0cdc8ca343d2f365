"""Planes from a range of the second derivative: for smooth functions with several inflections (Sin, Cos, Gelu, Silu).

On [l, u] of width w let f'' lie in [m, M]. Taylor gives f(z) >= f(t) + f'(t) (z - t) + min(m, 0) (z - t)^2 / 2
and the error of linear interpolation f(z) >= chord(z) - max(M, 0) w^2 / 8. Both hold for rounded slopes when the
intercept pays for the difference. Upper planes are the lower planes of -f.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.numerics import tiny
from verifier.core.runtime import RunModel
from verifier.graph.op import NonlinearOp, Params, ParamSpec, UnaryPlanes
from verifier.ops.curves import measured
from verifier.ops.layout import sane

_INF = float("inf")
_ULPS = 16.0


@dataclass(frozen=True)
class _Sampled:
    """f, f', f'' at one point."""

    value: Tensor
    slope: Tensor
    bend: Tensor


class BentOp(NonlinearOp):
    """A smooth unary op. Parameters: ``lower_point`` and ``upper_point``, where tangents touch.

    A subclass gives ``value``, ``slope``, ``bend``, ``bends`` and ``interval``. Planes are widened here, by ``error``;
    ``bends`` and ``interval`` are taken as they are, so they widen their results themselves. Ends of boxes may be
    infinite: ``value`` and ``slope`` may give inf or NaN there, and so may ``bends``, but ``interval`` never NaN. Where
    no plane is finite, a constant of ``interval`` stands in.
    """

    elementwise = True

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """f(z) as evaluated in floating point, with an error of at most :meth:`error`."""

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """f'(z), with an error of at most :meth:`error`."""

    @abstractmethod
    def bend(self, z: Tensor) -> Tensor:
        """f''(z), for gradients alone: no bound depends on how exact it is."""

    @abstractmethod
    def bends(self, low: Tensor, up: Tensor) -> Interval:
        """Range of f'' on [low, up], outward: all roundings included."""

    def error(self, z: Tensor) -> Tensor:
        """Absolute error of a computed value or slope at z; by default 16 (1 + abs z) eps of z's type."""
        return (1 + z.abs()) * (_ULPS * torch.finfo(z.dtype).eps)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.value(xs[0])

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | float | None:
        return measured(model, self.kind, found)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        low, up = sane(xs[0])
        low = torch.where(torch.isinf(low), up.clamp(-1.0, 1.0) - 1.0, low)
        up = torch.where(torch.isinf(up), low.clamp(-1.0, 1.0) + 1.0, up)
        low, up = torch.minimum(low, up)[:, None], torch.maximum(low, up)[:, None]
        spec = ParamSpec(low / 2 + up / 2, low, up)
        return {"lower_point": spec, "upper_point": spec}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """The highest in the middle among tangent and chord, both with remainder, and constant; see the module."""
        low, up = (x[:, None] for x in sane(xs[0]))
        given = {k: v.initial for k, v in self.parameters(xs).items()} if params is None else params
        image, bends = self.interval(xs, ()), self.bends(low, up)
        below = self._lower(low, up, given["lower_point"], bends, image.lower[:, None], 1.0)
        minus = Interval(-bends.upper, -bends.lower)
        above = self._lower(low, up, given["upper_point"], minus, -image.upper[:, None], -1.0)
        return UnaryPlanes(
            below[0],
            below[1],
            -above[0],
            -above[1],
            {"lower_point": (below[2], below[3])},
            {"upper_point": (-above[2], -above[3])},
        )

    def _lower(
        self, low: Tensor, up: Tensor, point: Tensor, bends: Interval, least: Tensor, sign: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lower plane of sign * f: slope, intercept and their derivatives by the tangent point."""
        eps = torch.finfo(low.dtype).eps
        width = (up - low).abs()
        t = torch.minimum(torch.maximum(point, low), up)
        at_t, at_low, at_up = (_Sampled(sign * self.value(z), sign * self.slope(z), self.bend(z)) for z in (t, low, up))

        def intercept(f: Tensor, slope: Tensor, z: Tensor) -> Tensor:
            size = f.abs() + (slope * z).abs()
            return (f - slope * z) - self.error(z) - size * (4 * eps) - tiny(z.dtype)

        reach = torch.maximum(t - low, up - t)
        sag = (-bends.lower).clamp(min=0)
        remainder = (sag / 2 * reach * reach + self.error(t) * width) * (1 + 8 * eps)
        tangent = intercept(at_t.value, at_t.slope, t) - remainder
        tangent = tangent - tangent.abs() * eps

        chord_slope = (at_up.value - at_low.value) / (up - low)
        ends = torch.minimum(intercept(at_low.value, chord_slope, low), intercept(at_up.value, chord_slope, up))
        chord = ends - bends.upper.clamp(min=0) / 8 * width * width * (1 + 8 * eps)
        chord = chord - chord.abs() * eps

        middle = low / 2 + up / 2
        heights = [
            torch.where(torch.isfinite(s) & torch.isfinite(c), s * middle + c, -_INF).nan_to_num(-_INF, -_INF, -_INF)
            for s, c in ((at_t.slope, tangent), (chord_slope, chord))
        ]
        on_tangent = (heights[0] >= heights[1]) & (heights[0] >= least) & (heights[0] > -_INF)
        on_chord = ~on_tangent & (heights[1] > least)
        zero = torch.zeros_like(t)
        slope = torch.where(on_tangent, at_t.slope, torch.where(on_chord, chord_slope, zero))
        constant = torch.where(on_tangent, tangent, torch.where(on_chord, chord, least))
        bend = torch.where(on_tangent, sign * at_t.bend, zero)
        longer = torch.where(t - low >= up - t, 1.0, -1.0)
        d_constant = torch.where(on_tangent, -t * bend - sag * reach * longer, zero)
        return slope, constant, bend, d_constant


class _Wave(BentOp):
    """sin(z + phase) where the phase is a multiple of a quarter turn."""

    phase: float

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        ends = self.value(low), self.value(up)
        top = _meets(low, up, math.pi / 2 - self.phase)
        bottom = _meets(low, up, -math.pi / 2 - self.phase)
        slack = _ULPS * torch.finfo(low.dtype).eps
        least = torch.where(bottom, -1.0, torch.minimum(*ends) - slack)
        most = torch.where(top, 1.0, torch.maximum(*ends) + slack)
        return Interval(least.nan_to_num(-1.0).clamp(min=-1), most.nan_to_num(1.0).clamp(max=1))

    def error(self, z: Tensor) -> Tensor:
        return torch.full_like(z, _ULPS * torch.finfo(z.dtype).eps)

    def bend(self, z: Tensor) -> Tensor:
        return -self.value(z)

    def bends(self, low: Tensor, up: Tensor) -> Interval:
        least, most = self.interval([Interval(low, up)], ())
        return Interval(-most, -least)


@dataclass(frozen=True)
class Sin(_Wave):
    """f(z) = sin z."""

    phase = 0.0

    def value(self, z: Tensor) -> Tensor:
        return torch.sin(z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.cos(z)


@dataclass(frozen=True)
class Cos(_Wave):
    """f(z) = cos z."""

    phase = math.pi / 2

    def value(self, z: Tensor) -> Tensor:
        return torch.cos(z)

    def slope(self, z: Tensor) -> Tensor:
        return -torch.sin(z)


class _Gate(BentOp):
    """z g(z) with g increasing from 0 to 1 and g(z) + g(-z) = 1: one minimum, f'' even, largest at 0, smallest at two
    points +-``dip`` and monotone between; f'' > 0 exactly near 0.

    Attributes:
        minimum: an interval that contains the place of the minimum, and a number just below its value.
        dip: an interval that contains the place where f'' is smallest, and a number just below its value.
        peak: a number just above f''(0).
    """

    minimum: tuple[float, float, float]
    dip: tuple[float, float, float]
    peak: float

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        at_low, at_up = self.value(low).nan_to_num(0.0, _INF), self.value(up).nan_to_num(0.0, _INF)
        slack = [self.error(z).nan_to_num(0.0, 0.0) for z in (low, up)]
        least = torch.minimum(at_low - slack[0], at_up - slack[1])
        start, end, value = self.minimum
        least = torch.where((low <= end) & (up >= start), value, least)
        most = torch.maximum(at_low + slack[0], at_up + slack[1])
        # From below f tends to zero but never gets there.
        return Interval(least.clamp(min=value), torch.where(torch.isinf(low), most.clamp(min=0), most))

    def bends(self, low: Tensor, up: Tensor) -> Interval:
        at_low, at_up = self.bend(low).nan_to_num(0.0), self.bend(up).nan_to_num(0.0)
        slack = _ULPS * torch.finfo(low.dtype).eps
        start, end, value = self.dip
        dips = ((low <= end) & (up >= start)) | ((low <= -start) & (up >= -end))
        # Beyond the dips f'' is negative and rises to zero, which an infinite end stands for.
        least = torch.where(dips, value, torch.minimum(at_low, at_up) - slack)
        most = torch.where((low <= 0) & (up >= 0), self.peak, torch.maximum(at_low, at_up) + slack)
        return Interval(least, most)


@dataclass(frozen=True)
class Gelu(_Gate):
    """f(z) = z Phi(z), Phi the normal distribution function."""

    minimum = (-0.7518, -0.7517, -0.16998)
    dip = (2.0 - 1e-6, 2.0 + 1e-6, -0.107982)
    peak = 0.797885

    def value(self, z: Tensor) -> Tensor:
        return z * (0.5 * torch.erfc(z * -math.sqrt(0.5)))

    def slope(self, z: Tensor) -> Tensor:
        return 0.5 * torch.erfc(z * -math.sqrt(0.5)) + z * _normal(z)

    def bend(self, z: Tensor) -> Tensor:
        return _normal(z) * (2 - z * z)


@dataclass(frozen=True)
class Silu(_Gate):
    """f(z) = z sigmoid(z)."""

    minimum = (-1.2785, -1.2784, -0.27847)
    dip = (3.43, 3.44, -0.03692)
    peak = 0.5 + 1e-6

    def value(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(z)

    def slope(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) + z * _logistic(z)

    def bend(self, z: Tensor) -> Tensor:
        return _logistic(z) * (2 + z * (torch.sigmoid(-z) - torch.sigmoid(z)))


def _normal(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) * (1 / math.sqrt(2 * math.pi))


def _logistic(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _meets(low: Tensor, up: Tensor, place: float) -> Tensor:
    """Where [low, up] may contain place + 2 pi k for an integer k; errs towards yes. Infinite ends: yes."""
    slack = (low.abs() + up.abs() + 10) * (4 * torch.finfo(low.dtype).eps)
    turns = 2 * math.pi
    first = torch.ceil((low - slack - place) / turns)
    last = torch.floor((up + slack - place) / turns)
    return ~(first > last) | ~torch.isfinite(low) | ~torch.isfinite(up)
