"""Exp, Log and Softplus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import Params
from verifier.ops.curves import Curve, CurveOp
from verifier.ops.sigmoid import SIGMOID

_INF = float("inf")


def _softplus(z: Tensor) -> Tensor:
    return torch.logaddexp(z, torch.zeros_like(z))


EXP = Curve(torch.exp, torch.exp, torch.exp, inflection=_INF)
# log changes sign at 1, where only its absolute error is small; the libraries give ulps there as well.
LOG = Curve(
    torch.log, torch.reciprocal, lambda z: -torch.reciprocal(z * z), inflection=-_INF, floor=1.0, domain=(0.0, _INF)
)
SOFTPLUS = Curve(_softplus, SIGMOID.value, SIGMOID.slope, inflection=_INF)


@dataclass(frozen=True)
class Exp(CurveOp):
    """f(z) = exp z."""

    @property
    def curve(self) -> Curve:
        return EXP

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=0), up)


@dataclass(frozen=True)
class Log(CurveOp):
    """f(z) = log z, for z > 0."""

    @property
    def curve(self) -> Curve:
        return LOG


@dataclass(frozen=True)
class Softplus(CurveOp):
    """f(z) = log(1 + exp z)."""

    @property
    def curve(self) -> Curve:
        return SOFTPLUS

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=0), up)
