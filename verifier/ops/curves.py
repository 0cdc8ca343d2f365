"""Planes for smooth unary functions from a table of traits: where they are convex, derivatives, errors of evaluation.

Any slope gives a valid plane when the intercept is right. For a lower plane of slope s the intercept may be at most
the minimum of f(z) - s z over [l, u]. Where f is concave the minimum is at an end; where f is convex it is no less than
the value of the tangent at t, corrected by (s - f'(t)) (z - t) because s is a rounded f'(t). Every value is moved
outward by the error of its evaluation, so planes hold in exact arithmetic, whatever the slopes and tangent points are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.numerics import tiny
from verifier.core.runtime import RunModel
from verifier.graph.op import Cuts, NonlinearOp, Params, ParamSpec, UnaryPlanes
from verifier.ops.layout import sane

_INF = float("inf")
_BISECTIONS = 14
# Beyond this distance from the inflection the tangent point that reaches the far end is not searched for.
_REACH = 100.0

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Curve:
    """A function that is convex up to ``inflection`` and concave from there on.

    Attributes:
        value, slope, bend: f, f', f'' as evaluated in floating point.
        inflection: inf for convex functions, -inf for concave ones.
        ulps: relative error of value and slope, in units of eps.
        floor: absolute error of value and slope, in units of eps; 16 and ``ulps`` of the smallest normal numbers are
            added to both, because libraries flush tiny results to zero.
        domain: interval on which f is defined and the traits hold, open unless ``closed``.
    """

    value: Function
    slope: Function
    bend: Function
    inflection: float
    ulps: float = 16.0
    floor: float = 0.0
    domain: tuple[float, float] = (-_INF, _INF)
    closed: bool = False

    def negated_mirror(self) -> Curve:
        """-f(-z): again convex first."""
        return Curve(
            lambda z: -self.value(-z),
            lambda z: self.slope(-z),
            lambda z: -self.bend(-z),
            -self.inflection,
            self.ulps,
            self.floor,
            (-self.domain[1], -self.domain[0]),
            self.closed,
        )

    def contains(self, low: Tensor, up: Tensor) -> Tensor:
        """Where the whole interval lies in the domain."""
        start, end = self.domain
        inside = torch.ones_like(low, dtype=torch.bool)
        if start > -_INF:
            inside = inside & ((low >= start) if self.closed else (low > start))
        if end < _INF:
            inside = inside & ((up <= end) if self.closed else (up < end))
        return inside

    def error(self, x: Tensor) -> Tensor:
        """Bound of the error of a computed value or slope."""
        eps = torch.finfo(x.dtype).eps
        return x.abs() * (self.ulps * eps) + (self.floor * eps + (16 + self.ulps) * tiny(x.dtype))


class Plane(NamedTuple):
    """slope z + intercept and the derivatives of both by the tangent point."""

    slope: Tensor
    intercept: Tensor
    d_slope: Tensor
    d_intercept: Tensor


def lower_plane(curve: Curve, low: Tensor, up: Tensor, point: Tensor, least: Tensor) -> Plane:
    """Plane below ``curve`` on [low, up].

    Args:
        low, up: (B, 1, *shape).
        point: tangent point (B, S or 1, *shape); any value is sound.
        least: (B, 1, *shape) lower bound of the function on the interval, used where no better plane is finite.
    """
    p = curve.inflection
    f_low, f_up = curve.value(low), curve.value(up)
    chord = (f_up - f_low) / (up - low)
    at_low = curve.slope(low)
    # Left of the inflection the chord is below f when f' >= chord from low on; f' grows there, so check low alone.
    on_chord = (low >= p) | ((up > p) & (f_low + at_low * (up - low) >= f_up))
    chord = torch.where(low >= p, chord, torch.minimum(chord, at_low - curve.error(at_low)))

    t = torch.minimum(torch.maximum(point, low), up.clamp(max=p))
    tangent_slope = curve.slope(t)
    slope = torch.where(on_chord, chord, tangent_slope)

    at_ends = [_intercept(curve, f, slope, x) for f, x in ((f_low, low), (f_up, up))]
    slack = curve.error(tangent_slope) * (up - low).abs()
    touching = _intercept(curve, curve.value(t), slope, t) - slack * (1 + 1e-6)
    touching = touching - touching.abs() * torch.finfo(t.dtype).eps
    first = torch.where(on_chord, at_ends[0], touching)
    intercept = torch.where(on_chord | (up > p), torch.minimum(first, at_ends[1]), first)

    good = torch.isfinite(slope) & torch.isfinite(intercept) & curve.contains(low, up)
    zero = torch.zeros_like(slope)
    free = good & ~on_chord
    bend = torch.where(free, curve.bend(t), zero)
    # The plane hangs on its tangent point, or on the far end where the tangent would pass above it.
    hinge = torch.where((up > p) & (at_ends[1] < touching), up, t)
    hinge = torch.where(free, hinge, zero)
    return Plane(torch.where(good, slope, zero), torch.where(good, intercept, least), bend, -hinge * bend)


def _intercept(curve: Curve, value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """f(x) - slope x, rounded down."""
    product = slope * x
    eps = torch.finfo(x.dtype).eps
    return (value - product) - (curve.error(value) + (value.abs() + product.abs()) * (2 * eps) + tiny(x.dtype))


def tangent_limits(curve: Curve, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Initial tangent point of the lower plane and its useful limits; all (B, *shape) and finite.

    The middle of the interval minimises the area below a convex function; in the mixed case the point must not lie
    right of the one whose tangent meets f(up), found by bisection.
    """
    p = curve.inflection
    low = torch.where(torch.isinf(low), up.clamp(-_REACH, 0.0) - _REACH, low)
    up = torch.where(torch.isinf(up), low.clamp(0.0, _REACH) + _REACH, up)
    right = up.clamp(max=p)
    if -_INF < p < _INF:
        f_up = curve.value(up)
        left, end = torch.maximum(low, 2 * p - up).clamp(min=p - _REACH), torch.full_like(low, p)
        for _ in range(_BISECTIONS):
            t = left / 2 + end / 2
            below = curve.value(t) + curve.slope(t) * (up - t) <= f_up
            left, end = torch.where(below, t, left), torch.where(below, end, t)
        right = torch.where(up > p, torch.maximum(left, low), right)
    right = torch.maximum(right, low)
    return torch.minimum(low / 2 + up / 2, right), low, right


class CurveOp(NonlinearOp):
    """A unary op with a :class:`Curve`. Parameters: ``lower_point`` and ``upper_point``, where tangents touch.

    Subclasses say which curve they are, possibly as the mirror image f(-z) of one that is convex first.
    """

    elementwise = True

    @property
    @abstractmethod
    def curve(self) -> Curve:
        """The function, or its mirror image f(-z) when ``mirrored``."""

    @property
    def mirrored(self) -> bool:
        """Whether ``curve`` is f(-z): for functions that are concave first and convex later."""
        return False

    @property
    def cuts(self) -> Cuts:
        """The inflection comes first."""
        point = -self.curve.inflection if self.mirrored else self.curve.inflection
        return Cuts((point,) if abs(point) < _INF else ())

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | float | None:
        return measured(model, self.kind, found)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.curve.value(-xs[0] if self.mirrored else xs[0])

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """Increasing functions; others override. Outside the domain nothing is known."""
        low, up = self._oriented(xs)
        ends = self.curve.value(low), self.curve.value(up)
        least, most = (ends[1], ends[0]) if self.mirrored else ends
        return self.widened(least, most, self.curve.contains(low, up))

    def widened(self, low: Tensor, up: Tensor, inside: Tensor) -> Interval:
        """Extreme values moved outward by their error; no bound where the domain is left."""
        low, up = low - self.curve.error(low), up + self.curve.error(up)
        low = torch.where(inside, low, -_INF).nan_to_num(-_INF, _INF, -_INF)
        return Interval(low, torch.where(inside, up, _INF).nan_to_num(_INF, _INF, -_INF))

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        low, up = self._oriented(xs)
        out: dict[str, ParamSpec] = {}
        curve = self.curve
        if curve.inflection > -_INF:
            out["lower_point"] = _spec(tangent_limits(curve, low, up), flip=self.mirrored)
        if curve.inflection < _INF:
            out["upper_point"] = _spec(tangent_limits(curve.negated_mirror(), -up, -low), flip=not self.mirrored)
        return out

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        low, up = (x[:, None] for x in self._oriented(xs))
        given = {k: v.initial for k, v in self.parameters(xs).items()} if params is None else params
        reach = self.interval(xs, ())
        sign = -1.0 if self.mirrored else 1.0
        middle = torch.zeros_like(low)
        below = lower_plane(self.curve, low, up, sign * given.get("lower_point", middle), reach.lower[:, None])
        above = lower_plane(
            self.curve.negated_mirror(), -up, -low, -sign * given.get("upper_point", middle), -reach.upper[:, None]
        )
        d_lower = {"lower_point": (below.d_slope, sign * below.d_intercept)} if "lower_point" in given else None
        d_upper = {"upper_point": (-above.d_slope, sign * above.d_intercept)} if "upper_point" in given else None
        if self.mirrored:
            return UnaryPlanes(-below.slope, below.intercept, -above.slope, -above.intercept, d_lower, d_upper)
        return UnaryPlanes(below.slope, below.intercept, above.slope, -above.intercept, d_lower, d_upper)

    def _oriented(self, xs: Sequence[Interval]) -> tuple[Tensor, Tensor]:
        low, up = sane(xs[0])
        return (-up, -low) if self.mirrored else (low, up)


def _spec(limits: tuple[Tensor, Tensor, Tensor], flip: bool) -> ParamSpec:
    initial, low, high = (x[:, None] for x in limits)
    return ParamSpec(-initial, -high, -low) if flip else ParamSpec(initial, low, high)


def measured(model: RunModel, kind: str, found: Interval) -> Tensor | None:
    """Error of a unary function whose results lie in ``found``; None when it was not measured."""
    error = model.functions.get(kind)
    return None if error is None else found.magnitude() * error.relative + error.absolute
