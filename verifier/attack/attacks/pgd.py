"""The search for a counterexample: samples, rounds of gradient ascent on the most promising cases, linear polishing.

Attacks return candidates, never verdicts: the target replays a candidate, and only it can turn one into a witness.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective
from verifier.attack.polish import polish
from verifier.attack.race import races, whole_work
from verifier.attack.starts import nearest_cases, new_points, prune, sample_boxes
from verifier.attack.target import Target
from verifier.attack.threads import one_thread
from verifier.core.device import facts
from verifier.core.progress import Progress
from verifier.core.result import Witness

_FEW_INPUTS = 24  # up to here sampling is dense and linear models polish the best points
_POLISH_ROWS = 64  # cases with more rows are not polished
_PER_CASE, _PER_CASE_FEW_INPUTS = 8, 32
_MOST_KEPT = 1024  # points that are remembered in all
_POLISHED, _POLISH_STEPS = 48, 24  # points that are polished after a round
_CHEAP_WORK = 1e7  # multiply-adds per step that cost no more than calling the kernels
_FIRST_STEPS = 12  # gradient steps of the first, cheap round
_FEWEST_CASES = 4  # cases that are never dropped from the rounds
_SMALL_SHARE = 0.95  # with few inputs, rounds without gain go on while this much of the effort is left
_ONE_THREAD_COST = 5e5  # multiply-adds of an evaluation up to which one CPU thread does best
_FEWEST_POINTS = 4  # a round with fewer is not worth its calls
_RACING = 1 / 64  # of the effort, for races after the rounds


def attack(target: Target) -> None:
    """:func:`search` as one of the attacks of :mod:`verifier.attack.methods`."""
    search(target)


def search(target: Target) -> Witness | None:
    """Look for an input that satisfies all rows of some case that is open.

    The search also ends by itself, after an effort that the target's ``config.restarts`` and ``config.steps`` scale.
    Same seed and device, deadline not reached: same candidates in the same order. They have the type of the problem's
    witness bounds and lie inside their boxes bit-exactly. ``progress`` receives ``attack``, the best score so far (a
    distance in output units; at least 0: a candidate).

    Returns:
        the first accepted witness, or None.
    """
    objective = target.objective
    if objective.n_cases == 0:
        return None
    context = AttackContext.of(target)
    with one_thread(_few_inputs(objective) and objective.cost <= _ONE_THREAD_COST):
        _run(context, np.concatenate(target.starts) if target.starts else None, target.progress)
    return context.offers.witness


def _few_inputs(objective: Objective) -> bool:
    """Whether sampling is dense and linear models polish the best points."""
    return objective.n_in <= _FEW_INPUTS


def _per_case(objective: Objective) -> int:
    """Points of each case that are remembered."""
    return _PER_CASE_FEW_INPUTS if _few_inputs(objective) else _PER_CASE


def _worthwhile(objective: Objective, number: int) -> float:
    """Gain of the best score, relative to what is missing, below which a round was the last."""
    if _few_inputs(objective):  # polish has converged if there was none at all
        return 0.0 if number < 2 else 1e-6
    return (0.0, 0.005)[number] if number < 2 else 0.05


def _run(context: AttackContext, starts: np.ndarray | None, progress: Progress) -> None:
    """The phases, until there is a witness or nothing left to do."""
    objective = context.objective
    most = max(1, min(_MOST_KEPT, facts(objective.device).attack_moving_entries // max(1, objective.n_in)))
    given = None if starts is None or len(starts) == 0 else nearest_cases(context, starts[:most])
    bank = sample_boxes(context, _per_case(objective), most, dense=_few_inputs(objective))
    if not context.over and bool((bank.score == torch.inf).all()):
        context.offers.flush()  # every case is its whole box, and replays refused it
        return
    bank = _rounds(context, bank, given, progress)
    if not _few_inputs(objective):  # with few, rounds go on for as long
        bank = races(context, bank, given, _RACING * whole_work(context), progress)
    _last_offers(context, bank)


def _rounds(context: AttackContext, bank: Points, given: Points | None, progress: Progress) -> Points:
    """Rounds of ascent: each has more points on fewer cases, until the effort is spent or nothing improves.

    The first moves all given points and the best samples, briefly.
    """
    objective, config, n_cases = context.objective, context.config, context.objective.n_cases
    small, per_case, step_cost = _few_inputs(objective), _per_case(objective), objective.step_cost
    device = facts(objective.device)
    whole = work = whole_work(context)
    cheap = int(_CHEAP_WORK / step_cost)
    limit = min(device.attack_moving_entries // max(1, objective.n_in), int(device.attack_step_work / step_cost))
    number, restarts = 0, 0
    while not context.over and restarts < config.restarts:
        previous = float(bank.score.max())
        fresh = small and n_cases <= _FEWEST_CASES and number % 3 > 0
        steps = min(config.steps, _FIRST_STEPS) if number == 0 or fresh else config.steps
        room = min(max(1, limit), int(work / (step_cost * steps)))
        if number == 0:
            points = prune(bank, max(1, min(per_case, cheap // n_cases)), max(1, room))
            points = points if given is None else Points.join(prune(given, len(given), max(1, limit)), points)
        elif room < _FEWEST_POINTS:
            break
        elif fresh:  # the spread-out best of many samples beat random starts where regions are thin
            points = sample_boxes(context, per_case, room, dense=True)
            restarts += per_case
        else:
            chosen = _promising(bank, max(_FEWEST_CASES, -(-n_cases // 2**number)))
            each = min(config.restarts, max(4**number, cheap // len(chosen)))
            points = new_points(context, bank, chosen, min(room, each * len(chosen)))
            restarts += max(1, len(points) // len(chosen))
        moved, spent = _climb(context, points, steps)
        work -= spent
        bank = prune(Points.join(bank, moved), per_case, _MOST_KEPT)
        context.offers.flush()
        score = float(bank.score.max())
        progress.update(attack=score)
        stuck = score < 0 and score - previous < _worthwhile(objective, number) * abs(score)
        if stuck and not (small and work > _SMALL_SHARE * whole):
            break
        number += 1
    return bank


def _climb(context: AttackContext, points: Points, steps: int) -> tuple[Points, float]:
    """Gradient ascent and, with few inputs, linear polish of the best; the points and the work that it took."""
    objective = context.objective
    moved = ascend(context, points, Style.varied(len(points), context.generator, _few_inputs(objective)), steps)
    work = objective.step_cost * steps * len(points)
    rows = objective.case_rows.shape[1]
    if _few_inputs(objective) and rows <= _POLISH_ROWS and not context.over:
        best = prune(moved, context.config.restarts, max(_POLISHED, context.config.restarts))
        moved = Points.join(moved, polish(context, best, _POLISH_STEPS))
        work += objective.step_cost * _POLISH_STEPS * len(best) * rows
    return moved, work


def _promising(bank: Points, count: int) -> Tensor:
    """The cases with the best scores, best first."""
    return prune(bank, 1, count).case


def _last_offers(context: AttackContext, bank: Points) -> None:
    """Candidates that were held back: the shallow one, then points that miss by no more than rounding."""
    if context.offers.witness is not None or context.offers.flush() or len(bank) == 0:
        return
    best = prune(bank, 2, 8)
    score, y = context.objective.score(best.x, best.case)
    context.offers.consider(best.x, y, best.case, score, near=True)
