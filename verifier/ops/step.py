"""Piecewise constant functions: Sign, Heaviside, Floor, Ceil, Round and Single."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.runtime import RunModel
from verifier.graph.op import (
    Cuts,
    NonlinearOp,
    Params,
    ParamSpec,
    UnaryPlanes,
)
from verifier.ops.layout import sane

_STEEPEST = 2.0**20
_LARGEST = torch.finfo(torch.float32).max


class StepOp(NonlinearOp):
    """Evaluation is exact; bounds are the values at the ends."""

    elementwise = True

    @abstractmethod
    def step(self, z: Tensor) -> Tensor:
        """The function."""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.step(xs[0])

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        return Interval(self.step(low), self.step(up))

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> float:
        """None: a run steps where its own input does, which the bounds of its input allow for."""
        return 0.0

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """Constant planes. Sound: the function does not decrease."""
        image = self.interval(xs, ())
        zero = torch.zeros_like(image.lower)[:, None]
        return UnaryPlanes(zero, image.lower[:, None], zero, image.upper[:, None])


class RoundingOp(StepOp):
    """A rounding to integers: z - below <= f(z) <= z + above."""

    below: float
    above: float

    def guide(self, z: Tensor, width: Tensor) -> Tensor | None:
        """One: the straight-through estimator."""
        return torch.ones_like(z)

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """Constant planes, or slope one where the interval is longer than one. Sound: f(z) - z lies between the two
        offsets, which are exact in floating point."""
        image = self.interval(xs, ())
        low, up = sane(xs[0])
        long = ((up - low) > 1)[:, None]
        one = torch.where(long, 1.0, 0.0).to(low.dtype)
        return UnaryPlanes(
            one,
            torch.where(long, -self.below, image.lower[:, None]),
            one,
            torch.where(long, self.above, image.upper[:, None]),
        )


class JumpOp(StepOp):
    """``below`` for z < 0, ``above`` for z > 0, something between the two for z = 0.

    Parameters: ``lower`` and ``upper`` in [0, 1], how steep the planes of intervals around zero are.
    """

    below: float
    above: float

    def guide(self, z: Tensor, width: Tensor) -> Tensor | None:
        """Slope of a smooth step with the tails of 1 / z^2: no input is ever without a way to the other side."""
        return (self.above - self.below) / 2 / (width * (1 + (z / width) ** 2))

    @property
    def cuts(self) -> Cuts:
        """At the jump."""
        return Cuts((0.0,), anywhere=False)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        """Initially the plane of the shorter part is steep, that of the longer one constant."""
        low, up = sane(xs[0])
        steep = torch.where(up > -low, 1.0, 0.0).to(low.dtype)[:, None]
        return {"lower": ParamSpec(steep, 0.0, 1.0), "upper": ParamSpec(1 - steep, 0.0, 1.0)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """Around zero: below + t z with 0 <= t <= (above - below) / u, and above + t z with t <= (above - below) / -l.

        Sound: the first is at most ``below`` for z <= 0 and at most ``above`` for z <= u, the second likewise; t is
        rounded towards zero. Other intervals get constants. The steepest slope is moderate: rounding would make more of
        a huge one than it can gain.
        """
        low, up = sane(xs[0])
        image = self.interval(xs, ())
        around = (low < 0) & (up > 0)
        chosen = {k: spec.initial for k, spec in self.parameters(xs).items()} if params is None else params
        rise = (self.above - self.below) * (1 - 4 * torch.finfo(low.dtype).eps)
        zero = torch.zeros_like(low)[:, None]

        def slope(length: Tensor) -> Tensor:
            steepest = torch.where(around, rise / torch.where(around, length, 1.0), 0.0)
            return steepest.clamp(max=_STEEPEST)[:, None]

        first, second = slope(up), slope(-low)
        return UnaryPlanes(
            first * chosen["lower"].clamp(0.0, 1.0),
            torch.where(around, self.below, image.lower)[:, None],
            second * chosen["upper"].clamp(0.0, 1.0),
            torch.where(around, self.above, image.upper)[:, None],
            {"lower": (first, zero)},
            {"upper": (second, zero)},
        )


@dataclass(frozen=True)
class Sign(JumpOp):
    """-1, 0 or 1."""

    below = -1.0
    above = 1.0

    def step(self, z: Tensor) -> Tensor:
        return torch.sign(z)


@dataclass(frozen=True)
class Heaviside(JumpOp):
    """1 for z > 0, 0 for z < 0, ``at_zero`` for z = 0."""

    at_zero: float = 0.0
    below = 0.0
    above = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.at_zero <= 1:
            raise ValueError(f"the step's value at zero must lie between 0 and 1, not at {self.at_zero}")

    def step(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, 1.0, torch.where(z < 0, 0.0, self.at_zero)).to(z.dtype)


@dataclass(frozen=True)
class Floor(RoundingOp):
    """Largest integer that is not above z."""

    below = 1.0
    above = 0.0

    def step(self, z: Tensor) -> Tensor:
        return torch.floor(z)


@dataclass(frozen=True)
class Ceil(RoundingOp):
    """Smallest integer that is not below z."""

    below = 0.0
    above = 1.0

    def step(self, z: Tensor) -> Tensor:
        return torch.ceil(z)


@dataclass(frozen=True)
class Round(RoundingOp):
    """Nearest integer, ties to even."""

    below = 0.5
    above = 0.5

    def step(self, z: Tensor) -> Tensor:
        return torch.round(z)


@dataclass(frozen=True)
class Single(StepOp):
    """Nearest float32: what a conversion from float64 gives. Beyond float32's range there are no bounds."""

    rounds = True

    @property
    def cuts(self) -> None:
        """Its planes are an error of rounding apart."""

    def step(self, z: Tensor) -> Tensor:
        return z.to(torch.float32).to(z.dtype)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        beyond, inf = self._beyond(low, up), float("inf")
        return Interval(torch.where(beyond, -inf, self.step(low)), torch.where(beyond, inf, self.step(up)))

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """Planes of slope one, or constant ones where the interval is no longer than what rounding can do.

        Sound: |f(z) - z| <= 2^-24 |z| + 2^-150. Twice the smallest normal float32 covers the last term and what
        flushing the product to zero would take; the factor is large enough for the roundings of the product and the
        sum. The function does not decrease.
        """
        low, up = sane(xs[0])
        image = self.interval(xs, ())
        size = torch.maximum(low.abs(), up.abs())
        error = size * (2.0**-24 * (1 + 2.0**-10)) + 2.0**-125
        sloped = ((up - low) > 2 * error) & ~self._beyond(low, up)
        one = torch.where(sloped, 1.0, 0.0).to(low.dtype)[:, None]
        return UnaryPlanes(
            one,
            torch.where(sloped, -error, image.lower)[:, None],
            one,
            torch.where(sloped, error, image.upper)[:, None],
        )

    def _beyond(self, low: Tensor, up: Tensor) -> Tensor:
        """Intervals with numbers that float32 may not hold."""
        return ~((low >= -_LARGEST) & (up <= _LARGEST))
