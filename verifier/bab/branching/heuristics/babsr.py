"""BaBSR: split the neuron whose relaxation costs the bound most (Bunel et al., JMLR 2020).

The upper chord of an unstable ReLU enters the bound with its intercept -l u / (u - l) times the negative part of the
coefficient; fixing the neuron's sign removes it. A second estimate is the actual gap between the plane and the ReLU at
the point where the relaxed network attains its minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.branching.heuristic import Heuristic, Neurons
from verifier.bab.splits import SplitSpace


def intercept_scores(space: SplitSpace, neurons: Neurons) -> Tensor:
    """(B, U) cost of every free neuron's relaxation."""
    a = neurons.coefficients
    intercept = -space.lower * space.upper / (space.upper - space.lower)
    cost = -a.clamp(max=0) * intercept + a.clamp(min=0) * intercept * 1e-2
    return torch.where(neurons.signs == 0, cost, float("-inf"))


def gap_scores(space: SplitSpace, neurons: Neurons) -> Tensor:
    """(B, U) coefficients times the distance between the chosen plane and the ReLU at the minimiser."""
    signs, a, slopes, z, _ = neurons
    chord = space.upper / (space.upper - space.lower)
    plane = torch.where(a > 0, slopes * z, chord * (z - space.lower))
    return torch.where(signs == 0, (a * (plane - z.clamp(min=0))).abs(), float("-inf"))


HEURISTIC = Heuristic((intercept_scores,), trusted=True)
