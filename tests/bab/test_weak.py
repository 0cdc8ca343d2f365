"""Domains that are refuted for the network in real arithmetic alone: kept, told to all groups, and refuted for runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bounds.nets import Builder, case
from tests.parallel.threads import ThreadGroup, on_ranks
from tests.support.device import DEVICE
from verifier.bab import relu_split
from verifier.bab.bounder import CaseRows
from verifier.bab.certify import Certificates, Judge
from verifier.bab.context import SearchContext
from verifier.bab.leaf_lp import LeafResult, LeafSolver
from verifier.bab.relu_split import NeuronSplitting, Refutation, SearchResult, go_on
from verifier.bab.statistics import SearchStatistics
from verifier.bounds.alpha import initial_parameters
from verifier.bounds.crown import BoundState, Specification, crown_hidden, initial_state
from verifier.bounds.engine import Arithmetic, Engine
from verifier.config import BabConfig
from verifier.core.claims import Claims, Semantics
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.runtime import RunModel

RUN = RunModel("test", {})


class Question:
    """A random network whose smallest value is about one above the threshold, and runs that are off by ``error``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
        b = Builder((4,), 3, gain=1.5)
        b.linear(b.relu(b.linear(b.relu(b.linear(0, 16)), 16)), 1)
        one = torch.ones((1, 4), dtype=torch.float32)
        made = case(b.graph(), Interval(-one, one))
        graph, backend = made.graph, made.backend
        box = made.state().box
        engine = Engine(graph, backend, arithmetic=Arithmetic(torch.float64, rounding=True, run=RUN))
        state = crown_hidden(Engine(graph, backend), initial_state(engine, box))
        y = torch.zeros((1, 1, *graph.output_shape), dtype=torch.float64, device=DEVICE)
        y.view(-1)[0] = 1.0
        slopes, _ = initial_parameters(graph, state.bounds, 1, len(graph.nodes))
        parameters = {i: {k: v[0].expand(1, 1, *v.shape[2:]).clone() for k, v in d.items()} for i, d in slopes.items()}
        values = made.values(made.samples(4000))
        least = float(values[graph.output].flatten(1)[:, 0].min())
        threshold = torch.full((1, 1), least - 1.0, dtype=torch.float64, device=DEVICE)
        self.graph, self.backend, self.state = graph, backend, state
        self.cases = CaseRows(Specification(y), threshold, parameters)
        lower = Certificates.lower

        def lowered(own: Certificates, *arguments: Any) -> tuple[Tensor, Tensor]:
            bound, before = lower(own, *arguments)
            return bound - error, before + error

        monkeypatch.setattr(Certificates, "lower", lowered)
        monkeypatch.setattr(Claims, "real_closes", lambda own, *counts: own.semantics is not Semantics.FLOAT32)

    def context(self, group: ThreadGroup) -> SearchContext:
        config = BabConfig(batch_size=4, probes=0, max_domains=400)
        return SearchContext(
            self.graph, self.backend, config, Deadline(60.0), claims=Claims(Semantics.BOTH, RUN), team=group
        )

    def answered(self, group: ThreadGroup) -> tuple[SearchResult, SearchResult]:
        """The first search and the one that goes on with what it left to do."""
        first = relu_split.search(self.context(group), self.state, self.cases)
        assert first.weak is not None
        return first, go_on(self.context(group), first.weak)


@pytest.mark.parametrize("size", [1, 3])
def test_weak_domains_of_all_groups_are_refuted_for_runs(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    question = Question(monkeypatch, 0.3)
    answers = on_ranks(size, question.answered)
    first, more = answers[0]
    assert first.weak is not None and first.covered.weak
    assert sum(a.weak.domains.count for a, _ in answers if a.weak is not None) == first.covered.weak
    for _, again in answers:
        assert not again.open and not again.covered.weak
        assert again.totals.statistics.roots == first.covered.weak
    assert more.covered.margin > more.covered.error > 0.3
    assert first.weak.covered.margin > first.weak.covered.error > 0.3


def test_runs_that_are_off_by_too_much_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    [(first, more)] = on_ranks(1, Question(monkeypatch, 1.5).answered)
    assert not first.open and more.open


def test_a_closing_that_is_not_kept_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to go on with unless every domain that is refuted for the real network alone is there."""
    question = Question(monkeypatch, 0.3)
    keep = Certificates._keep

    def forgetful(own: Certificates, domains: Any, weak: Tensor, count: int) -> None:
        keep(own, domains[:-1], weak[:-1], count)

    monkeypatch.setattr(Certificates, "_keep", forgetful)
    [found] = on_ranks(1, lambda group: relu_split.search(question.context(group), question.state, question.cases))
    assert not found.open and found.covered.weak and found.weak is None


def test_one_closing_that_nothing_goes_on_with_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where batches that were tried twice make up for it in number."""
    question = Question(monkeypatch, 0.3)
    keep = Certificates._keep

    def twice(own: Certificates, domains: Any, weak: Tensor, count: int) -> None:
        own.strong.weak += min(count, 1)
        keep(own, domains, weak, count)
        keep(own, domains, weak, count)

    monkeypatch.setattr(Certificates, "_keep", twice)
    [found] = on_ranks(1, lambda group: relu_split.search(question.context(group), question.state, question.cases))
    assert not found.open and found.covered.weak and found.weak is None


@pytest.mark.parametrize("semantics", [Semantics.BOTH, Semantics.FLOAT32])
def test_leaves_refuted_for_the_real_network_alone(monkeypatch: pytest.MonkeyPatch, semantics: Semantics) -> None:
    """Nothing goes on with them, and where runs are what is asked for they stay open."""
    question = Question(monkeypatch, 0.3)
    [context] = on_ranks(1, question.context)
    context = replace(context, claims=Claims(semantics, RUN))
    goal = Refutation(context, lambda x: None)
    splitting = NeuronSplitting(context, question.state, question.cases, Deadline(), goal)
    monkeypatch.setattr(LeafSolver, "solve", lambda *asked: LeafResult(False, None, -0.2, real=True, error=0.5))
    assert goal.leaf(splitting, splitting._whole()) is None  # type: ignore[arg-type]
    real = int(semantics is Semantics.BOTH)
    statistics = splitting.statistics
    assert (statistics.closed, statistics.stuck) == (real, 1 - real)
    assert splitting.certificates.strong.weak == statistics.covered.weak == real


def judging(semantics: Semantics, run: RunModel | None) -> tuple[Judge, BoundState]:
    """The judge of relu(x) < 0 on [-1, 1], with bounds that hold for runs or not."""
    b = Builder((1,), 0)
    b.relu(0)
    one = torch.ones((1, 1), dtype=torch.float32)
    made = case(b.graph(), Interval(-one, one))
    engine = Engine(made.graph, made.backend, arithmetic=Arithmetic(torch.float64, rounding=True, run=run))
    state = initial_state(engine, made.state().box)
    y = torch.ones((1, 1, 1), dtype=torch.float64, device=DEVICE)
    threshold = torch.zeros((1, 1), dtype=torch.float64, device=DEVICE)
    cases = CaseRows(Specification(y), threshold, {}, torch.ones_like(threshold, dtype=torch.bool))
    context = SearchContext(made.graph, made.backend, BabConfig(), Deadline(), claims=Claims(semantics, RUN))
    return Judge(context, state, cases, SearchStatistics()), state


@pytest.mark.parametrize("semantics", [Semantics.REAL, Semantics.BOTH, Semantics.FLOAT32])
def test_what_only_touches_is_weak_and_nothing_for_runs(semantics: Semantics) -> None:
    """Exact bounds leave nothing for the error of a run: relu(x) < 0 is refuted for the real network alone."""
    judge, state = judging(semantics, None)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    gap = torch.full((1, 1), -1e-9, dtype=torch.float64, device=DEVICE)
    done = judge.touching(first, gap, first.bool(), lambda index: state.bounds)
    real = semantics is not Semantics.FLOAT32
    assert bool(done.all()) == real
    assert judge.strong.weak == judge.statistics.covered.weak == int(real)


@pytest.mark.parametrize("run", [None, RUN])
def test_closings_by_bounds_that_hold_for_no_run_are_weak(run: RunModel | None) -> None:
    """However clear they are: nothing goes on with them."""
    judge, _ = judging(Semantics.BOTH, run)
    first = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    lower = torch.tensor([[1.0], [2.0]], dtype=torch.float64, device=DEVICE)
    sure, weak = judge.judged(first, lower, torch.zeros_like(lower))
    assert sure.all() and not weak.any()
    assert judge.strong.weak == judge.statistics.covered.weak == (0 if run else 2)
