"""The pieces of the attack: objective, pruning, ascent, polish, local refinement."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack.support import problem, random_network, store
from tests.support.device import DEVICE, array
from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.context import AttackContext
from verifier.attack.objective import Objective, build_objective, inside
from verifier.attack.offers import Offers
from verifier.attack.polish import best_step, polish
from verifier.attack.starts import prune
from verifier.attack.threads import one_thread
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline


def _objective(seed: int, rows: int = 3, n_in: int = 6, cases=None, row_x: bool = False):
    rng = np.random.default_rng(seed)
    graph = random_network(rng, [n_in, 12, 12, 4])
    m = max(rows, 1)
    question = problem(
        -np.ones(n_in),
        np.ones(n_in),
        rng.normal(size=(m, 4)),
        rng.normal(size=m),
        [(0, range(rows))] if cases is None else cases,
        row_x=rng.normal(size=(m, n_in)) if row_x else None,
    )
    return graph, question, build_objective(graph, store(graph), question, DEVICE)


def _context(objective: Objective, seed: int) -> AttackContext:
    """A search that accepts no candidate and has all the time."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return AttackContext(objective, AttackConfig(), Deadline(), generator, Offers(lambda x: None, objective))


def _starts(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (count, 6) of the box and their case, the first."""
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    case = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    return x.to(DEVICE), case


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_slacks_agree_with_the_problem_in_both_layouts(seed: int, with_inputs: bool) -> None:
    rng = np.random.default_rng(seed)
    m = 200  # more rows than the small table holds
    cases = [(0, rng.choice(m, size=rng.integers(1, 4), replace=False)) for _ in range(9)]
    for count in (m, 5):
        chosen = cases if count == m else [(0, [r % 5 for r in rows]) for _, rows in cases]
        _graph, question, objective = _objective(seed, rows=count, cases=chosen, row_x=with_inputs)
        x = torch.from_numpy(rng.uniform(-1, 1, (9, 6)).astype(np.float32)).to(DEVICE)
        case = torch.arange(9, device=DEVICE)
        y = objective.outputs(x)
        got = objective.slacks(x, y, case)
        margins = question.margins(array(x), array(y))
        norm = np.sqrt((question.row_y**2).sum(1) + (0 if question.row_x is None else (question.row_x**2).sum(1)))
        for i, (_, rows) in enumerate(chosen):
            want = margins[i, list(rows)] / norm[list(rows)]
            np.testing.assert_allclose(array(got[i, : len(rows)]), want, rtol=1e-9, atol=1e-9)
            assert torch.isinf(got[i, len(rows) :]).all()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.booleans())
def test_gradient_is_that_of_the_smallest_slack(seed: int, with_inputs: bool) -> None:
    _, _, objective = _objective(seed, row_x=with_inputs)
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.uniform(-1, 1, (5, 6))).to(DEVICE)
    case = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    _, _, g = objective.gradient(x, case, torch.zeros(5, device=DEVICE))
    step = 1e-7
    for i in range(6):
        dx = torch.zeros_like(x)
        dx[:, i] = step
        change = (objective.score(x + dx, case)[0] - objective.score(x - dx, case)[0]) / (2 * step)
        close = (change - g[:, i]).abs() < 1e-4 * (1 + change.abs())
        assert close.sum() >= 4  # a kink may lie within the step


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=40), st.integers(1, 3))
def test_prune_keeps_the_best_of_every_case(items: list[tuple[int, float]], per_case: int) -> None:
    case = torch.tensor([c for c, _ in items], device=DEVICE)
    score = torch.tensor([s for _, s in items], dtype=torch.float64, device=DEVICE)
    kept = prune(Points(score[:, None].float(), case, score), per_case, 1000)
    for c in {c for c, _ in items}:
        want = sorted((s for k, s in items if k == c), reverse=True)[:per_case]
        assert sorted(kept.score[kept.case == c].tolist(), reverse=True) == want
    fewer = prune(Points(score[:, None].float(), case, score), per_case, len(set(case.tolist())))
    assert sorted(fewer.case.tolist()) == sorted(set(case.tolist()))


def test_inside_is_exact_and_survives_nan() -> None:
    lower = torch.tensor([0.1, 0.2, -1.0, 0.5], device=DEVICE)
    upper = torch.tensor([0.1, 0.3, 1.0, 0.6], device=DEVICE)
    x = inside(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.55], device=DEVICE), lower, upper)
    assert x.tolist() == [lower[0].item(), upper[1].item(), -1.0, torch.tensor(0.55).item()]


def test_ascent_never_returns_less_than_it_started_with() -> None:
    _, _, objective = _objective(1)
    x, case = _starts(64, 0)
    start, _ = objective.score(x, case)
    moved = ascend(_context(objective, 0), Points(x, case, start), Style.uniform(64, DEVICE), 10)
    assert (moved.score >= start).all() and (moved.score > start).float().mean() > 0.9
    again, _ = objective.score(moved.x, case)
    assert torch.allclose(again, moved.score, atol=1e-6)


def test_polish_beats_the_gradient_on_ridges() -> None:
    better = 0
    for seed in range(6):
        _, _, objective = _objective(seed, rows=5)
        x, case = _starts(8, 0)
        context = _context(objective, 0)
        start, _ = objective.score(x, case)
        moved = ascend(context, Points(x, case, start), Style.uniform(8, DEVICE), 30)
        polished = polish(context, moved, 30)
        assert (polished.score >= moved.score - 1e-6).all()
        better += int((polished.score > moved.score + 1e-6).any())
    assert better >= 4


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6))
def test_linear_model_step_is_near_the_optimum(seed: int, rows: int, n: int) -> None:
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    a, j = rng.normal(size=rows), rng.normal(size=(rows, n))
    low, up = -rng.uniform(size=n), rng.uniform(size=n)
    solved = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.hstack([-j, np.ones((rows, 1))]),
        b_ub=a,
        bounds=[*zip(low, up, strict=True), (None, None)],
    )
    step = array(best_step(*(torch.from_numpy(t).to(DEVICE)[None] for t in (a, j, low, up)))[0])
    assert (low - 1e-12 <= step).all() and (step <= up + 1e-12).all()  # rounding; polish clamps
    size = (np.abs(j) @ np.maximum(-low, up)).max() + np.ptp(a)
    assert (a + j @ step).min() >= -solved.fun - 1e-4 * size


def test_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(RuntimeError), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError
        assert torch.get_num_threads() == 2
        with one_thread(wanted=False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
