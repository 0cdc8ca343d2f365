"""kFSB: try the k best-ranked splits with one cheap bound each and keep the best.

De Palma et al., 2021 (arXiv 2104.06718).
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.branching import babsr
from verifier.bab.branching.heuristic import Heuristic

HEURISTIC = Heuristic((babsr.intercept_scores, babsr.gap_scores), tried=True)


def choose(candidates: Tensor, gaps: Tensor, target: float = 0.0) -> Tensor:
    """Order candidate columns by how much the worse child gains.

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
