"""Piecewise constant, non-decreasing functions: Sign, Heaviside, Floor, Ceil, Round."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, Params, Shape, Split, UnaryPlanes, split_elementwise
from verifier.ops.layout import sane


class StepOp(NonlinearOp):
    """Evaluation is exact; bounds are the values at the ends."""

    @abstractmethod
    def step(self, z: Tensor) -> Tensor:
        """The function."""

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        return split_elementwise(self, dims, in_shapes, out_shape)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.step(xs[0])

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = sane(xs[0])
        return Interval(self.step(low), self.step(up))

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        """Constant planes. Sound: the function does not decrease."""
        image = self.interval(xs, ())
        zero = torch.zeros_like(image.lower)[:, None]
        return UnaryPlanes(zero, image.lower[:, None], zero, image.upper[:, None])


class RoundingOp(StepOp):
    """A rounding to integers: z - below <= f(z) <= z + above."""

    below: float
    above: float

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


@dataclass(frozen=True)
class Sign(StepOp):
    """-1, 0 or 1."""

    def step(self, z: Tensor) -> Tensor:
        return torch.sign(z)


@dataclass(frozen=True)
class Heaviside(StepOp):
    """1 for z > 0, 0 for z < 0, ``at_zero`` for z = 0."""

    at_zero: float = 0.0

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
