"""The search for a counterexample: samples, rounds of gradient ascent on the most promising cases, linear polishing.

Attacks return candidates, never verdicts: ``accept`` replays a candidate, and only it can turn one into a witness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verifier.attack.ascent import Points, Style, ascend, diversify, random_signs
from verifier.attack.objective import Objective, build_objective, inside
from verifier.attack.offers import Accept, Offers
from verifier.attack.polish import polish
from verifier.attack.starts import prune, sample_boxes, uniform
from verifier.attack.target import Target
from verifier.attack.threads import one_thread
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.handles import WeightStore
from verifier.core.problem import Problem
from verifier.core.progress import Progress
from verifier.core.result import Witness
from verifier.graph.graph import Graph

FEW_INPUTS = 24  # up to here sampling is dense and linear models polish the best points
_POLISH_ROWS = 64  # cases with more rows are not polished
_PER_CASE, _PER_CASE_FEW_INPUTS = 8, 32  # points of each case that are remembered
_MOST_KEPT = 1024  # points that are remembered in all
_POLISHED, _POLISH_STEPS = 48, 24  # points that are polished after a round
_CHEAP_WORK = 1e7  # multiply-adds per step that cost no more than calling the kernels
_FIRST_STEPS = 12  # gradient steps of the first, cheap round
_FEWEST_CASES = 4  # cases that are never dropped from the rounds
# Restarts and steps scale the work of a whole search.
_DEFAULT_RESTARTS, _DEFAULT_STEPS = 100, 60
_SMALL_SHARE = 0.95  # with few inputs, rounds without gain go on while this much of the effort is left
_ONE_THREAD_COST = 5e5  # multiply-adds of an evaluation up to which one CPU thread does best
_FEWEST_POINTS = 4  # a round with fewer is not worth its calls
_MOST_CASES_OF_A_START = 256


@dataclass(frozen=True)
class _Search:
    """What the phases of one search share."""

    objective: Objective
    config: AttackConfig
    deadline: Deadline
    generator: torch.Generator
    offers: Offers

    @property
    def over(self) -> bool:
        return self.offers.witness is not None or self.deadline.expired()

    @property
    def small(self) -> bool:
        return self.objective.n_in <= FEW_INPUTS

    @property
    def step_cost(self) -> float:
        """Multiply-adds of a gradient step of one point."""
        return 3 * self.objective.cost

    def worthwhile(self, number: int) -> float:
        """Gain of the best score, relative to what is missing, below which a round was the last."""
        if self.small:  # polish has converged if there was none at all
            return 0.0 if number < 2 else 1e-6
        return (0.0, 0.005)[number] if number < 2 else 0.05

    @property
    def per_case(self) -> int:
        return _PER_CASE_FEW_INPUTS if self.small else _PER_CASE


def attack(target: Target) -> None:
    """:func:`search` as one of the attacks of :mod:`verifier.attack.methods`."""
    search(
        target.graph,
        target.store,
        target.problem,
        target.config,
        target.deadline,
        device=target.device,
        seed=target.seed,
        accept=target.offer,
        cases=target.cases,
        starts=np.concatenate(target.starts) if target.starts else None,
        progress=target.progress,
    )


def search(
    graph: Graph,
    store: WeightStore,
    problem: Problem,
    config: AttackConfig,
    deadline: Deadline,
    *,
    device: torch.device,
    seed: int,
    accept: Accept,
    cases: Sequence[int] | None = None,
    starts: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Witness | None:
    """Look for an input that satisfies all rows of some case.

    Args:
        deadline: when to stop; the search also ends by itself, after an effort that ``config.restarts`` and
            ``config.steps`` scale. Same seed and device, deadline not reached: same candidates in the same order.
        accept: replays a candidate (n_in,), in the type of the problem's witness bounds and inside its box bit-exactly,
            and returns a witness or None.
        cases: the cases to attack; default all.
        starts: (P, n_in) points to begin from, such as minimisers of bounds; moved into the boxes.
        progress: receives ``attack``, the best score so far (a distance in output units; at least 0: a candidate).

    Returns:
        the first accepted witness, or None.
    """
    objective = build_objective(graph, store, problem, device, cases)
    if objective.n_cases == 0:
        return None
    generator = torch.Generator(device=device).manual_seed(seed % (1 << 63))
    offers = Offers(accept, objective)
    run = _Search(objective, config, deadline, generator, offers)
    with one_thread(run.small and objective.cost <= _ONE_THREAD_COST):
        _run(run, starts, progress)
    return offers.witness


def _run(run: _Search, starts: np.ndarray | None, progress: Progress | None) -> None:
    """The phases, until there is a witness or nothing left to do."""
    objective = run.objective
    most = max(1, min(_MOST_KEPT, facts(objective.device).attack_moving_entries // max(1, objective.n_in)))
    given = None if starts is None or len(starts) == 0 else _given(run, starts[:most])
    bank = sample_boxes(objective, run.generator, run.deadline, run.offers, run.per_case, most, dense=run.small)
    if not run.over and bool((bank.score == torch.inf).all()):
        run.offers.flush()  # every case is its whole box, and replays refused it
        return
    bank = _rounds(run, bank, given, progress)
    _last_offers(run, bank)


def _given(run: _Search, starts: np.ndarray) -> Points:
    """Given points moved into the nearest box, with that case of it which is nearest to being satisfied."""
    objective = run.objective
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
        if run.offers.consider(x, y, case, score):
            break
        best_case, best = torch.where(score > best, case, best_case), torch.maximum(score, best)
    return Points(x, best_case, best)


def _rounds(run: _Search, bank: Points, given: Points | None, progress: Progress | None) -> Points:
    """Rounds of ascent: each has more points on fewer cases, until the effort is spent or nothing improves.

    The first moves all given points and the best samples, briefly.
    """
    device, config, n_cases = facts(run.objective.device), run.config, run.objective.n_cases
    whole = work = device.attack_work * config.restarts / _DEFAULT_RESTARTS * config.steps / _DEFAULT_STEPS
    cheap = int(_CHEAP_WORK / run.step_cost)
    limit = min(
        device.attack_moving_entries // max(1, run.objective.n_in), int(device.attack_step_work / run.step_cost)
    )
    number, restarts = 0, 0
    while not run.over and restarts < config.restarts:
        previous = float(bank.score.max())
        fresh = run.small and n_cases <= _FEWEST_CASES and number % 3 > 0
        steps = min(config.steps, _FIRST_STEPS) if number == 0 or fresh else config.steps
        room = min(max(1, limit), int(work / (run.step_cost * steps)))
        if number == 0:
            points = prune(bank, max(1, min(run.per_case, cheap // n_cases)), max(1, room))
            points = points if given is None else Points.join(prune(given, len(given), max(1, limit)), points)
        elif room < _FEWEST_POINTS:
            break
        elif fresh:  # the spread-out best of many samples beat random starts where regions are thin
            points = sample_boxes(
                run.objective, run.generator, run.deadline, run.offers, run.per_case, room, dense=True
            )
            restarts += run.per_case
        else:
            chosen = _promising(bank, max(_FEWEST_CASES, -(-n_cases // 2**number)))
            each = min(config.restarts, max(4**number, cheap // len(chosen)))
            points = _new_points(run, bank, chosen, min(room, each * len(chosen)))
            restarts += max(1, len(points) // len(chosen))
        moved, spent = _climb(run, points, steps)
        work -= spent
        bank = prune(Points.join(bank, moved), run.per_case, _MOST_KEPT)
        run.offers.flush()
        score = float(bank.score.max())
        if progress is not None:
            progress.update(attack=score)
        stuck = score < 0 and score - previous < run.worthwhile(number) * abs(score)
        if stuck and not (run.small and work > _SMALL_SHARE * whole):
            break
        number += 1
    return bank


def _climb(run: _Search, points: Points, steps: int) -> tuple[Points, float]:
    """Gradient ascent and, with few inputs, linear polish of the best; the points and the work that it took."""
    objective = run.objective
    moved = ascend(objective, points, _style(run, len(points)), steps, run.generator, run.deadline, run.offers)
    work = run.step_cost * steps * len(points)
    rows = objective.case_rows.shape[1]
    if run.small and rows <= _POLISH_ROWS and not run.over:
        best = prune(moved, run.config.restarts, max(_POLISHED, run.config.restarts))
        moved = Points.join(moved, polish(objective, best, _POLISH_STEPS, run.deadline, run.offers))
        work += run.step_cost * _POLISH_STEPS * len(best) * rows
    return moved, work


def _promising(bank: Points, count: int) -> Tensor:
    """The cases with the best scores, best first."""
    return prune(bank, 1, count).case


def _new_points(run: _Search, bank: Points, cases: Tensor, count: int) -> Points:
    """Starts for a round: the better a case, the more of them; remembered points, shaken, and fresh ones.

    Of every four starts one is a remembered point moved by a tenth of the box, one a random corner, two uniform
    points; half of the latter are output-diversified.
    """
    objective = run.objective
    weight = 1.0 / (1.0 + torch.arange(len(cases), dtype=torch.float64, device=cases.device)) ** 0.5
    edges = torch.cumsum(weight / weight.sum(), 0)
    at = (torch.arange(count, dtype=torch.float64, device=cases.device) + 0.5) / count
    case = cases[torch.searchsorted(edges, at).clamp(max=len(cases) - 1)]
    lower, upper = objective.boxes(case)
    style = torch.arange(count, device=case.device) % 4
    x = uniform(lower, upper, run.generator)
    corner = torch.where(random_signs(x, run.generator) > 0, upper, lower)
    x = torch.where((style == 1)[:, None], corner, x)
    x = torch.where((style == 0)[:, None], _shaken(run, bank, case, x, lower, upper), x)
    odd = (style == 2).nonzero()[:, 0]
    if len(odd):
        x[odd] = diversify(objective, x[odd], case[odd], 4, run.generator, run.deadline)
    return Points(x, case, torch.full((count,), -torch.inf, dtype=torch.float64, device=case.device))


def _shaken(run: _Search, bank: Points, case: Tensor, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """For each case a remembered point of it, in turn, moved a tenth of the way towards ``x`` (P, n)."""
    order = torch.argsort(bank.case, stable=True)
    known = bank.case[order]
    first = torch.searchsorted(known, case)
    count = torch.searchsorted(known, case, right=True) - first
    turn = torch.arange(len(case), device=case.device) // 4
    index = order[(first + turn % count.clamp(min=1)).clamp(max=len(order) - 1)]
    return torch.where((count > 0)[:, None], inside(bank.x[index] * 0.9 + x * 0.1, lower, upper), x)


def _style(run: _Search, count: int) -> Style:
    """Variety: step sizes from half to a sixteenth, hard and soft minima; with few inputs also true gradient steps."""
    device = run.objective.device
    u = torch.rand(3, count, generator=run.generator, device=device)
    temperature = torch.where(u[1] < 0.4, 0.0, 0.5 * u[1] ** 2)
    power = torch.where(u[2] < 0.33, 0.0, torch.where(u[2] < 0.66, 0.5, 1.0)) if run.small else torch.zeros_like(u[2])
    return Style(step=0.5 ** (1 + 3 * u[0]), power=power, temperature=temperature)


def _last_offers(run: _Search, bank: Points) -> None:
    """Candidates that were held back: the shallow one, then points that miss by no more than rounding."""
    if run.offers.witness is not None or run.offers.flush() or len(bank) == 0:
        return
    best = prune(bank, 2, 8)
    score, y = run.objective.score(best.x, best.case)
    run.offers.consider(best.x, y, best.case, score, near=True)
