"""A branching heuristic: split the neuron whose pre-activation is known least."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.splits import SplitSpace


def rank(space: SplitSpace, signs: Tensor, coefficients: Tensor, slopes: Tensor, z: Tensor, gap: Tensor) -> Tensor:
    """Scores of B domains for U neurons, the largest being split first.

    Args:
        space: the neurons that the root left undecided, with its bounds ``lower`` and ``upper`` (U,).
        signs: (B, U) int8: 0 where a neuron is not split yet, else the side.
        coefficients: (B, U) of the row to improve, on the neurons' outputs.
        slopes: (B, U) of their lower planes.
        z: (B, U) pre-activations where the relaxed network is smallest.
        gap: (B,) bounds minus thresholds, negative.
    """
    width = (space.upper - space.lower).to(coefficients.dtype)
    return torch.where(signs == 0, width, float("-inf"))
