"""The search finds planted counterexamples, keeps to its boxes, its clock and its seed."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack.support import Judge, evaluate, network, problem, random_network, target
from verifier.attack.attacks.pgd import search
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.parallel.single import SingleBackend


def attack(graph: Graph, question: Problem, judge=None, seconds: float = 20.0, **changes):
    judge = Judge(graph, question) if judge is None else judge
    return search(target(graph, question, judge, deadline=Deadline(seconds), **changes)), judge


def planted(rng: np.random.Generator, n_in: int, rows: int, room: float) -> tuple[Graph, Problem]:
    """A network and one case that a known point of the box satisfies with ``room`` of each row's range to spare."""
    graph = random_network(rng, [n_in, 24, 24, 4])
    lower = rng.uniform(-1, 0, n_in).astype(np.float32)
    upper = (lower + rng.uniform(0.2, 1.5, n_in)).astype(np.float32)
    x = (lower + (upper - lower) * rng.uniform(size=n_in)).astype(np.float32)
    c = rng.normal(size=(rows, 4))
    sample = evaluate(graph, rng.uniform(lower, upper, (512, n_in)).astype(np.float32)) @ c.T
    at = (evaluate(graph, x) @ c.T)[0]
    d = at + room * (sample.max(0) - sample.min(0))
    return graph, problem(lower, upper, c, d, [(0, range(rows))])


@pytest.mark.parametrize("n_in", [1, 3, 8, 40])
@pytest.mark.parametrize("rows", [1, 3])
def test_planted_counterexamples_are_found(n_in: int, rows: int) -> None:
    rng = np.random.default_rng(100 * n_in + rows)
    for _ in range(4):
        graph, question = planted(rng, n_in, rows, 0.02)
        found, _ = attack(graph, question)
        assert found is not None


def test_thin_region_between_rows_is_found() -> None:
    """An equality up to 1e-4 on two outputs at once: a speck of the box that gradients alone zigzag around."""
    rng = np.random.default_rng(7)
    for _ in range(4):
        graph = random_network(rng, [4, 20, 20, 2])
        middle = evaluate(graph, rng.uniform(-1, 1, 4).astype(np.float32))[0]
        rows = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], float)
        question = problem(-np.ones(4), np.ones(4), rows, rows @ middle + 1e-4, [(0, range(4))])
        found, _ = attack(graph, question)
        assert found is not None


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_candidates_lie_in_their_boxes_bit_exactly(seed: int, n_in: int) -> None:
    rng = np.random.default_rng(seed)
    graph, question = planted(rng, n_in, 2, 0.3)
    upper = np.where(rng.uniform(size=n_in) < 0.4, question.lower[0], question.upper[0])
    question = problem(question.lower, upper, question.row_y, question.row_d + 1.0, [(0, (0,)), (0, (1,))])
    seen: list[np.ndarray] = []

    def refuse(x: np.ndarray) -> Witness | None:
        seen.append(x)
        return None

    config = AttackConfig(restarts=4, steps=5)
    starts = rng.uniform(-9, 9, (3, n_in)).astype(np.float32)
    starts[0] = np.nan
    found, _ = attack(graph, question, judge=refuse, config=config, starts=(starts,))
    assert found is None
    for x in seen:
        assert ((question.witness_lower[0] <= x) & (x <= question.witness_upper[0])).all()


def test_same_seed_same_candidates() -> None:
    rng = np.random.default_rng(3)
    graph, question = planted(rng, 30, 2, -0.1)
    runs = []
    for seed in (5, 5, 6):
        seen: list[np.ndarray] = []
        attack(graph, question, judge=lambda x, seen=seen: seen.append(x), seed=seed)
        runs.append(seen)
    graph, question = planted(rng, 30, 2, 0.02)
    witnesses = [attack(graph, question, seed=seed)[0] for seed in (5, 5)]
    assert len(runs[0]) == len(runs[1]) and all((a == b).all() for a, b in zip(runs[0], runs[1], strict=True))
    assert witnesses[0] is not None and (witnesses[0].inputs == witnesses[1].inputs).all()


@pytest.mark.parametrize("hot", [0, 57_123, 119_999])
def test_many_boxes(hot: int) -> None:
    """120 000 boxes of one input, a case each; only one has a violation."""
    rng = np.random.default_rng(hot)
    graph = random_network(rng, [1, 16, 16, 1])
    k = 120_000
    edges = np.linspace(-1, 1, k + 1, dtype=np.float32)[:, None]
    y = evaluate(graph, (edges[:-1] + edges[1:]) / 2)[:, 0].astype(np.float64)
    d = np.append(y - 1.0, 0.0)
    d[hot] = y[hot] + 1e-6  # more than the rounding of any device
    question = problem(edges[:-1], edges[1:], np.ones((k + 1, 1)), d, [(i, (i,)) for i in range(k)])
    judge = Judge(graph, question)
    start = time.monotonic()
    found, _ = attack(graph, question, judge=lambda x: _only(judge, x, edges[hot], edges[hot + 1]))
    assert found is not None
    assert time.monotonic() - start < 15


def _only(judge: Judge, x: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Witness | None:
    assert (lower <= x).all() and (x <= upper).all()
    return Witness(x.astype(np.float64), evaluate(judge.graph, x)[0])


@pytest.mark.timing
@pytest.mark.parametrize("n_in,boxes", [(5, 1), (600, 1), (1, 50_000)])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_deadline_is_honoured(n_in: int, boxes: int, seconds: float) -> None:
    rng = np.random.default_rng(0)
    graph = random_network(rng, [n_in, 128, 128, 3])
    lower = rng.uniform(-1, 0, (boxes, n_in))
    question = problem(lower, lower + 1, np.eye(3)[:1], [-1e3], [(i, (0,)) for i in range(boxes)])
    config = AttackConfig(restarts=100_000, steps=500)
    start = time.monotonic()
    found, _ = attack(graph, question, config=config, seconds=seconds)
    assert found is None
    assert time.monotonic() - start < seconds + 0.7


def test_flat_gradients_are_left_by_sampling() -> None:
    """Nearly everywhere the ReLU is dead: the output is 0, unsafe is beyond 0.05 near one corner."""
    graph = network([(np.ones((1, 6)), np.array([-5.5])), (np.ones((1, 1)), np.zeros(1))])
    question = problem(np.zeros(6), np.ones(6), np.array([[-1.0]]), [-0.45], [(0, (0,))])
    assert attack(graph, question)[0] is not None
    wide = network([(np.ones((1, 40)), np.array([-24.0])), (np.ones((1, 1)), np.zeros(1))])
    question = problem(np.zeros(40), np.ones(40), np.array([[-1.0]]), [-15.0], [(0, (0,))])
    assert attack(wide, question)[0] is not None


def test_a_network_that_yields_nan_gives_no_witness() -> None:
    graph = network([(np.full((2, 3), 3e38), np.zeros(2)), (np.array([[1.0, -1.0]]), np.zeros(1))])
    question = problem(np.ones(3), np.full(3, 2.0), np.array([[1.0]]), [1e9], [(0, (0,))])
    assert attack(graph, question)[0] is None


def test_refusals_do_not_end_the_search_and_no_candidate_comes_twice() -> None:
    for seed in range(4):
        graph, question = planted(np.random.default_rng(seed), 12, 1, 0.0)
        judge = Judge(graph, question, refusals=3)
        found, _ = attack(graph, question, judge=judge)
        assert found is not None and judge.refusals == 0
        assert len({x.tobytes() for x in judge.seen}) == len(judge.seen)


def test_shallow_candidates_are_deepened_but_offered_in_the_end() -> None:
    graph = network([(np.array([[1.0]]), np.zeros(1))])
    deep = problem([-1.0], [1.0], np.array([[1.0]]), [-0.999], [(0, (0,))])
    found, judge = attack(graph, deep)
    assert found is not None and -0.999 - judge.seen[-1][0] >= 1e-6
    touching = problem([-1.0], [1.0], np.array([[1.0], [-1.0]]), [0.25, -0.25], [(0, (0, 1))])
    found, _ = attack(graph, touching, starts=(np.array([[0.25]], dtype=np.float32),))
    assert found is not None and found.inputs[0] == 0.25


def test_rows_over_inputs_and_cases_without_rows() -> None:
    rng = np.random.default_rng(2)
    graph = random_network(rng, [3, 8, 1])
    row_x = np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    question = problem(-np.ones(3), np.ones(3), np.zeros((2, 1)), [0.501, -0.5], [(0, (0, 1))], row_x=row_x)
    found, _ = attack(graph, question)
    assert found is not None and 0.5 <= found.inputs[0] <= 0.501
    whole = problem(-np.ones(3), np.ones(3), np.zeros((0, 1)), [], [(0, ())])
    assert attack(graph, whole)[0] is not None
    assert attack(graph, whole, judge=lambda x: None)[0] is None
    none = problem(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 1)), [], [])
    assert attack(graph, none)[0] is None


def test_only_the_chosen_cases_are_attacked() -> None:
    graph = network([(np.eye(2), np.zeros(2))])
    boxes = np.array([[0.0, 0.0], [5.0, 5.0]])
    question = problem(boxes, boxes + 1, np.array([[1.0, 0.0]]), [9.0], [(0, (0,)), (1, (0,))])
    found, judge = attack(graph, question, cases=[1])
    assert found is not None and found.case == 1 and all((x >= 5).all() for x in judge.seen)


def test_starts_are_used() -> None:
    """A needle: one input of 60 has a narrow spike that only the given start sees."""
    weight = np.zeros((3, 60))
    weight[:, 0] = 1000.0
    spike = network([(weight, np.array([-500.0, -501.0, -502.0])), (np.array([[1.0, -2.0, 1.0]]), np.zeros(1))])
    question = problem(np.zeros(60), np.ones(60), np.array([[-1.0]]), [-0.5], [(0, (0,))])
    start = np.full((1, 60), 0.5, dtype=np.float32)
    start[0, 0] = 0.5012
    assert attack(spike, question, starts=(start,))[0] is not None


def test_memory_is_bounded_for_wide_inputs() -> None:
    rng = np.random.default_rng(0)
    graph = random_network(rng, [20_000, 2, 12])
    rows = np.eye(12)
    question = problem(np.zeros(20_000), np.ones(20_000), rows, np.full(12, -1e6), [(0, (i,)) for i in range(12)])
    torch.manual_seed(0)
    found, _ = attack(graph, question, config=AttackConfig(restarts=50, steps=2), seconds=5)
    assert found is None


@pytest.mark.gpu
@pytest.mark.parametrize("n_in", [4, 40])
def test_on_a_gpu_the_search_finds_and_repeats_itself(n_in: int) -> None:
    device = torch.device("cuda")
    for seed in range(3):
        graph, question = planted(np.random.default_rng(seed), n_in, 2, 0.02)
        weights = SingleBackend(graph, device).weights
        found = [attack(graph, question, seconds=30, store=weights, device=device, seed=1)[0] for _ in range(2)]
        assert found[0] is not None and found[1] is not None
        assert (found[0].inputs == found[1].inputs).all()
