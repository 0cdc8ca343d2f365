"""The compact network and its kernel against walks on the graph, and refined hidden bounds against samples."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bounds.nets import Builder, make
from tests.parallel.threads import ThreadGroup, on_ranks
from tests.support.device import DEVICE, ON_DEVICE, single
from verifier.api import verify
from verifier.bab import compact, refine
from verifier.bab.balance import LostDomains
from verifier.bab.bounder import CaseRows, WalkBounder
from verifier.bab.branching import neurons
from verifier.bab.branching.neurons import NeuronBrancher
from verifier.bab.certify import Certificates
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.exchange import Exchange
from verifier.bab.kernel import Kernel
from verifier.bab.refine import RaisedRows
from verifier.bab.relu_split import NeuronSplitting, Refutation
from verifier.bab.splits import split_space
from verifier.bounds.alpha import Schedule, initial_parameters
from verifier.bounds.crown import BoundState, Specification, crown_hidden, initial_state, preactivations
from verifier.bounds.engine import Engine
from verifier.config import BabConfig
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.result import Verdict
from verifier.spec.build import from_box

NAMES = ["mlp", "conv", "strided", "residual", "preactivation"]
CASES, ROWS, DOMAINS = 3, 2, 7


class Setting:
    """Cases over one random network, both ways to bound them, and random domains."""

    def __init__(self, name: str, seed: int, folding: str = "auto") -> None:
        self.made = made = make(name, seed, radius=0.7)
        graph, backend = made.graph, made.backend
        self.state = crown_hidden(Engine(graph, backend), made.state())
        self.space = split_space(graph, backend, self.state.bounds)
        random = torch.Generator().manual_seed(seed)
        y = torch.randn((CASES, ROWS, *graph.output_shape), generator=random, dtype=torch.float64).to(DEVICE)
        slopes, _ = initial_parameters(graph, self.state.bounds, 1, len(graph.nodes))
        parameters = {
            i: {k: v[0].expand(CASES, ROWS, *v.shape[2:]).clone() for k, v in group.items()}
            for i, group in slopes.items()
        }
        thresholds = torch.randn((CASES, ROWS), generator=random, dtype=torch.float64).to(DEVICE) + 3
        self.cases = CaseRows(Specification(y), thresholds, parameters)
        net = compact.compact(graph, backend, self.state.box, self.space, self.cases.spec, thresholds)
        assert net is not None
        self.net = net
        self.kernel = Kernel(net, ROWS, graph.input_shape)
        self.walk = WalkBounder(Engine(graph, backend), self.state, self.space, self.cases)
        signs = torch.randint(-1, 2, (DOMAINS, self.space.size), generator=random, dtype=torch.int8)
        signs[torch.rand(signs.shape, generator=random) < 0.6] = 0
        alpha_beta = torch.rand((DOMAINS, ROWS, self.space.size), generator=random)
        case = torch.randint(0, CASES, (DOMAINS,), generator=random)
        self.domains = NeuronDomains(case.to(DEVICE), signs.to(DEVICE), alpha_beta.to(DEVICE))

    def search(self, config: BabConfig) -> NeuronSplitting:
        context = SearchContext(self.made.graph, self.made.backend, config, Deadline(), memory_limit=1 << 40)
        goal = Refutation(context, Exchange(context).offer)
        return NeuronSplitting(context, self.state, self.cases, context.deadline, goal)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(((first - second).abs() <= tolerance * (1 + first.abs())).all())


@pytest.mark.parametrize("fold", ["chosen", "all", "none"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_kernel_bounds_what_the_walk_bounds(name: str, seed: int, fold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fold != "chosen":
        monkeypatch.setattr(compact, "_folding", lambda graph, counts: frozenset(counts if fold == "all" else ()))
    s = Setting(name, seed)
    kept = int(s.net.kept.sum())
    assert kept == 0 or fold != "all"
    assert close(s.walk.evaluate(s.domains), s.kernel.evaluate(s.domains))
    # A step of Adam moves a parameter with a tiny gradient by the sign of its rounding: compare the start exactly,
    # and what optimisation gains in the mean.
    schedule = Schedule(0, 0.1, 0.05, 0.98)
    walk, kernel = (b.optimise(s.domains, schedule, Deadline()) for b in (s.walk, s.kernel))
    assert close(walk.gap, kernel.gap)
    assert close(walk.alpha_beta, kernel.alpha_beta)
    assert close(walk.slack.float(), kernel.slack)
    assert close(walk.coefficients, kernel.coefficients)
    assert close(walk.z, kernel.z)
    index = torch.arange(DOMAINS * ROWS, device=DEVICE)
    assert close(walk.points(index), kernel.points(index))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_optimisation_reaches_the_same_bounds(name: str, seed: int) -> None:
    s = Setting(name, seed)
    low = replace(s.cases, thresholds=s.cases.thresholds + 100)  # nothing is proved, so that nothing leaves early
    walk = WalkBounder(s.made.engine, s.state, s.space, low)
    net = compact.compact(s.made.graph, s.made.backend, s.state.box, s.space, low.spec, low.thresholds)
    assert net is not None
    kernel = Kernel(net, ROWS, s.made.graph.input_shape)
    schedule = Schedule(30, 0.1, 0.05, 0.98)
    first = walk.optimise(s.domains, schedule, Deadline())
    second = kernel.optimise(s.domains, schedule, Deadline())
    start = walk.optimise(s.domains, Schedule(0), Deadline()).gap
    gained = (first.gap - start).mean()
    assert gained > 0
    assert abs(float((first.gap - second.gap).mean())) < 0.02 * float(gained) + 1e-4
    # The values belong to the bound: evaluating them gives it again.
    again = NeuronDomains(s.domains.case, s.domains.signs, second.alpha_beta)
    assert close(kernel.evaluate(again), second.gap.amax(1))


@pytest.mark.parametrize("name", NAMES)
def test_proved_domains_leave_and_the_others_stay_in_their_place(name: str) -> None:
    s = Setting(name, 5)
    middle = s.kernel.optimise(s.domains, Schedule(0), Deadline()).gap.amax(1).median()
    cases = replace(s.cases, thresholds=s.cases.thresholds + float(middle))
    net = compact.compact(s.made.graph, s.made.backend, s.state.box, s.space, cases.spec, cases.thresholds)
    assert net is not None
    kernel = Kernel(net, ROWS, s.made.graph.input_shape)
    found = kernel.optimise(s.domains, Schedule(20, 0.1, 0.05, 0.98), Deadline())
    proved = found.gap.amax(1) > 0
    assert proved.any()
    again = NeuronDomains(s.domains.case, s.domains.signs, found.alpha_beta)
    assert close(kernel.evaluate(again), found.gap.amax(1))


def test_certificates_take_no_negative_multipliers() -> None:
    s = Setting("mlp", 2)
    search, split = s.search(BabConfig()), s.domains.signs[:, None] != 0
    wrong = torch.where(split, -5.0, s.domains.alpha_beta)
    right = torch.where(split, 0.0, s.domains.alpha_beta)
    certificates = search.certificates
    lower = [certificates.lower(replace(s.domains, alpha_beta=alpha_beta))[0] for alpha_beta in (wrong, right)]
    assert torch.equal(*lower)


@pytest.mark.parametrize("depth", [1, 3])
def test_children_cover_their_parents(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every full assignment of signs that a parent allows is allowed by exactly one child."""
    s = Setting("mlp", 1)
    search = s.search(BabConfig(candidates=3, probes=0))
    monkeypatch.setattr(search.brancher, "depth", lambda count, candidates, batch: depth)
    random = torch.Generator().manual_seed(3)
    parents = s.domains
    # Split and repeated ones too.
    candidates = torch.randint(0, s.space.size, (DOMAINS, 6), generator=random).to(DEVICE)
    gap = torch.zeros(DOMAINS, device=DEVICE)
    given = OpenNeuronDomains(
        parents.case,
        parents.signs,
        parents.alpha_beta,
        gap,
        candidates,
        candidates[:, :0],
        parents.alpha_beta[:, 0, :0],
    )
    ordered = search.brancher.ordered(given, search.batch)
    children, split, between = search.brancher.split(ordered, search.batch)
    # Every split replaces a domain by two, some of which are split in turn.
    assert split - between == DOMAINS
    assert children.count == 2 * split - between
    assert (between > 0) == (depth > 1)
    for _ in range(200):
        full = torch.randint(0, 2, (s.space.size,), generator=random, dtype=torch.int8).to(DEVICE) * 2 - 1
        for case in range(CASES):

            def members(signs: Tensor, cases: Tensor, wanted: int = case, point: Tensor = full) -> int:
                return int((((signs == 0) | (signs == point)).all(1) & (cases == wanted)).sum())

            assert members(children.signs, children.case) == members(parents.signs, parents.case)


def test_small_rounds_split_several_columns_at_once() -> None:
    """While more children cost nothing: at the head and at the tail of a search, never in a full round."""
    search = Setting("mlp", 1).search(BabConfig())
    brancher, batch = search.brancher, search.batch
    free = batch
    if DEVICE.type == "cpu":
        free = min(free, (facts(DEVICE).free_batch_numbers or 0) // (search.bounder.widest * ROWS))
    assert brancher.depth(1, 6, batch) == neurons._MOST_DEPTH
    assert brancher.depth(1, 2, batch) == 2
    depths = [brancher.depth(count, 6, batch) for count in range(1, batch)]
    assert all(d == 1 or count << d < free for count, d in enumerate(depths, 1))
    assert depths[-1] == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_refined_bounds_hold_and_are_tighter(name: str, seed: int) -> None:
    s = Setting(name, seed)
    made, graph = s.made, s.made.graph
    fine = refine.refine(SearchContext(graph, made.backend, BabConfig(), Deadline(20.0)), s.state, 0.5)
    assert fine.certified == s.state.certified
    values = made.values(made.samples(4000, seed))
    gained = 0.0
    for index in preactivations(graph):
        old, new, z = s.state.bounds[index], fine.bounds[index], values[index].double()
        assert bool((new.lower >= old.lower).all() and (new.upper <= old.upper).all())
        assert bool((z.amin((0, 1)) >= new.lower[0].double() - 1e-9).all())
        assert bool((z.amax((0, 1)) <= new.upper[0].double() + 1e-9).all())
        gained += float((new.lower - old.lower).sum() + (old.upper - new.upper).sum())
    assert gained > 0


def test_refinement_that_loses_a_domain_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a row's domains would not cover the box, so its bound would prove nothing."""
    s = Setting(NAMES[0], 0)
    halves, calls = NeuronBrancher.split, itertools.count()

    def losing(self: NeuronBrancher, domains: OpenNeuronDomains, batch: int) -> object:
        children, split, between = halves(self, domains, batch)
        return children[1 if next(calls) == 2 else 0 :], split, between

    monkeypatch.setattr(NeuronBrancher, "split", losing)
    with pytest.raises(LostDomains):
        refine.refine(SearchContext(s.made.graph, s.made.backend, BabConfig(), Deadline(20.0)), s.state, 0.5)
    assert next(calls) > 3


def test_layers_that_do_not_fit_into_memory_keep_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting("mlp", 0)
    asked = []

    def full(*args: object) -> None:
        asked.append(args)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Kernel, "optimise", full)
    fine = refine.refine(SearchContext(s.made.graph, s.made.backend, BabConfig(), Deadline(20.0)), s.state, 0.5)
    assert asked
    for index, old in s.state.bounds.items():
        assert torch.equal(fine.bounds[index].lower, old.lower) and torch.equal(fine.bounds[index].upper, old.upper)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("failures", [1, 0])
def test_every_refuted_domain_counts_for_its_row(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory fails while they are looked at."""
    s = Setting("mlp", 0)
    lower, ended = Certificates.lower, RaisedRows.lower
    seen: Counter[Certificates] = Counter()
    calls: Counter[Certificates] = Counter()
    searches: list[NeuronSplitting] = []

    def counting(self: Certificates, domains: NeuronDomains) -> tuple[Tensor, Tensor]:
        calls[self] += 1
        if calls[self] <= failures:
            raise torch.OutOfMemoryError("out of memory")
        found = lower(self, domains)
        seen[self] += domains.count
        return found

    def noting(self: RaisedRows, splitting: NeuronSplitting) -> Tensor:
        found = ended(self, splitting)
        searches.append(splitting)
        return found

    monkeypatch.setattr(Certificates, "lower", counting)
    monkeypatch.setattr(RaisedRows, "lower", noting)
    config = BabConfig(batch_size=16)
    refine.refine(SearchContext(s.made.graph, s.made.backend, config, Deadline(200.0)), s.state, 0.5)
    assert searches and all(calls[s.certificates] > failures for s in searches)
    for search in searches:
        figures = search.count()
        assert figures.closed > 0
        assert seen[search.certificates] >= figures.closed + figures.open


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("width", [0.0, 1.0])
def test_nothing_left_to_multiply(width: float, rows: int) -> None:
    """No input has a width, or inactive neurons keep undecided ones from the rows: empty matrices, and a tie."""
    first, second, third = torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        first.bias.zero_()  # undecided even on the box of zero alone, whose rounding is accounted for
        second.weight.fill_(1.0)
        second.bias.fill_(0.0 if width == 0 else -9.0)
        third.weight.fill_(1.0)
        third.bias.fill_(0.5)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), third)
    question = from_box([-width], [width], [[([1.0], 0.5), ([2.0], 1.0)][:rows]], 1)
    found = verify(net, question, {"attack.enabled": False, "bab.branching": "kfsb", **ON_DEVICE}, timeout=60)
    assert found.verdict is Verdict.SAT and "relu_split" in found.statistics


def test_fewer_neurons_than_ranks() -> None:
    """A layer with one undecided neuron leaves most ranks idle; all of them get the same, tighter bounds."""
    s = Setting("mlp", 0)
    b = Builder((4,), 3, gain=1.5)
    x = b.relu(b.linear(0, 9))
    b.linear(b.relu(b.linear(x, 1)), 1)
    graph = b.graph()
    backend = single(graph)
    state = crown_hidden(Engine(graph, backend), initial_state(Engine(graph, backend), s.state.box))

    def work(group: ThreadGroup) -> BoundState:
        return refine.refine(SearchContext(graph, backend, BabConfig(), Deadline(60.0), team=group), state, 0.5)

    index = preactivations(graph)[1]
    first, *others = on_ranks(4, work)
    assert bool((first.bounds[index].lower > state.bounds[index].lower).all())
    for found in others:
        assert torch.equal(found.bounds[index].lower, first.bounds[index].lower)
        assert torch.equal(found.bounds[index].upper, first.bounds[index].upper)


def test_the_last_look_at_refuted_domains_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory holds few domains at a time the bounds are those of all at once."""
    s = Setting("mlp", 0)
    lower = Certificates.lower

    def refined() -> BoundState:
        config = BabConfig(batch_size=16)
        graph, backend = s.made.graph, s.made.backend
        return refine.refine(SearchContext(graph, backend, config, Deadline(600.0)), s.state, 0.2)

    def narrow(self: Certificates, domains: NeuronDomains, *others: Any) -> tuple[Tensor, Tensor]:
        if domains.count > 5:
            raise torch.OutOfMemoryError("out of memory")
        return lower(self, domains, *others)

    whole = refined()
    monkeypatch.setattr(Certificates, "lower", narrow)
    parts = refined()
    gained = 0.0
    for index, b in whole.bounds.items():
        torch.testing.assert_close(parts.bounds[index].lower, b.lower)
        torch.testing.assert_close(parts.bounds[index].upper, b.upper)
        gained += float((b.lower - s.state.bounds[index].lower).sum())
    assert gained > 0


def test_ranks_agree_on_the_time_that_a_layer_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one of them had more to do in the layer before."""
    s = Setting("mlp", 0)
    work = refine._bound_layer
    rank = threading.local()
    given: dict[int, list[float]] = {0: [], 1: []}

    def noting(*arguments: Any) -> tuple[Tensor | None, float]:
        given[rank.number].append(arguments[4])
        found, spent = work(*arguments)
        return found, spent + 0.01 * rank.number

    def refined(group: ThreadGroup) -> BoundState:
        rank.number = group.rank
        graph, backend = s.made.graph, s.made.backend
        return refine.refine(SearchContext(graph, backend, BabConfig(), Deadline(60.0), team=group), s.state, 0.5)

    monkeypatch.setattr(refine, "_bound_layer", noting)
    on_ranks(2, refined)
    assert len(given[0]) > 1
    assert given[0] == given[1]
