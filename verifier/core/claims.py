"""What the bounds that closed a search's domains cover: the network in real arithmetic, or its float32 runs as well.

Bounds hold for every run whose ops are off by no more than :mod:`verifier.core.runtime` allows. A closing bound comes
with its distance from the threshold in real arithmetic, and with how much of that the errors of a run can consume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from verifier.core.runtime import RunModel

# Domains that are refuted for the real network alone are split further while they are few beside all that were bounded:
# most of their children are refuted for runs too, and where runs can do what the network cannot, splitting has no end.
_FEW, _SHARE = 32, 0.02


class Semantics(StrEnum):
    """What a bound must hold for to close a domain."""

    REAL = "real"  # the network in real arithmetic; runs are not looked at
    BOTH = "both"  # runs too where that costs next to nothing, else the real network
    FLOAT32 = "float32"  # every float32 run


@dataclass(frozen=True)
class Claims:
    """What a query's bounds must hold for.

    Attributes:
        model: the kind of run; None where no run can be modelled.
    """

    semantics: Semantics = Semantics.REAL
    model: RunModel | None = None

    @property
    def run(self) -> RunModel | None:
        """The kind of run that bounds are made to hold for, besides the network itself."""
        return None if self.semantics is Semantics.REAL else self.model

    def real_closes(self, waiting: int, bounded: int) -> bool:
        """Whether a domain that is refuted for the real network alone is closed; otherwise it is split further.

        Args:
            waiting: how many such domains were split further so far; ``bounded``: domains bounded in all.
        """
        match self.semantics:
            case Semantics.REAL:
                return True
            case Semantics.FLOAT32:
                return False
        return waiting >= _FEW + _SHARE * bounded


@dataclass
class Covered:
    """What the closing bounds cover, accumulated.

    Attributes:
        weak: domains that were closed for the real network alone.
        margin, error: of the closing bound with the least to spare, its distance from the threshold in real arithmetic
            and the error of a run in its row; inf and 0 without any.
        overflow: whether a run may leave float32's range somewhere.
    """

    weak: int = 0
    margin: float = math.inf
    error: float = 0.0
    overflow: bool = False

    def add(self, other: Covered) -> None:
        self.weak += other.weak
        self.overflow |= other.overflow
        if other.spare < self.spare:
            self.margin, self.error = other.margin, other.error

    @property
    def spare(self) -> float:
        """What the error of a run leaves of the margin; negative where a run is not covered."""
        return self.margin - self.error

    def note(self, gap: Tensor, error: Tensor, weak: int = 0) -> None:
        """Closing bounds.

        Args:
            gap: (n,) bounds minus thresholds, the error of a run subtracted.
            error: (n,) that error.
            weak: how many of them hold for the real network alone.
        """
        self.weak += weak
        if gap.numel():
            least, place = gap.double().min(0)
            spare, own = torch.stack((least, error.double()[place])).tolist()
            if spare < self.spare:
                self.margin, self.error = spare + own, own


def real_part(lower: Tensor, error: Tensor) -> Tensor:
    """Bounds for the real network from bounds for runs, and the error of a run that was subtracted from them."""
    value = lower + error.to(lower.dtype)
    return torch.where(error > 0, value - value.abs() * (4 * torch.finfo(value.dtype).eps), lower)
