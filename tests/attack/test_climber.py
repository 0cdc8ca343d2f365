"""Short climbs from given points: candidates near them, and an end when rounding refuses what they find."""

from __future__ import annotations

import numpy as np
import torch

from tests.attack.support import evaluate, network, problem, store
from tests.support.device import DEVICE
from verifier.attack import climber
from verifier.attack.climber import Climber
from verifier.attack.objective import build_objective
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.graph.graph import Graph


def peaks() -> Graph:
    """max(0, 1 - 4 |x - 0.6|) of one input, negated: below -0.5 in a small part of [-1, 1] alone."""
    first = np.array([[1.0], [-1.0]]), np.array([-0.6, 0.6])
    second = np.array([[-4.0, -4.0]]), np.array([1.0])
    return network([first, second, (np.array([[-1.0]]), np.zeros(1))])


def climbs(graph: Graph) -> Climber:
    question = problem(-np.ones(1), np.ones(1), np.array([[1.0]]), [-0.5], [(0, [0])])
    objective = build_objective(graph, store(graph), question, DEVICE)
    return Climber(objective, AttackConfig(), Deadline(20), seed=0)


def test_a_near_miss_becomes_a_candidate() -> None:
    graph = peaks()
    x = torch.linspace(0.40, 0.46, 16, device=DEVICE)[:, None]
    found = climbs(graph).climb(x, torch.zeros(16, dtype=torch.int64, device=DEVICE))
    assert found is not None and found.dtype == np.float32
    assert evaluate(graph, found)[0, 0] <= -0.5


def test_nothing_comes_of_nothing() -> None:
    graph = network([(np.array([[0.1]]), np.zeros(1))])
    none = torch.zeros((0, 1), device=DEVICE)
    assert climbs(graph).climb(none, torch.zeros(0, dtype=torch.int64, device=DEVICE)) is None
    x = torch.zeros((4, 1), device=DEVICE)
    assert climbs(graph).climb(x, torch.zeros(4, dtype=torch.int64, device=DEVICE)) is None


def test_climbs_end_when_candidates_are_refused_again_and_again() -> None:
    found, x = climbs(peaks()), torch.full((4, 1), 0.6, device=DEVICE)
    case = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert all(found.climb(x, case) is not None for _ in range(climber._MOST_CANDIDATES))
    assert found.climb(x, case) is None
