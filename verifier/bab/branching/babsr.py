"""BaBSR: split the neuron whose relaxation costs the bound most (Bunel et al., JMLR 2020).

The upper chord of an unstable ReLU enters the bound with its intercept -l u / (u - l) times the negative part of the
coefficient; fixing the neuron's sign removes it. A second estimate is the actual gap between the plane and the ReLU at
the point where the relaxed network attains its minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.branching.heuristic import Heuristic
from verifier.bab.splits import SplitSpace


def intercept_scores(
    space: SplitSpace, signs: Tensor, coefficients: Tensor, slopes: Tensor, z: Tensor, gap: Tensor
) -> Tensor:
    """(B, U) cost of every free neuron's relaxation; see :data:`verifier.bab.branching.heuristic.Score`."""
    intercept = -space.lower * space.upper / (space.upper - space.lower)
    cost = -coefficients.clamp(max=0) * intercept + coefficients.clamp(min=0) * intercept * 1e-2
    return torch.where(signs == 0, cost, float("-inf"))


def gap_scores(
    space: SplitSpace, signs: Tensor, coefficients: Tensor, slopes: Tensor, z: Tensor, gap: Tensor
) -> Tensor:
    """(B, U) coefficients times the distance between the chosen plane and the ReLU at z; see
    :data:`verifier.bab.branching.heuristic.Score`."""
    chord = space.upper / (space.upper - space.lower)
    plane = torch.where(coefficients > 0, slopes * z, chord * (z - space.lower))
    return torch.where(signs == 0, (coefficients * (plane - z.clamp(min=0))).abs(), float("-inf"))


HEURISTIC = Heuristic((intercept_scores,))
