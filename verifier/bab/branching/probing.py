"""Probing: which sides of a split are likely to be refuted at once, so that the neuron's phase is known for nothing.

Where one side of a split is refuted, the other one covers the domain: the neuron is decided without a second child. In
SAT solvers this is failed literal probing, and the phase that follows is a unit clause. A first guess at who is worth
a bound of its own costs nothing: with the walk that bounded the domain, h_k the relaxed output and z_k the
pre-activation of column k at the minimiser, and a_k its coefficient, the side z_k >= 0 gains at most a_k (z_k - h_k),
and the side z_k <= 0 at most -a_k h_k, if the minimiser and all other planes stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bab.branching.heuristic import Neurons
from verifier.bab.splits import SplitSpace

# A side is a candidate when its first-order gain is this share of what the proof lacks; its multiplier, or the next
# coefficients, may give the rest.
_NEAR = 0.7
# The phase that follows has to be worth its certificate: this share of what is lacking, to first order.
_WORTH = 0.02
# Multiplier that a side is tried with, as a share of the column's coefficient.
_PUSH = 0.3


def sides(space: SplitSpace, neurons: Neurons, count: int) -> tuple[Tensor, Tensor]:
    """The sides that are nearest to being refuted.

    Args:
        count: most sides per domain.

    Returns:
        (B, k) sides, 2 u for z_u >= 0 and 2 u + 1 for z_u <= 0, or -1 for none, most promising first; and (B, k)
        multipliers to try them with.
    """
    signs, a, slopes, z, gap = neurons
    if not count:
        return signs.new_empty((signs.shape[0], 0), dtype=torch.int64), a[:, :0]
    chord = space.upper / (space.upper - space.lower)
    h = torch.where(a > 0, slopes * z, chord * (z - space.lower))
    gains = torch.stack((a * (z - h), -a * h), -1)
    lack = -gap[:, None, None]
    fits = (signs == 0)[..., None] & (gains > _NEAR * lack) & (gains.flip(-1) > _WORTH * lack)
    gains = torch.where(fits, gains, float("-inf")).flatten(1)
    best = torch.topk(gains, min(count, gains.shape[1]), dim=1)
    found = torch.where(torch.isfinite(best.values), best.indices, -1)
    return found, _PUSH * a.abs().gather(1, best.indices // 2)


def refuted(candidates: Tensor, gaps: Tensor) -> Tensor:
    """(B, k) the side of every candidate that a trial refutes, as in :func:`sides`; -1 where it is none or both.

    Args:
        candidates: (B, k) columns.
        gaps: (2, B, k) of both children.
    """
    plus, minus = gaps > 0
    return torch.where(plus ^ minus, 2 * candidates + minus.to(candidates.dtype), -1)
