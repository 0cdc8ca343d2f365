"""Where attacks begin: centres, corners and random points of the boxes, and the best of them for every case."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.attack.ascent import Points, random_signs
from verifier.attack.objective import Objective, inside
from verifier.attack.offers import Offers
from verifier.core.deadline import Deadline

# Points of one box that are evaluated before any gradient: at most this many, fewer for large networks or many boxes.
_MOST_SAMPLES = {"cpu": 1 << 15, "cuda": 1 << 20}
# Multiply-adds that sampling may cost in all.
_SAMPLING_WORK = {"cpu": 2e9, "cuda": 4e11}
# Entries of score tables and of point tables alive at once.
_TABLE_ENTRIES = 1 << 24
_CORNER_INPUTS = 12  # all corners are tried up to this many inputs that can move


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


def sample_boxes(
    objective: Objective,
    generator: torch.Generator,
    deadline: Deadline,
    offers: Offers,
    per_case: int,
    most: int,
    dense: bool,
) -> Points:
    """Evaluate centre, corners and random points of every box and keep the best for each case.

    Every point is judged under all cases of its box. The effort is a function of the problem and the device kind
    alone; at the deadline, boxes not reached are left out.

    Args:
        dense: sample as many points as the budget of work allows; else a handful per box.
    """
    kind = objective.device.type
    per_box = torch.bincount(objective.case_box, minlength=objective.n_boxes)
    first = torch.cumsum(per_box, 0) - per_box
    judging = int(per_box.max()) * _entries_per_point(objective) * objective.case_rows.shape[1]
    budget = _SAMPLING_WORK[kind] / (objective.cost + judging) / objective.n_boxes
    samples = int(min(max(3, budget), _MOST_SAMPLES[kind] if dense else 16))
    block = max(1, _TABLE_ENTRIES // (samples * max(objective.n_in, objective.row_y.shape[1], 1)))
    boxes_at_once = max(1, min(block, objective.batch * 4 // samples))
    kept: list[Points] = []
    for s in objective.batches(objective.n_boxes, boxes_at_once):
        if s.start and deadline.expired():
            break
        x = _samples(objective.lower[s], objective.upper[s], samples, generator)  # (k, samples, n)
        with torch.no_grad():
            y = torch.cat([objective.outputs(part) for part in x.flatten(0, 1).split(objective.batch)])
        y = y.view(x.shape[0], samples, -1)
        cases_at_once = max(1, _TABLE_ENTRIES // (samples * _entries_per_point(objective)))
        start, stop = int(first[s.start]), int(first[s.stop - 1] + per_box[s.stop - 1])
        for c in range(start, stop, cases_at_once):
            case = torch.arange(c, min(c + cases_at_once, stop), device=x.device)
            kept.append(_best_of(objective, x, y, case, s.start, min(per_case, samples), offers))
            if offers.witness is not None:
                return kept[-1]
        if len(kept) > 1 and sum(map(len, kept)) * objective.n_in > _TABLE_ENTRIES:
            kept = [prune(Points.join(*kept), per_case, most)]
    return prune(Points.join(*kept), per_case, most)


def _best_of(
    objective: Objective, x: Tensor, y: Tensor, case: Tensor, first_box: int, per_case: int, offers: Offers
) -> Points:
    """The best samples of some cases whose boxes are among ``x`` (k, samples, n)."""
    box = objective.case_box[case] - first_box
    samples = x.shape[1]
    flat_case = case.repeat_interleave(samples)
    flat_x = x[box].flatten(0, 1) if objective.row_x is not None else x.new_zeros(len(flat_case), 0)
    score = objective.slacks(flat_x, y[box].flatten(0, 1), flat_case).amin(1).view(len(case), samples)
    score, index = torch.topk(score, per_case, dim=1)
    where = box.repeat_interleave(per_case), index.flatten()
    points = Points(x[where], case.repeat_interleave(per_case), score.flatten())
    offers.consider(points.x, y[where], points.case, points.score)
    return points


def _entries_per_point(objective: Objective) -> int:
    """Numbers that judging one point under one case handles."""
    return max(objective.case_rows.shape[1], objective.row_y.shape[1], min(objective.row_y.shape[0], 64))


def _samples(lower: Tensor, upper: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(k, count, n) points of k boxes: the centre, both extreme corners, then corners and uniform points by halves.

    With few moving inputs and room for them every corner is among the points.
    """
    k, n = lower.shape
    lo, up = lower[:, None], upper[:, None]
    fixed = torch.stack([lower * 0.5 + upper * 0.5, lower, upper], 1)
    free = (lower < upper).any(0).nonzero()[:, 0]
    parts, left = [fixed], count - 3
    if len(free) <= _CORNER_INPUTS and 2 ** len(free) <= left:
        bits = torch.arange(2 ** len(free), device=lower.device)[:, None] >> torch.arange(len(free), device=lo.device)
        side = torch.zeros(len(bits), n, device=lower.device)
        side[:, free] = (bits & 1).to(side.dtype)
        parts.append(torch.where(side[None] > 0, up, lo))
        left -= len(bits)
        corners = 0
    else:
        corners = left // 2
    if corners:
        like = lower.new_zeros(k, corners, n)
        parts.append(torch.where(random_signs(like, generator) > 0, up, lo))
    if left > corners:
        parts.append(uniform(lo, up, (k, left - corners, n), generator))
    return inside(torch.cat(parts, 1), lo, up)


def uniform(lower: Tensor, upper: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform points between bounds that broadcast to ``shape``."""
    u = torch.rand(shape, generator=generator, device=lower.device)
    return inside(lower * (1 - u) + upper * u, lower, upper)
