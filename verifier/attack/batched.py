"""A short attack on many labelled inputs at once: one ascent for each, in boxes of their own.

Projected gradient descent by signs (Madry et al., 2018) on the margin of the label over the best other class. What it
finds are candidates, as everywhere in this folder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.attack.surrogate import guided
from verifier.core.deadline import Deadline
from verifier.core.handles import WeightStore
from verifier.graph.graph import Graph

_STEPS = 20
# First step as a share of a box's half-width; it shrinks to a tenth of that.
_FIRST_STEP = 0.5


def margin_candidates(
    graph: Graph, store: WeightStore, box: tuple[Tensor, Tensor], labels: Tensor, seed: int, deadline: Deadline
) -> tuple[Tensor, Tensor]:
    """For every box the point with the smallest margin that was met, and that margin.

    Args:
        box: lower and upper (P, n_in), in the type in which the graph is evaluated, on its device.
        labels: (P,), classes that are to keep the largest output.

    Returns:
        (P, n_in) and (P,); negative margins are candidates.

    Raises:
        DeadlineExceeded: between two steps.
    """
    low, up = box
    followed = guided(graph)
    random = torch.Generator().manual_seed(seed)
    half = (up - low) / 2
    best, least = low + half, torch.full(labels.shape, torch.inf, dtype=low.dtype, device=low.device)
    for start in (low + half, torch.lerp(low, up, torch.rand(low.shape, generator=random).to(low))):
        x = start
        for step in range(_STEPS + 1):
            deadline.check("the attack")
            x = x.detach().requires_grad_()
            margin = _margins(followed, store, x, labels)
            better = margin.detach() < least
            best = torch.where(better[:, None], x.detach(), best)
            least = torch.where(better, margin.detach(), least)
            if step == _STEPS:
                break
            (gradient,) = torch.autograd.grad(margin.sum(), x)
            size = _FIRST_STEP * (0.1 + 0.9 * (1 - step / _STEPS))
            x = torch.clamp(x.detach() - size * half * gradient.nan_to_num().sign(), low, up)
    return best, least


def _margins(graph: Graph, store: WeightStore, x: Tensor, labels: Tensor) -> Tensor:
    """(P,): the label's output minus the largest other one."""
    with torch.enable_grad():
        found = graph.forward(x.reshape(-1, *graph.input_shape), store)
    assert isinstance(found, Tensor)
    y = found.flatten(1)
    own = torch.nn.functional.one_hot(labels, y.shape[1]).bool()
    return y[own] - y.masked_fill(own, -torch.inf).amax(1)
