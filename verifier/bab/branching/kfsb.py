"""kFSB: try the k best-ranked splits with one cheap bound each and keep the best (De Palma et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def choose(candidates: Tensor, evaluate: Callable[[Tensor, int], Tensor], target: float = 0.0) -> Tensor:
    """Order candidate columns by how much the worse child gains.

    Args:
        candidates: (B, k) columns.
        evaluate: (columns (B,), sign) -> (B,) gap of that child with inherited parameters.
        target: gaps above it count as proved and are not distinguished.

    Returns:
        (B, k) the candidates, best first.
    """
    scores = []
    for j in range(candidates.shape[1]):
        column = candidates[:, j]
        plus = evaluate(column, 1).clamp(max=target)
        minus = evaluate(column, -1).clamp(max=target)
        # The worse child decides how long the subtree lives; the other breaks ties.
        scores.append(torch.minimum(plus, minus) + 0.25 * torch.maximum(plus, minus))
    order = torch.stack(scores, 1).argsort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order)
