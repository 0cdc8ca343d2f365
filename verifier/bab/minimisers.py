"""Where the bounds of open domains are smallest: points from which a search for counterexamples sets out."""

from __future__ import annotations

import numpy as np
import torch

from verifier.bab.bounder import Bounder
from verifier.bab.domains import OpenNeuronDomains
from verifier.bab.pool import Pool
from verifier.bounds.alpha import Schedule
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded


def minimisers(
    bounder: Bounder,
    pool: Pool[OpenNeuronDomains],
    schedule: Schedule,
    deadline: Deadline,
    batch: int,
    count: int,
) -> np.ndarray | None:
    """Minimisers of the domains with the worst bounds, the ones that come nearest to being counterexamples.

    A domain with a counterexample stays open, however deep it is; the minimiser of its bound comes nearer to that, the
    more of its neurons are split.

    Args:
        pool: it keeps its domains.
        batch: domains that are looked at.
        count: points, at most.

    Returns:
        (k, n_in), different ones, best first; None without open domains or time.
    """
    if not pool.count or deadline.expired():
        return None
    worst = torch.topk(pool.gaps, min(batch, pool.count), largest=False).indices
    try:
        found = bounder.optimise(pool.domains[worst].plain, schedule, deadline)
    except DeadlineExceeded:
        return None
    slack, row = found.slack.max(1)
    order = torch.argsort(slack, descending=True, stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = slack[order[1:]] != slack[order[:-1]]  # equal points have equal slacks
    best = order[new][:count]
    points = found.points(best * found.slack.shape[1] + row[best])
    return points.flatten(1).cpu().numpy()
