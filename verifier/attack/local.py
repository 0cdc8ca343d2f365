"""Cheap refinement of candidates that a search meets on its way, such as the minimisers of its domains' bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.objective import Objective
from verifier.attack.offers import Offers
from verifier.attack.polish import polish
from verifier.core.deadline import Deadline


def improve(
    objective: Objective,
    x: Tensor,
    case: Tensor,
    deadline: Deadline,
    *,
    steps: int = 3,
    linear_steps: int = 0,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    offers: Offers | None = None,
    seed: int = 0,
) -> Points:
    """A few gradient steps, and linear ones if wanted, from every point.

    Args:
        objective: from ``build_objective``; build it once for a whole search.
        x: (P, n_in) points, moved into their boxes first.
        case: (P,) positions in the objective's cases (those of the problem unless some were left out).
        lower, upper: (P, n_in) bounds inside the boxes of the cases, such as the domains' own; default the
            whole boxes.
        steps: gradient steps; 0 only evaluates.
        linear_steps: steps by linear models of all rows after them; worth it for few inputs and cases of several rows.
        offers: judges points that reach a score of 0; its ``witness`` tells.

    Returns:
        the best place of each point and its score (smallest slack over the norm of its row).
    """
    box_lower, box_upper = objective.boxes(case)
    if lower is not None:
        box_lower = torch.maximum(box_lower, lower.to(box_lower.dtype))
    if upper is not None:
        box_upper = torch.minimum(box_upper, upper.to(box_upper.dtype))
    box_upper = torch.maximum(box_lower, box_upper)
    score = torch.full((x.shape[0],), -torch.inf, dtype=torch.float64, device=x.device)
    points = Points(x.to(box_lower.dtype), case, score)
    style = Style.uniform(x.shape[0], x.device)
    generator = torch.Generator(device=x.device).manual_seed(seed)
    box = box_lower, box_upper
    best = ascend(objective, points, style, steps, generator, deadline, offers=offers, box=box)
    if linear_steps == 0 or (offers is not None and offers.witness is not None):
        return best
    polished = polish(objective, best, linear_steps, deadline, offers=offers, box=box)
    better = polished.score > best.score
    return Points(
        torch.where(better[:, None], polished.x, best.x), case, torch.where(better, polished.score, best.score)
    )
