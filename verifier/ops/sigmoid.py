"""S-shaped functions: Sigmoid, Tanh, Erf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import Params
from verifier.ops.curves import Curve, CurveOp


def _sigmoid_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _sigmoid_bend(z: Tensor) -> Tensor:
    return _sigmoid_slope(z) * (torch.sigmoid(-z) - torch.sigmoid(z))


def _tanh_slope(z: Tensor) -> Tensor:
    # 1 - tanh(z)^2 without cancellation.
    return 4 * _sigmoid_slope(2 * z)


def _tanh_bend(z: Tensor) -> Tensor:
    return -2 * torch.tanh(z) * _tanh_slope(z)


def _erf_slope(z: Tensor) -> Tensor:
    return torch.exp(-z * z) * (2 / math.sqrt(math.pi))


def _erf_bend(z: Tensor) -> Tensor:
    return -2 * z * _erf_slope(z)


SIGMOID = Curve(torch.sigmoid, _sigmoid_slope, _sigmoid_bend, inflection=0.0)
TANH = Curve(torch.tanh, _tanh_slope, _tanh_bend, inflection=0.0)
# exp(-z^2) inherits z^2 eps from the square: at most eps/e absolutely.
ERF = Curve(torch.erf, _erf_slope, _erf_bend, inflection=0.0, floor=4.0)


# Slope that a search for counterexamples still sees near the bend of a function that is flat in floating point.
_LEAST_SLOPE = 1e-3


class SaturatingOp(CurveOp):
    """A curve between two limits, which its values reach in floating point."""

    def guide(self, z: Tensor, width: Tensor) -> Tensor | None:
        """The derivative, but no less than a little, the less the farther away the bend is."""
        return torch.maximum(self.curve.slope(z), _LEAST_SLOPE / (1 + (z / (1 + width)) ** 2))


@dataclass(frozen=True)
class Sigmoid(SaturatingOp):
    """f(z) = 1 / (1 + exp(-z))."""

    @property
    def curve(self) -> Curve:
        return SIGMOID

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=0), up.clamp(max=1))


@dataclass(frozen=True)
class Tanh(SaturatingOp):
    """f(z) = tanh z."""

    @property
    def curve(self) -> Curve:
        return TANH

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=-1), up.clamp(max=1))


@dataclass(frozen=True)
class Erf(SaturatingOp):
    """f(z) = erf z."""

    @property
    def curve(self) -> Curve:
        return ERF

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=-1), up.clamp(max=1))
