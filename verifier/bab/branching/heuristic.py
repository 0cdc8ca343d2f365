"""What a branching heuristic is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bab.splits import SplitSpace

# Scores (B, U) of the unstable neurons of some domains, the higher the sooner a neuron is split, and -inf where it is
# split already. B domains, U neurons of the split space.
#
#     space: the neurons, with their root bounds.
#     signs: int8 (B, U), 0 where a neuron is free.
#     coefficients: (B, U) of the row with the best bound, on the neurons' outputs.
#     slopes: (B, U), of the lower planes in that row.
#     z: (B, U), pre-activations at the minimiser of that row's bound.
#     gap: (B,), that bound minus its threshold; negative.
Score = Callable[[SplitSpace, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Heuristic:
    """Chooses among the unstable neurons. It can make a search slow, never unsound: children cover their parent.

    Attributes:
        scores: every score proposes as many candidates as the configuration says; none is proposed twice.
        tried: whether the children of all candidates are bounded before one is chosen.
    """

    scores: tuple[Score, ...]
    tried: bool = False

    def candidates(
        self, space: SplitSpace, neurons: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], count: int
    ) -> Tensor:
        """(B, k) neurons, best first within each score.

        Args:
            neurons: signs, coefficients, slopes, z and gap, as scores take them.
            count: proposals of every score, at most :attr:`SplitSpace.size`.
        """
        if space.size == 0:
            return torch.zeros((neurons[0].shape[0], 1), dtype=torch.int64, device=neurons[0].device)
        found: list[Tensor] = []
        for score in self.scores:
            value = score(space, *neurons)
            for taken in found:
                value = value.scatter(1, taken, float("-inf"))
            found.append(torch.topk(value, count, dim=1).indices)
        return torch.cat(found, 1)
