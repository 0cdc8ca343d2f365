"""Races: many short ascents, of which only the best go on, for counterexamples that few starting points lead to.

Successive halving (Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter Optimization*,
AISTATS 2016): a run that is far behind after its first steps seldom wins.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective, inside
from verifier.attack.starts import nearest_cases, new_points, prune, uniform
from verifier.attack.target import Target
from verifier.core.device import facts
from verifier.core.progress import Progress
from verifier.core.result import Witness

# Of every lap the share of the points that begin it, and of the steps that they move.
_LAPS = ((1.0, 1 / 3), (1 / 4, 1 / 3), (1 / 16, 1.0))
# Later laps begin with so much of the usual step, as their points have come near a maximum.
_SHORTER = 0.3
# Points of a race, at least: some reach the last lap.
_FEWEST = 64
_MOST_CASES = 4
_KEPT, _MOST_KEPT = 32, 1024  # points of a case, and in all, that are remembered
_FAR = 0.3  # given points move by at most this share of the way to a random point of the box


def race(context: AttackContext, points: Points, steps: int) -> tuple[Points, float]:
    """Move points in laps; the best that those of the last lap have seen, and the multiply-adds that it took."""
    objective, work = context.objective, 0.0
    count, cases = len(points), max(1, int(torch.unique(points.case).shape[0]))
    for number, (share, part) in enumerate(_LAPS):
        if number:
            left = max(1, int(count * share))
            points = prune(points, -(-left // cases), left)
        if context.over:
            break
        lap = max(1, int(steps * part))
        points = ascend(context, points, _style(context, points, _SHORTER if number else 1.0), lap)
        work += objective.step_cost * len(points) * lap
    return points, work


def races(context: AttackContext, bank: Points, given: Points | None, work: float, progress: Progress) -> Points:
    """Races on the most promising cases until the work is spent.

    Args:
        bank: good points so far; half of all starts are near given ones instead, where there are any.
        work: multiply-adds.

    Returns:
        the bank with what was found.
    """
    steps = context.config.steps
    objective, each = context.objective, context.objective.step_cost * sum(a * b for a, b in _LAPS) * steps
    limit = min(facts(objective.device).attack_moving_entries // max(1, objective.n_in), _most(objective))
    while not context.over and work >= _FEWEST * each:
        points = _starts(context, bank, given, int(min(work / each, max(limit, _FEWEST))))
        moved, spent = race(context, points, steps)
        context.offers.flush()
        bank = prune(Points.join(bank, moved), _KEPT, _MOST_KEPT)
        progress.update(attack=float(bank.score.max()))
        work -= max(spent, each)
    return bank


def hunt(target: Target, share: float) -> Witness | None:
    """Races from the target's starts, which must not be empty, with a share of a whole attack's work."""
    objective = target.objective
    if objective.n_cases == 0:
        return None
    context = AttackContext.of(target)
    given = nearest_cases(context, np.concatenate(target.starts))
    if not context.over:
        races(context, given, given, share * whole_work(context), target.progress)
    return context.offers.witness


def whole_work(context: AttackContext) -> float:
    """Multiply-adds of a whole attack, which the configured restarts and steps scale."""
    config, default = context.config, type(context.config)()
    scale = config.restarts / default.restarts * config.steps / default.steps
    return facts(context.objective.device).attack_work * scale


def _most(objective: Objective) -> int:
    """Points that move together, by the work of one step."""
    return max(1, int(facts(objective.device).attack_step_work / objective.step_cost))


def _style(context: AttackContext, points: Points, share: float) -> Style:
    """Variety of all kinds; where boxes are wider in some inputs than in others, a third of the steps is absolute."""
    style = Style.varied(len(points), context.generator, slopes=True)
    u = torch.rand(len(points), generator=context.generator, device=points.x.device)
    lower, upper = context.objective.boxes(points.case)
    width = upper - lower
    even = bool((torch.where(width > 0, width, width.amax(1, keepdim=True)) == width.amax(1, keepdim=True)).all())
    return Style(style.step * share, style.power, style.temperature, None if even else u < 1 / 3)


def _starts(context: AttackContext, bank: Points, given: Points | None, count: int) -> Points:
    """Given points and their neighbours, and points as those of any round."""
    near = 0 if given is None else count // 2
    parts = [new_points(context, bank, prune(bank, 1, _MOST_CASES).case, count - near)]
    if given is not None and near:
        parts.append(_near(context, given, near))
    return Points.join(*parts)


def _near(context: AttackContext, given: Points, count: int) -> Points:
    """The given points in turn, moved towards random ones; the first time around as they are."""
    index = torch.arange(count, device=given.x.device)
    points = given[index % len(given)]
    lower, upper = context.objective.boxes(points.case)
    move = _FAR * torch.rand(count, 1, generator=context.generator, device=index.device).to(points.x.dtype)
    move = torch.where(index[:, None] < len(given), torch.zeros_like(move), move)
    x: Tensor = points.x + move * (uniform(lower, upper, context.generator) - points.x)
    return Points(inside(x, lower, upper), points.case, torch.full_like(points.score, -torch.inf))
