"""Domains of a search: batches of tensors that lead with one axis, one class for each kind of split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from verifier.core.interval import Interval

D = TypeVar("D", bound="Domains")


@dataclass(frozen=True)
class Domains:
    """A batch of domains: every field of a subclass is a tensor that leads with the domain axis."""

    case: Tensor  # (B,) int64, which case of the problem is searched for a counterexample

    @property
    def count(self) -> int:
        return int(self.case.shape[0])

    def map(self: D, function: Callable[[Tensor], Tensor]) -> D:
        """The same function on every tensor."""
        return type(self)(*(function(getattr(self, f.name)) for f in fields(self)))

    def __getitem__(self: D, index: Tensor | slice) -> D:
        return self.map(lambda t: t[index])

    def halves(self: D) -> list[D]:
        """The first and the second half of the batch."""
        return [self[: self.count // 2], self[self.count // 2 :]]

    @classmethod
    def cat(cls: type[D], parts: Sequence[D]) -> D:
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))


@dataclass(frozen=True)
class BoxDomains(Domains):
    """Input boxes; k coordinates vary, the others are those of the case's box.

    Attributes:
        lower, upper: float32 (B, k), closed.
        depth: int16 (B,), number of halvings.
        gap: float32 (B,), the best row's bound minus its threshold when the parent was bounded.
    """

    lower: Tensor
    upper: Tensor
    depth: Tensor
    gap: Tensor

    @property
    def box(self) -> Interval:
        return Interval(self.lower, self.upper)


@dataclass(frozen=True)
class NeuronDomains(Domains):
    """Phases of neurons, and what the bound is computed with. S rows per case, U unstable neurons.

    A neuron is either free or split, so that its slope and its multiplier never meet and share one number.

    Attributes:
        signs: int8 (B, U): +1 where the pre-activation is >= 0, -1 where it is <= 0, 0 where the neuron is free.
        alpha_beta: float32 (B, S, U): alpha of a free neuron, the slope of its lower plane; beta of a split one.
    """

    signs: Tensor
    alpha_beta: Tensor

    @property
    def plain(self) -> NeuronDomains:
        """Without what an open domain remembers besides."""
        return NeuronDomains(self.case, self.signs, self.alpha_beta)


@dataclass(frozen=True)
class OpenNeuronDomains(NeuronDomains):
    """Neuron domains that were bounded and are still open.

    Attributes:
        gap: float32 (B,), the best row's bound minus its threshold; negative, the worst domain has the lowest.
        candidates: int64 (B, k), neurons that the heuristic would split, best first.
        probes: int64 (B, p), sides of other splits that may be refuted at once: 2 u for a pre-activation >= 0 of
            neuron u, 2 u + 1 for <= 0, -1 for none.
        pushes: float32 (B, p), multipliers to try these sides with.
    """

    gap: Tensor
    candidates: Tensor
    probes: Tensor
    pushes: Tensor


@dataclass(frozen=True)
class ValueDomains(Domains):
    """Clamps of node values, and what the bound is computed with. S rows per case, U columns, P relaxation parameters.

    Attributes:
        lower, upper: float32 (B, U), closed: the value of every column lies between the two.
        multipliers: float32 (B, S, U): above zero of the upper clamp, below zero of the lower one.
        places: float32 (B, S, P), relaxation parameters as places between their limits; or (B, S, 0): the root's.
    """

    lower: Tensor
    upper: Tensor
    multipliers: Tensor
    places: Tensor

    @property
    def plain(self) -> ValueDomains:
        """Without what an open domain remembers besides."""
        return ValueDomains(self.case, self.lower, self.upper, self.multipliers, self.places)


@dataclass(frozen=True)
class OpenValueDomains(ValueDomains):
    """Value domains that were bounded and are still open.

    Attributes:
        gap: float32 (B,), the best row's bound minus its threshold; negative, the worst domain has the lowest.
        candidates: int64 (B, k), columns that might be split, best first; -1 for none.
        points: float32 (B, k), where.
    """

    gap: Tensor
    candidates: Tensor
    points: Tensor
