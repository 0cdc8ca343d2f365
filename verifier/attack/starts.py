"""Starting points of attacks: centres, corners and random points of the boxes, and the best of them for every case."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.attack.ascent import Points, diversify, random_signs
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective, inside
from verifier.core.device import facts

# Entries of score tables and of point tables alive at once.
_TABLE_ENTRIES = 1 << 24
_CORNER_INPUTS = 12  # all corners are tried up to this many inputs that can move
_MOST_CASES_OF_A_START = 256


def prune(points: Points, per_case: int, most: int) -> Points:
    """The best ``per_case`` points of every case, at most ``most`` in all: first the best of each case, then the
    second best, and so on."""
    order = torch.argsort(points.score, descending=True, stable=True)
    order = order[torch.argsort(points.case[order], stable=True)]
    case = points.case[order]
    position = torch.arange(len(case), device=case.device)
    new = torch.ones_like(case, dtype=torch.bool)
    new[1:] = case[1:] != case[:-1]
    rank = position - torch.cummax(torch.where(new, position, 0), 0).values
    keep = rank < per_case
    order, rank = order[keep], rank[keep]
    by_score = torch.argsort(points.score[order], descending=True, stable=True)
    order, rank = order[by_score], rank[by_score]
    return points[order[torch.argsort(rank, stable=True)[:most]]]


def sample_boxes(context: AttackContext, per_case: int, most: int, dense: bool) -> Points:
    """Evaluate centre, corners and random points of every box and keep good ones for each case.

    Every point is judged under all cases of its box. The best of each of ``per_case`` groups is kept, random points
    being grouped by the part of the box they lie in: what is kept is spread out. The effort is a function of the
    problem and the device kind alone; at the deadline, boxes not reached are left out.

    Args:
        dense: sample as many points as the budget of work allows; else a handful per box.
    """
    objective, device = context.objective, facts(context.objective.device)
    per_box = torch.bincount(objective.case_box, minlength=objective.n_boxes)
    first = torch.cumsum(per_box, 0) - per_box
    judging = int(per_box.max()) * _entries_per_point(objective) * objective.case_rows.shape[1]
    budget = device.sampling_work / (objective.cost + judging + device.sampling_point_work) / objective.n_boxes
    samples = int(min(max(3, budget), device.sampling_points if dense else 16))
    groups = min(per_case, samples)
    samples -= samples % groups
    block = max(1, _TABLE_ENTRIES // (samples * max(objective.n_in, objective.row_y.shape[1], 1)))
    boxes_at_once = max(1, min(block, objective.batch * 4 // samples))
    kept: list[Points] = []
    for s in objective.batches(objective.n_boxes, boxes_at_once):
        if s.start and context.deadline.expired():
            break
        x = _samples(objective.lower[s], objective.upper[s], samples, groups, context.generator)  # (k, samples, n)
        with torch.no_grad():
            y = torch.cat([objective.outputs(part) for part in x.flatten(0, 1).split(objective.batch)])
        y = y.view(x.shape[0], samples, -1)
        cases_at_once = max(1, _TABLE_ENTRIES // (samples * _entries_per_point(objective)))
        start, stop = int(first[s.start]), int(first[s.stop - 1] + per_box[s.stop - 1])
        for c in range(start, stop, cases_at_once):
            case = torch.arange(c, min(c + cases_at_once, stop), device=x.device)
            kept.append(_best_of(context, x, y, case, s.start, groups))
            if context.offers.witness is not None:
                return kept[-1]
        if len(kept) > 1 and sum(map(len, kept)) * objective.n_in > _TABLE_ENTRIES:
            kept = [prune(Points.join(*kept), per_case, most)]
    return prune(Points.join(*kept), per_case, most)


def _best_of(context: AttackContext, x: Tensor, y: Tensor, case: Tensor, first_box: int, groups: int) -> Points:
    """The best sample of every group for some cases whose boxes are among ``x`` (k, samples, n)."""
    objective = context.objective
    box = objective.case_box[case] - first_box
    samples = x.shape[1]
    flat_case = case.repeat_interleave(samples)
    flat_x = x[box].flatten(0, 1) if objective.row_x is not None else x.new_zeros(len(flat_case), 0)
    score = objective.slacks(flat_x, y[box].flatten(0, 1), flat_case).amin(1).view(len(case), -1, groups)
    score, round_ = score.max(1)
    index = (round_ * groups + torch.arange(groups, device=x.device)).flatten()
    where = box.repeat_interleave(groups), index
    points = Points(x[where], case.repeat_interleave(groups), score.flatten())
    context.offers.consider(points.x, y[where], points.case, points.score)
    return points


def _entries_per_point(objective: Objective) -> int:
    """Numbers that judging one point under one case handles."""
    return max(objective.case_rows.shape[1], objective.row_y.shape[1], min(objective.row_y.shape[0], 64))


def _samples(lower: Tensor, upper: Tensor, count: int, groups: int, generator: torch.Generator) -> Tensor:
    """(k, count, n) points of k boxes: the centre, both extreme corners, corners, and uniform points.

    With few moving inputs and room for them every corner is among the points. Point j belongs to group j mod
    ``groups``; the uniform points of a group share one half of the box in each of the first moving inputs.
    """
    k, n = lower.shape
    lo, up = lower[:, None], upper[:, None]
    free = (lower < upper).any(0).nonzero()[:, 0]
    parts, left = [torch.stack([lower * 0.5 + upper * 0.5, lower, upper], 1)], count - 3
    if len(free) <= _CORNER_INPUTS and 2 ** len(free) <= left:
        side = torch.zeros(2 ** len(free), n, device=lower.device)
        side[:, free] = _bits(torch.arange(len(side), device=lower.device), len(free))
        parts.append(torch.where(side > 0, up, lo))
        left -= len(side)
    elif left > 1:
        parts.append(torch.where(random_signs(lower.new_zeros(k, left // 2, n), generator) > 0, up, lo))
        left -= left // 2
    if left > 0:
        u = torch.rand((k, left, n), generator=generator, dtype=lower.dtype, device=lower.device)
        split = free[: max(groups.bit_length() - 1, 0)]
        group = torch.arange(count - left, count, device=lower.device) % groups
        u[:, :, split] = (u[:, :, split] + _bits(group, len(split))) / 2
        parts.append(lo * (1 - u) + up * u)
    return inside(torch.cat(parts, 1), lo, up)


def _bits(number: Tensor, count: int) -> Tensor:
    """The lowest ``count`` binary digits of integers (m,) as float32 (m, count)."""
    return ((number[:, None] >> torch.arange(count, device=number.device)) & 1).float()


def uniform(lower: Tensor, upper: Tensor, generator: torch.Generator) -> Tensor:
    """A uniform point in each box (P, n)."""
    u = torch.rand(lower.shape, generator=generator, dtype=lower.dtype, device=lower.device)
    return inside(lower * (1 - u) + upper * u, lower, upper)


def nearest_cases(context: AttackContext, starts: np.ndarray) -> Points:
    """Given points moved into the nearest box, with that case of it which is nearest to being satisfied."""
    objective = context.objective
    x = torch.from_numpy(np.ascontiguousarray(starts)).to(objective.device, objective.dtype)
    box = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for i in range(len(x) if objective.n_boxes > 1 else 0):
        outside = torch.maximum(objective.lower - x[i], x[i] - objective.upper).clamp(min=0).amax(1)
        box[i] = torch.nan_to_num(outside, nan=torch.inf).argmin()
    x = inside(x, objective.lower[box], objective.upper[box])
    with torch.no_grad():
        y = torch.cat([objective.outputs(x[s]) for s in objective.batches(len(x))])
    first, last = (torch.searchsorted(objective.case_box, box, right=r) for r in (False, True))
    best_case, best = first, torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for k in range(min(int((last - first).max()), _MOST_CASES_OF_A_START)):
        case = torch.minimum(first + k, last - 1)
        score = objective.slacks(x, y, case).amin(1)
        if context.offers.consider(x, y, case, score):
            break
        best_case, best = torch.where(score > best, case, best_case), torch.maximum(score, best)
    return Points(x, best_case, best)


def new_points(context: AttackContext, bank: Points, cases: Tensor, count: int) -> Points:
    """Starts for a round: the better a case, the more of them; remembered points, shaken, and fresh ones.

    Of every four starts one is a remembered point moved by a tenth of the box, one a random corner, two uniform
    points; half of the latter are output-diversified.
    """
    objective = context.objective
    weight = 1.0 / (1.0 + torch.arange(len(cases), dtype=torch.float64, device=cases.device)) ** 0.5
    edges = torch.cumsum(weight / weight.sum(), 0)
    at = (torch.arange(count, dtype=torch.float64, device=cases.device) + 0.5) / count
    case = cases[torch.searchsorted(edges, at).clamp(max=len(cases) - 1)]
    lower, upper = objective.boxes(case)
    kind = torch.arange(count, device=case.device) % 4
    x = uniform(lower, upper, context.generator)
    corner = torch.where(random_signs(x, context.generator) > 0, upper, lower)
    x = torch.where((kind == 1)[:, None], corner, x)
    x = torch.where((kind == 0)[:, None], shaken(bank, case, x, lower, upper), x)
    odd = (kind == 2).nonzero()[:, 0]
    if len(odd):
        x[odd] = diversify(context, x[odd], case[odd], 4)
    return Points(x, case, torch.full((count,), -torch.inf, dtype=torch.float64, device=case.device))


def shaken(bank: Points, case: Tensor, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """For each case a remembered point of it, in turn, moved a tenth of the way towards ``x`` (P, n)."""
    order = torch.argsort(bank.case, stable=True)
    known = bank.case[order]
    first = torch.searchsorted(known, case)
    count = torch.searchsorted(known, case, right=True) - first
    turn = torch.arange(len(case), device=case.device) // 4
    index = order[(first + turn % count.clamp(min=1)).clamp(max=len(order) - 1)]
    return torch.where((count > 0)[:, None], inside(bank.x[index] * 0.9 + x * 0.1, lower, upper), x)
