"""How time is dealt between refinements of the hidden bounds and searches."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.device import DEVICE
from verifier.bab.domains import OpenNeuronDomains
from verifier.bab.pool import Pool
from verifier.bab.refine import Stage, least_refinement, plan, worst_of_each
from verifier.bab.relu_split import Refutation
from verifier.bab.statistics import SearchStatistics, Stop


@given(st.floats(0.01, 600.0), st.floats(0.0, 1000.0))
def test_a_plan_ends_with_what_is_left_of_the_time(limit: float, least: float) -> None:
    stages = plan(limit, least)
    assert [s.search == math.inf for s in stages] == [False] * (len(stages) - 1) + [True]
    assert stages[0].refinement == 0 and all(s.refinement >= least for s in stages[1:])
    spent = sum(s.refinement + s.search for s in stages[:-1]) + stages[-1].refinement
    assert spent <= 0.9 * limit  # the last search has some of it
    assert all(a.refinement < b.refinement for a, b in pairwise(stages))


@given(st.floats(1.0, 600.0), st.floats(1.0, 10.0), st.floats(0.0, 20.0))
def test_a_longer_limit_changes_only_the_end(limit: float, factor: float, least: float) -> None:
    short, long = plan(limit, least), plan(min(600.0, limit * factor), least)
    assert len(short) <= len(long)
    for a, b in zip(short[:-2], long, strict=False):
        assert a == b


def test_without_time_for_a_refinement_there_is_one_search() -> None:
    assert plan(60.0, 1000.0) == [Stage(0.0, math.inf)]


def test_what_is_easy_is_tried_first() -> None:
    stages = plan(300.0, 0.0)
    assert stages[0].search < 0.2
    for before, after in pairwise(stages):
        assert after.refinement <= 8 * before.search


def test_every_neuron_gets_some_splits() -> None:
    assert least_refinement(400, 2000.0) == pytest.approx(0.8)


def pool_of(gaps: list[tuple[int, float]]) -> Pool[OpenNeuronDomains]:
    """Open domains of (case, gap)."""
    n = len(gaps)
    case = torch.tensor([c for c, _ in gaps], device=DEVICE)
    gap = torch.tensor([g for _, g in gaps], device=DEVICE)
    none = torch.zeros((n, 0), device=DEVICE)
    pool: Pool[OpenNeuronDomains] = Pool()
    signs = torch.zeros((n, 2), dtype=torch.int8, device=DEVICE)
    pool.push(OpenNeuronDomains(case, signs, torch.zeros((n, 1, 2), device=DEVICE), gap, none, none, none))
    return pool


def test_splits_go_where_they_gain_most() -> None:
    """Half of the rows, the worst domains of each; rows 0 and 3 belong to one neuron, 1 and 4 to another, and so on."""
    pool = pool_of([(r, -1.0 - r - k) for r in range(6) for k in range(3)])
    gain = torch.tensor([5.0, 1.0, 2.0, 4.0, 3.0, 0.0], device=DEVICE)
    taken, rows = worst_of_each(pool, 6, gain)
    assert rows.tolist() == [True, False, False, True, True, False]
    assert sorted(zip(taken.case.tolist(), taken.gap.tolist(), strict=True)) == [
        (0, -3.0), (0, -2.0), (3, -6.0), (3, -5.0), (4, -7.0), (4, -6.0),
    ]  # fmt: skip
    assert pool.count == 12


def test_rows_that_nothing_is_known_of_come_first_and_decided_neurons_never() -> None:
    """Row 2 of rows 2 and 5 has left: the neuron's sign is known. A leaf, whose gap is infinite, is not split."""
    pool = pool_of([(0, -1.0), (1, math.inf), (3, -1.0), (4, -1.0), (5, -1.0)])
    gain = torch.tensor([1.0, math.inf, math.inf, math.inf, 2.0, math.inf], device=DEVICE)
    taken, rows = worst_of_each(pool, 4, gain)
    assert rows.nonzero()[:, 0].tolist() == [3, 4] and sorted(taken.case.tolist()) == [3, 4]


@pytest.mark.parametrize(("counts", "stops"), [([100, 100], True), ([100, 61], True), ([100, 20], False)])
def test_a_search_that_runs_out_of_open_domains_goes_on(counts: list[int], stops: bool) -> None:
    goal = Refutation.__new__(Refutation)
    goal.enough, goal._most_open = 50, 0
    stops_now = []
    for count in counts:
        pool = SimpleNamespace(count=count, nbytes=lambda: 0)
        splitting = SimpleNamespace(pool=pool, memory_limit=1, statistics=SearchStatistics(bounded=60))
        stops_now.append(goal.full(cast("Any", splitting)) is Stop.DOMAINS)
    assert stops_now == [True, stops]
