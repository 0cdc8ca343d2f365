"""A branching heuristic: split the neuron whose pre-activation is known least."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.branching.heuristic import Neurons
from verifier.bab.splits import SplitSpace


def rank(space: SplitSpace, neurons: Neurons) -> Tensor:
    """Scores (B, U) of the neurons of B domains; the largest is split first.

    Args:
        space: the U neurons that the root leaves unstable, with its bounds ``lower`` and ``upper`` (U,).
        neurons: their phases, and how the bounds of the domains see them.
    """
    width = (space.upper - space.lower).expand_as(neurons.coefficients)
    return torch.where(neurons.signs == 0, width, float("-inf"))
