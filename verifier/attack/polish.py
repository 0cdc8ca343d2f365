"""Steps by linear models, for few inputs: ReLU networks are piecewise linear, so near a point the model is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.attack.ascent import Points
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective, inside
from verifier.attack.threads import one_thread

_INTERIOR_STEPS = 12
_CENTRING = 0.1  # of the present complementarity that an interior-point step aims at
_RADII = (0.05, 0.5)  # of the first regions, as shares of the box
_SHARES = (1.0, 0.5, 0.2, 0.05)  # of the model's step that are tried


def polish(context: AttackContext, points: Points, steps: int) -> Points:
    """Maximise the smallest slack by repeated linear models of *all* rows inside a trust region, in float64.

    Unlike a gradient step this follows the ridge where several rows tie. The region grows after a full step that
    helped and shrinks otherwise; its first radii take turns over the points.
    """
    objective = context.objective
    lower, upper = objective.boxes(points.case)
    low, up = lower.double(), upper.double()
    width = up - low
    x = inside(points.x, lower, upper)
    best, case = torch.full_like(points.score, -torch.inf), points.case
    r = torch.tensor(_RADII, dtype=torch.float64, device=x.device).repeat(len(points))[: len(points), None]
    for k in range(steps):
        if context.deadline.expired():
            break
        slack, jacobian = _linear_model(objective, x, case)
        best = torch.maximum(best, slack.amin(1)) if k == 0 else best
        near_low, near_up = torch.maximum(low - x, -r * width), torch.minimum(up - x, r * width)
        with one_thread():
            move = best_step(slack, jacobian, near_low, near_up)
        tries = torch.stack([inside((x + share * move).to(lower.dtype), lower, upper) for share in _SHARES], 1)
        flat = tries.flatten(0, 1).double()
        flat_case = case.repeat_interleave(len(_SHARES))
        score, y = objective.score(flat, flat_case)
        if context.offers.consider(flat.to(lower.dtype), y, flat_case, score):
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


def best_step(slack: Tensor, jacobian: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """Step (Q, n) in [low, up] that maximises min_s slack_s + jacobian_s . step.

    One row has a closed form. Several are a linear program with n + 1 unknowns, solved for all points at once by a
    primal-dual interior-point method (Wright, Primal-Dual Interior-Point Methods, 1997, ch. 1 and 5).
    """
    if slack.shape[1] == 1:
        g = jacobian[:, 0]
        return torch.where(g > 0, up, torch.where(g < 0, low, torch.zeros_like(low)))
    # In v = (step - middle) / half the region is [-1, 1]^n; rows are divided by their largest reach.
    middle, half = (up + low) / 2, (up - low) / 2
    rows = jacobian * half[:, None]
    level = slack + torch.einsum("qsn,qn->qs", jacobian, middle)
    padding = ~torch.isfinite(level)
    size = rows.abs().sum(2).masked_fill(padding, 0.0).amax(1, keepdim=True).clamp(min=1e-300)
    level = level.masked_fill(padding, torch.inf)
    level = ((level - level.amin(1, keepdim=True)) / size).clamp(max=4.0)
    rows = torch.where(padding[:, :, None], 0.0, rows / size[:, :, None])
    return middle + half * _interior_point(level, rows)


def _interior_point(level: Tensor, rows: Tensor) -> Tensor:
    """argmax over v in [-1, 1]^n of min_s level_s + rows_s . v, nearly: (Q, S), (Q, S, n) to (Q, n).

    Constraints G z <= h on z = (v, t) in the order t <= level + rows . v, v <= 1, -v <= 1; slacks s and multipliers u
    stay positive, and the iterates feasible.
    """
    q, n = rows.shape[0], rows.shape[2]
    unit = torch.eye(n, n + 1, dtype=rows.dtype, device=rows.device).expand(q, n, n + 1)
    g = torch.cat([torch.cat([-rows, torch.ones_like(level)[:, :, None]], 2), unit, -unit], 1)  # (Q, m, n + 1)
    gt = g.transpose(1, 2)
    z = rows.new_zeros(q, n + 1)
    z[:, n] = -1.0
    s = torch.cat([level + 1, rows.new_ones(q, 2 * n)], 1)
    u = 1.0 / s
    cost = rows.new_zeros(n + 1)
    cost[n] = -1.0
    ridge = 1e-12 * torch.eye(n + 1, dtype=rows.dtype, device=rows.device)
    for _ in range(_INTERIOR_STEPS):
        centre = _CENTRING * (s * u).mean(1, keepdim=True)
        complement = centre / s - u
        matrix = gt @ (g * (u / s)[:, :, None]) + ridge
        right = -cost - (gt @ (u + complement)[:, :, None])[:, :, 0]
        dz = torch.linalg.solve_ex(matrix, right)[0]
        ds = -(g @ dz[:, :, None])[:, :, 0]
        du = complement - u * ds / s
        reach = torch.cat([torch.where(ds < 0, -s / ds, torch.inf), torch.where(du < 0, -u / du, torch.inf)], 1)
        share = (0.95 * reach.amin(1, keepdim=True)).clamp(max=1.0)
        share = torch.where(torch.isfinite(dz).all(1, keepdim=True), share, 0.0)
        z, s, u = (a + share * torch.nan_to_num(da) for a, da in ((z, dz), (s, ds), (u, du)))
    return z[:, :n].clamp(-1.0, 1.0)
