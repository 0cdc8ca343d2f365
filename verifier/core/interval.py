"""Elementwise intervals of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """Lower and upper bounds of a value; both tensors have the same shape and dtype."""

    lower: Tensor
    upper: Tensor

    def magnitude(self) -> Tensor:
        """Largest absolute value the interval allows, same shape."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def intersect(self, other: Interval) -> Interval:
        """Keep the tighter bound elementwise; NaN never wins over a number."""
        return Interval(torch.fmax(self.lower, other.lower), torch.fmin(self.upper, other.upper))

    def to(self, *args: object, **kwargs: object) -> Interval:
        return Interval(self.lower.to(*args, **kwargs), self.upper.to(*args, **kwargs))  # type: ignore[call-overload]
