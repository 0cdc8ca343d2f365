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


class Below:
    """Planes below ``curve`` on [low, up]; what does not depend on where they touch is worked out once.

    Args:
        low, up: (B, 1, *shape).
        least: (B, 1, *shape) lower bound of the function on the interval, used where no better plane is finite.
    """

    def __init__(self, curve: Curve, low: Tensor, up: Tensor, least: Tensor) -> None:
        p = curve.inflection
        self.curve, self.low, self.up, self.least = curve, low, up, least
        f_low, self.f_up = curve.value(low), curve.value(up)
        chord = (self.f_up - f_low) / (up - low)
        at_low = curve.slope(low)
        # Left of the inflection the chord is below f when f' >= chord from low on; f' grows there, so check low alone.
        self.on_chord = (low >= p) | ((up > p) & (f_low + at_low * (up - low) >= self.f_up))
        self.chord = torch.where(low >= p, chord, torch.minimum(chord, at_low - curve.error(at_low)))
        self.at_low = _intercept(curve, f_low, self.chord, low)
        self.end, self.width, self.inside = up.clamp(max=p), (up - low).abs(), curve.contains(low, up)
        self.concave: Plane | None = self._of_chords() if p == -_INF else None

    def _of_chords(self) -> Plane:
        """No plane of a concave function touches it inside."""
        intercept = torch.minimum(self.at_low, _intercept(self.curve, self.f_up, self.chord, self.up))
        good, zero = self._good(self.chord, intercept), torch.zeros_like(self.chord)
        return Plane(torch.where(good, self.chord, zero), torch.where(good, intercept, self.least), zero, zero)

    def _good(self, slope: Tensor, intercept: Tensor) -> Tensor:
        return torch.isfinite(slope) & torch.isfinite(intercept) & self.inside

    def at(self, point: Tensor) -> Plane:
        """The plane that touches at a point (B, S or 1, *shape), where it touches; any value is sound."""
        if self.concave is not None:
            return self.concave
        curve, on_chord, up = self.curve, self.on_chord, self.up
        p = curve.inflection
        t = torch.minimum(torch.maximum(point, self.low), self.end)
        tangent_slope = curve.slope(t)
        slope = torch.where(on_chord, self.chord, tangent_slope)

        slack = curve.error(tangent_slope) * self.width
        touching = _intercept(curve, curve.value(t), slope, t) - slack * (1 + 1e-6)
        touching = touching - touching.abs() * torch.finfo(t.dtype).eps
        intercept, hinge = touching, t
        if p < _INF:
            beyond = up > p
            at_up = _intercept(curve, self.f_up, slope, up)
            first = torch.where(on_chord, self.at_low, touching)
            intercept = torch.where(on_chord | beyond, torch.minimum(first, at_up), first)
            # The plane hangs on its tangent point, or on the far end where the tangent would pass above it.
            hinge = torch.where(beyond & (at_up < touching), up, t)

        good, zero = self._good(slope, intercept), torch.zeros_like(slope)
        free = good & ~on_chord
        bend = torch.where(free, curve.bend(t), zero)
        hinge = torch.where(free, hinge, zero)
        return Plane(torch.where(good, slope, zero), torch.where(good, intercept, self.least), bend, -hinge * bend)


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
        return self.prepared(xs)(params)

    def prepared(self, xs: Sequence[Interval]) -> Callable[[Mapping[str, Tensor] | None], UnaryPlanes]:
        low, up = (x[:, None] for x in self._oriented(xs))
        reach = self.interval(xs, ())
        sign = -1.0 if self.mirrored else 1.0
        middle = torch.zeros_like(low)
        lower = Below(self.curve, low, up, reach.lower[:, None])
        upper = Below(self.curve.negated_mirror(), -up, -low, -reach.upper[:, None])

        def planes(params: Mapping[str, Tensor] | None) -> UnaryPlanes:
            given = {k: v.initial for k, v in self.parameters(xs).items()} if params is None else params
            below = lower.at(sign * given.get("lower_point", middle))
            above = upper.at(-sign * given.get("upper_point", middle))
            d_lower = {"lower_point": (below.d_slope, sign * below.d_intercept)} if "lower_point" in given else None
            d_upper = {"upper_point": (-above.d_slope, sign * above.d_intercept)} if "upper_point" in given else None
            if self.mirrored:
                return UnaryPlanes(-below.slope, below.intercept, -above.slope, -above.intercept, d_lower, d_upper)
            return UnaryPlanes(below.slope, below.intercept, above.slope, -above.intercept, d_lower, d_upper)

        return planes

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
