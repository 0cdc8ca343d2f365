"""An attack: from the centre of every box to the corner that the gradient points to, and on from there."""

from __future__ import annotations

import torch

from verifier.attack.target import Target


def attack(target: Target) -> None:
    """Offer every corner on the way whose score says that it is a counterexample."""
    objective = target.objective
    case = torch.arange(objective.n_cases, device=objective.device)
    lower, upper = objective.boxes(case)
    hardest = torch.zeros(len(case), device=objective.device)  # the smallest slack alone, not a smoothed one
    x = lower / 2 + upper / 2
    for _ in range(target.config.steps):
        if target.over or not len(case):
            return
        score, _, gradient = objective.gradient(x, case, hardest)
        for point in x[score >= 0].cpu().numpy():
            if target.offer(point) is not None:
                return
        corner = torch.where(gradient > 0, upper, lower)
        if torch.equal(corner, x):
            return
        x = corner
