"""Steps by linear models for few inputs: networks of ReLUs are piecewise linear, so near a point they are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.attack.ascent import Points
from verifier.attack.objective import Objective, inside
from verifier.attack.offers import Offers
from verifier.core.deadline import Deadline

_GAME_ROUNDS = 96
_SHARES = (1.0, 0.5, 0.2, 0.05)  # of the model's step that are tried


def polish(
    objective: Objective,
    points: Points,
    steps: int,
    deadline: Deadline,
    offers: Offers | None = None,
    box: tuple[Tensor, Tensor] | None = None,
    radius: float = 0.05,
) -> Points:
    """Maximise the smallest slack by repeated linear models of *all* rows inside a trust region, in float64.

    Unlike a gradient step this follows the ridge where several rows tie. The region grows after a full step that
    helped and shrinks otherwise.
    """
    lower, upper = objective.boxes(points.case) if box is None else box
    low, up = lower.double(), upper.double()
    width = up - low
    x = inside(points.x, lower, upper)
    best, case = torch.full_like(points.score, -torch.inf), points.case
    r = torch.full((len(points), 1), radius, dtype=torch.float64, device=x.device)
    for k in range(steps):
        if deadline.expired():
            break
        slack, jacobian = _linear_model(objective, x, case)
        best = torch.maximum(best, slack.amin(1)) if k == 0 else best
        near_low, near_up = torch.maximum(low - x, -r * width), torch.minimum(up - x, r * width)
        move = _best_response(slack, jacobian, near_low, near_up)
        tries = torch.stack([inside((x + share * move).float(), lower, upper) for share in _SHARES], 1)
        flat = tries.flatten(0, 1).double()
        flat_case = case.repeat_interleave(len(_SHARES))
        score, y = objective.score(flat, flat_case)
        if offers is not None and offers.consider(flat.float(), y, flat_case, score):
            break
        score = score.view(len(points), -1)
        top, which = score.max(1)
        better = top > best
        chosen = tries[torch.arange(len(points), device=x.device), which]
        x = torch.where(better[:, None], chosen, x)
        best = torch.where(better, top, best)
        full = better & (which == 0)
        r = torch.where(full[:, None], r * 2, torch.where(better[:, None], r * 0.7, r * 0.3)).clamp(max=1.0)
        if float(r.max()) < 1e-8:
            break
    return Points(x, case, best)


def _linear_model(objective: Objective, x: Tensor, case: Tensor) -> tuple[Tensor, Tensor]:
    """Slacks (Q, S) and their gradients (Q, S, n) at points (Q, n), in float64."""
    rows = objective.case_rows.shape[1]
    flat = x.double().repeat_interleave(rows, 0)
    flat_case = case.repeat_interleave(rows)
    one_hot = torch.eye(rows, dtype=torch.float64, device=x.device).repeat(x.shape[0], 1)
    slack, grad = [], []
    for s in objective.batches(flat.shape[0]):
        leaf = flat[s].requires_grad_()
        with torch.enable_grad():
            y = objective.outputs(leaf)
        slack.append(objective.slacks(leaf.detach(), y.detach(), flat_case[s]))
        grad.append(objective.pull_back(leaf, y, flat_case[s], one_hot[s]))
    diagonal = torch.cat(slack).view(x.shape[0], rows, rows).diagonal(dim1=1, dim2=2)
    return diagonal, torch.cat(grad).view(x.shape[0], rows, -1)


def _best_response(slack: Tensor, jacobian: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """Step (Q, n) in [low, up] that maximises min_s slack_s + jacobian_s . step, nearly.

    A zero-sum game between the step and weights on the rows: the weights follow multiplicative updates, the step
    answers best, and the average of the answers tends to the optimum (Freund, Schapire, 1999).
    """
    zero = torch.zeros_like(low)
    if slack.shape[1] == 1:
        g = jacobian[:, 0]
        return torch.where(g > 0, up, torch.where(g < 0, low, zero))
    reach = torch.maximum(low.abs(), up.abs())
    gain = (jacobian.abs() * reach[:, None]).sum(2)
    padding = ~torch.isfinite(slack)
    level = slack.masked_fill(padding, torch.inf)
    level = level - level.amin(1, keepdim=True)
    # Rows that cannot become the smallest inside the region stay out of the game.
    idle = padding | (level > 2 * gain.masked_fill(padding, 0.0).amax(1, keepdim=True))
    level, gain = level.masked_fill(idle, 0.0), gain.masked_fill(idle, 0.0)
    size = (gain + level).amax(1, keepdim=True).clamp(min=1e-300)
    log = torch.zeros_like(slack).masked_fill(idle, -torch.inf)
    total, weight = zero, 0.0
    for k in range(_GAME_ROUNDS):
        mix = torch.softmax(log, 1)
        g = torch.einsum("qs,qsn->qn", mix, jacobian)
        answer = torch.where(g > 0, up, torch.where(g < 0, low, zero))
        payoff = (level + torch.einsum("qsn,qn->qs", jacobian, answer)) / size
        log = log - 4.0 / (1 + k) ** 0.5 * payoff
        log = log - log.amax(1, keepdim=True)
        share = float(k + 1)
        total, weight = total + share * answer, weight + share
    return total / weight
