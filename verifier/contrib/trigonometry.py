"""Tan, Atan, Asin, Acos, Sinh, Cosh, Acosh and Atanh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.frontend.lower_nonlinear import unary
from verifier.graph.op import Params
from verifier.ops.curves import Curve, CurveOp
from verifier.ops.layout import sane
from verifier.testing import Node, Sample

_INF = float("inf")


def _secant(z: Tensor) -> Tensor:
    return 1 / torch.cos(z).square()


def _half_circle(z: Tensor) -> Tensor:
    return torch.rsqrt((1 - z) * (1 + z))


# Each is given as its mirror image f(-z) where it is concave first.
TAN = Curve(
    lambda z: -torch.tan(z),
    lambda z: -_secant(z),
    lambda z: -2 * torch.tan(z) * _secant(z),
    inflection=0.0,
    ulps=64.0,
    domain=(-1.5, 1.5),
    closed=True,
)
ATAN = Curve(
    torch.atan,
    lambda z: 1 / (1 + z * z),
    lambda z: -2 * z / (1 + z * z).square(),
    inflection=0.0,
)
ASIN = Curve(
    lambda z: -torch.asin(z),
    lambda z: -_half_circle(z),
    lambda z: -z * _half_circle(z) ** 3,
    inflection=0.0,
    ulps=32.0,
    domain=(-1.0, 1.0),
    closed=True,
)
ACOS = Curve(
    torch.acos,
    lambda z: -_half_circle(z),
    lambda z: -z * _half_circle(z) ** 3,
    inflection=0.0,
    ulps=32.0,
    floor=4.0,
    domain=(-1.0, 1.0),
    closed=True,
)
SINH = Curve(lambda z: -torch.sinh(z), lambda z: -torch.cosh(z), lambda z: -torch.sinh(z), inflection=0.0)
COSH = Curve(torch.cosh, torch.sinh, torch.cosh, inflection=_INF)
ACOSH = Curve(
    torch.acosh,
    lambda z: torch.rsqrt((z - 1) * (z + 1)),
    lambda z: -z * torch.rsqrt((z - 1) * (z + 1)) ** 3,
    inflection=-_INF,
    ulps=32.0,
    floor=4.0,
    domain=(1.0, _INF),
    closed=True,
)
ATANH = Curve(
    lambda z: -torch.atanh(z),
    lambda z: -1 / ((1 - z) * (1 + z)),
    lambda z: -2 * z / ((1 - z) * (1 + z)).square(),
    inflection=0.0,
    ulps=32.0,
    domain=(-1.0, 1.0),
)


class _ConcaveFirst(CurveOp):
    """Concave up to its inflection, convex from there on."""

    @property
    def mirrored(self) -> bool:
        return True


@dataclass(frozen=True)
class Tan(_ConcaveFirst):
    """f(z) = tan z, for abs z <= 1.5. Sound: f'' = 2 tan z / cos^2 z has the sign of z there."""

    @property
    def curve(self) -> Curve:
        return TAN


@dataclass(frozen=True)
class Atan(CurveOp):
    """f(z) = atan z. Sound: f'' = -2 z / (1 + z^2)^2, convex up to 0 and concave from there."""

    @property
    def curve(self) -> Curve:
        return ATAN

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=-1.570797), up.clamp(max=1.570797))


@dataclass(frozen=True)
class Asin(_ConcaveFirst):
    """f(z) = asin z, for abs z <= 1. Sound: f'' = z / (1 - z^2)^(3/2) has the sign of z."""

    @property
    def curve(self) -> Curve:
        return ASIN


@dataclass(frozen=True)
class Acos(CurveOp):
    """f(z) = acos z, for abs z <= 1. Sound: f'' = -z / (1 - z^2)^(3/2), convex up to 0 and concave from there."""

    @property
    def curve(self) -> Curve:
        return ACOS

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """It decreases."""
        low, up = sane(xs[0])
        return self.widened(ACOS.value(up), ACOS.value(low), ACOS.contains(low, up))


@dataclass(frozen=True)
class Sinh(_ConcaveFirst):
    """f(z) = sinh z. Sound: f'' = sinh z has the sign of z."""

    @property
    def curve(self) -> Curve:
        return SINH


@dataclass(frozen=True)
class Cosh(CurveOp):
    """f(z) = cosh z. Sound: it is convex, with its minimum 1 at 0."""

    @property
    def curve(self) -> Curve:
        return COSH

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        at_low, at_up = COSH.value(low), COSH.value(up)
        least = torch.where((low <= 0) & (up >= 0), 1.0, torch.minimum(at_low, at_up))
        found = self.widened(least, torch.maximum(at_low, at_up), torch.ones_like(low, dtype=torch.bool))
        return Interval(found.lower.clamp(min=1), found.upper)


@dataclass(frozen=True)
class Acosh(CurveOp):
    """f(z) = acosh z, for z >= 1. Sound: it is concave and increases."""

    @property
    def curve(self) -> Curve:
        return ACOSH

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(torch.where(xs[0].lower >= 1, low.clamp(min=0), low), up)


@dataclass(frozen=True)
class Atanh(_ConcaveFirst):
    """f(z) = atanh z, for abs z < 1. Sound: f'' = 2 z / (1 - z^2)^2 has the sign of z."""

    @property
    def curve(self) -> Curve:
        return ATANH


def _exact(name: str, z: Any) -> Any:
    import mpmath

    return getattr(mpmath, name)(z)


_DOMAINS = {Tan: (-1.5, 1.5), Asin: (-1.0, 1.0), Acos: (-1.0, 1.0), Acosh: (1.0, _INF), Atanh: (-0.999, 0.999)}
_BOXES = {Tan: (-1.4, 1.4), Asin: (-0.9, 0.9), Acos: (-0.9, 0.9), Acosh: (1.1, 3.0), Atanh: (-0.9, 0.9)}

OPS = [Tan, Atan, Asin, Acos, Sinh, Cosh, Acosh, Atanh]
TRANSLATORS = {op.__name__.lower(): unary(op) for op in OPS}
CONVERTERS = {op.__name__: partial(lambda f, attributes: f, getattr(torch, op.__name__.lower())) for op in OPS}
SAMPLES = [
    Sample(name, op(), ((2, 3),), domain=_DOMAINS.get(op, (-_INF, _INF)), exact=partial(_exact, name))
    for op, name in ((op, op.__name__.lower()) for op in OPS)
]
NODES = [Node(op.__name__, box=_BOXES.get(op, (-2.0, 2.0))) for op in OPS]
