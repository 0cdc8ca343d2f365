"""Points at which a float32 run may behave in a way that the network in real arithmetic cannot: where bounds are
smallest, their neighbourhood, corners, and random points. The errors of a run are noise, so no gradient leads to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from verifier.attack.target import Target
from verifier.core.problem import Problem

# Points of each kind and box, and boxes that are looked at.
_EACH, _BOXES = 48, 16
# Parts of a box's width by which points are moved.
_NEAR = (1e-6, 1e-3, 1e-1)


def attack(target: Target) -> None:
    """Offer all of them."""
    for x in run_candidates(target.problem, target.starts, target.seed):
        if target.deadline.expired() or target.offer(x) is not None:
            break


def run_candidates(problem: Problem, starts: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Points (n_in,) to be replayed, the most promising kinds first; equal seeds give equal points.

    Args:
        starts: (k, n_in) each, points where bounds are smallest.
    """
    rng = np.random.default_rng(seed)
    boxes = [(low.astype(np.float64), up.astype(np.float64)) for low, up in _boxes(problem)]
    known = [x.astype(np.float64) for part in starts for x in part[:_EACH]]
    yield from known
    for low, up in boxes:
        for x in known:
            for share in _NEAR:
                moved = x + (up - low) * share * rng.uniform(-1.0, 1.0, low.shape)
                yield np.clip(moved, low, up)
        yield low + (up - low) / 2
        for _ in range(_EACH):
            yield np.where(rng.random(low.shape) < 0.5, low, up)
        for _ in range(_EACH):
            yield low + (up - low) * rng.random(low.shape)


def _boxes(problem: Problem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(min(_BOXES, problem.witness_lower.shape[0])):
        yield problem.witness_lower[k], problem.witness_upper[k]
