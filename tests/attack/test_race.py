"""Races find what few starts lead to, keep the best, and count what they spend; steps of absolute length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.attack.support import Judge, network, problem, random_network, target
from tests.support.device import DEVICE
from verifier.attack.ascent import Points, Style, ascend
from verifier.attack.attacks.pgd import search
from verifier.attack.context import AttackContext
from verifier.attack.race import hunt, race, races, whole_work
from verifier.attack.target import Target
from verifier.config import AttackConfig
from verifier.core.problem import Problem
from verifier.core.progress import SilentProgress
from verifier.graph.graph import Graph

# Inputs; more than those of problems whose rounds go on for long.
N = 30


def teeth(seed: int, count: int) -> tuple[Graph, Problem]:
    """Every of two inputs has ``count`` teeth, of which one pair is high enough; the other inputs hardly matter."""
    rng = np.random.default_rng(seed)
    edges = np.linspace(-1.0, 1.0, 2 * count + 1)
    heights = np.zeros((2, 2 * count + 1))
    heights[:, 1::2] = rng.uniform(0.5, 0.8, (2, count))
    heights[[0, 1], 2 * rng.integers(0, count, 2) + 1] = 1.0
    slopes = np.diff(heights, axis=1) * count
    weight = np.zeros((2 * len(edges[:-1]), N))
    bias, last = np.zeros(len(weight)), np.zeros((1, len(weight)))
    for i in range(2):
        part = slice(i * 2 * count, (i + 1) * 2 * count)
        weight[part, i], bias[part] = 1.0, -edges[:-1]
        last[0, part] = np.diff(slopes[i], prepend=0.0)
    weight[:, 2:] = rng.normal(size=(1, N - 2)) * 1e-6
    graph = network([(weight, bias), (last, np.zeros(1))])
    return graph, problem(-np.ones(N), np.ones(N), -np.ones((1, 1)), [-1.95], [(0, (0,))])


def peak(seed: int) -> tuple[Graph, Problem, np.ndarray]:
    """A network that is flat but near one point, where it reaches 1; the property forbids 0.8."""
    rng = np.random.default_rng(seed)
    point = rng.uniform(-0.9, 0.9, N)
    eye = np.eye(N)
    distances = (np.concatenate([eye, -eye]), np.concatenate([-point, point]))
    cone = (-np.ones((1, 2 * N)) / 2.0, np.ones(1))
    graph = network([distances, cone, (np.ones((1, 1)), np.zeros(1))])
    return graph, problem(-np.ones(N), np.ones(N), -np.ones((1, 1)), [-0.8], [(0, (0,))]), point


def asked(graph: Graph, question: Problem, **changes: object) -> Target:
    return target(graph, question, Judge(graph, question), **{"config": AttackConfig(), **changes})


def starts(context: AttackContext, count: int) -> Points:
    objective = context.objective
    x = torch.rand(count, objective.n_in, generator=context.generator, device=DEVICE) * 2 - 1
    case = torch.arange(count, device=DEVICE) % objective.n_cases
    return Points(x, case, torch.full((count,), -torch.inf, dtype=torch.float64, device=DEVICE))


def test_a_race_keeps_the_best_and_counts_its_steps() -> None:
    graph = random_network(np.random.default_rng(1), [N, 20, 3])
    question = problem(-np.ones(N), np.ones(N), np.eye(3), np.full(3, -1e3), [(0, (0,)), (0, (1,)), (0, (2,))])
    context = AttackContext.of(asked(graph, question))
    first = starts(context, 192)
    moved, work = race(context, first, 30)
    assert len(moved) == 12 and set(moved.case.tolist()) == {0, 1, 2}
    assert work == pytest.approx(context.objective.step_cost * (192 * 10 + 48 * 10 + 12 * 30))
    score, _ = context.objective.score(moved.x, moved.case)
    assert torch.allclose(score, moved.score)
    before, _ = context.objective.score(first.x, first.case)
    for case in range(3):
        assert moved.score[moved.case == case].min() > before[first.case == case].max()


def test_races_spend_what_they_are_given() -> None:
    graph = random_network(np.random.default_rng(2), [N, 20, 2])
    question = problem(-np.ones(N), np.ones(N), np.eye(2), [-1e3, -1e3], [(0, (0,)), (0, (1,))])
    spent = []
    for share in (0.0, 2e-4, 4e-4):
        context = AttackContext.of(asked(graph, question))
        seen = 0
        outputs = type(context.objective).outputs

        def counted(own, x, outputs=outputs):
            nonlocal seen
            seen += len(x)
            return outputs(own, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(context.objective), "outputs", counted)
            races(context, starts(context, 8), None, share * whole_work(context), SilentProgress())
        spent.append(seen * context.objective.step_cost / whole_work(context))
    assert spent[0] == 0.0
    assert 1e-4 < spent[1] < 3e-4 < spent[2] < 6e-4


@pytest.mark.parametrize("seed", range(3))
def test_an_attack_finds_what_one_start_in_hundreds_leads_to(seed: int) -> None:
    graph, question = teeth(seed, 24)
    assert search(asked(graph, question)) is not None


@pytest.mark.parametrize("seed", range(3))
def test_a_hunt_sets_out_from_where_it_is_told_to(seed: int) -> None:
    graph, question, point = peak(seed)
    rng = np.random.default_rng(seed)
    near = (point + rng.uniform(-0.06, 0.06, N)).astype(np.float32)
    far = rng.uniform(-1, 1, (5, N)).astype(np.float32)
    assert hunt(asked(graph, question, starts=(far,)), 1e-3) is None
    assert hunt(asked(graph, question, starts=(far, near[None])), 1e-3) is not None


def test_a_hunt_without_open_cases_ends() -> None:
    graph, question, point = peak(0)
    assert hunt(asked(graph, question, cases=[], starts=(point[None],)), 1.0) is None


def test_absolute_steps_are_as_long_in_every_input() -> None:
    graph = network([(np.array([[1.0, 1.0, 1.0]]), np.zeros(1))])
    lower, upper = np.zeros(3), np.array([1.0, 1e4, 0.0])
    context = AttackContext.of(asked(graph, problem(lower, upper, -np.ones((1, 1)), [-1e9], [(0, (0,))])))
    x = torch.tensor([[0.1, 0.1, 0.0]] * 2, device=DEVICE)
    points = Points(
        x, torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros(2, dtype=torch.float64, device=DEVICE)
    )
    zero = torch.zeros(2, device=DEVICE)
    style = Style(zero + 0.002, zero, zero, torch.tensor([False, True], device=DEVICE))
    moved = ascend(context, points, style, 1).x.cpu() - x.cpu()
    assert torch.allclose(moved[0], torch.tensor([0.0015, 15.0, 0.0]), rtol=1e-3)
    assert torch.allclose(moved[1], torch.tensor([0.15, 0.15, 0.0]), rtol=1e-3)
