"""What a branching heuristic is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.bab.splits import SplitSpace


class Neurons(NamedTuple):
    """The unstable neurons of some domains, as the bounds of the domains' best rows see them. B domains, U neurons.

    Attributes:
        signs: int8 (B, U), 0 where a neuron is free.
        coefficients: (B, U) of the row, on the neurons' outputs.
        slopes: (B, U), of the lower planes.
        z: (B, U), pre-activations at the minimiser of the row's bound.
        gap: (B,), that bound minus its threshold; negative.
    """

    signs: Tensor
    coefficients: Tensor
    slopes: Tensor
    z: Tensor
    gap: Tensor


# Scores (B, U) of the neurons of a space, the higher the sooner a neuron is split; -inf where it is split already.
Score = Callable[[SplitSpace, Neurons], Tensor]


@dataclass(frozen=True)
class Heuristic:
    """Chooses among the unstable neurons. It can make a search slow, never unsound: children cover their parent.

    Attributes:
        scores: every score proposes as many candidates as the configuration says; none is proposed twice.
        tried: whether the children of all candidates are bounded before one is chosen.
        trusted: its scores leave their arguments alone, and equal arguments give equal scores. Others get copies, and
            ranks which work on the same domains together take the word of one of them.
    """

    scores: tuple[Score, ...]
    tried: bool = False
    trusted: bool = False

    def candidates(self, space: SplitSpace, neurons: Neurons, count: int) -> Tensor:
        """(B, k) neurons, best first within each score; the same on all ranks that work on the domains.

        Args:
            count: proposals of every score, at most :attr:`SplitSpace.size`.
        """
        device = neurons.signs.device
        if space.size == 0:
            return torch.zeros((neurons.signs.shape[0], 1), dtype=torch.int64, device=device)
        if not self.trusted and space.backend.size > 1:
            agreed = space.backend.broadcast_result(lambda: self._proposed(space, neurons, count).cpu().numpy())
            return torch.from_numpy(agreed).to(device)
        return self._proposed(space, neurons, count)

    def _proposed(self, space: SplitSpace, neurons: Neurons, count: int) -> Tensor:
        found: list[Tensor] = []
        for score in self.scores:
            value = score(space, neurons)
            for taken in found:
                value = value.scatter(1, taken, float("-inf"))
            found.append(torch.topk(value, count, dim=1).indices)
        return torch.cat(found, 1)


def choose(candidates: Tensor, gaps: Tensor, target: float = 0.0) -> Tensor:
    """Order candidate columns that were tried by how much the worse child gains.

    Args:
        candidates: (B, k) columns.
        gaps: (2, B, k) of both children with inherited parameters.
        target: gaps above it count as proved and are not distinguished.

    Returns:
        (B, k) the candidates, best first.
    """
    plus, minus = gaps.clamp(max=target)
    # The worse child decides how long the subtree lives; the other breaks ties.
    scores = torch.minimum(plus, minus) + 0.25 * torch.maximum(plus, minus)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order)
