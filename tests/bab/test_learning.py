"""Learning: derivations are checked, certificates stand for exactly their splits, no counterexample is excluded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.bab.test_kernel import DEVICE, Setting
from tests.support.device import single
from tests.truth.test_milp import network, truth
from verifier.bab import refine, relu_split
from verifier.bab.bounder import CaseRows
from verifier.bab.compact import compact
from verifier.bab.context import SearchContext
from verifier.bab.learning import attempt, clauses
from verifier.bab.learning.certificate import Certifier, Confirmed
from verifier.bab.learning.clauses import Clause, refutes
from verifier.bab.learning.core import Core
from verifier.bab.learning.relaxation import Multipliers, Relaxation
from verifier.bab.learning.search import End, Judge, LearningSearch
from verifier.bab.refine import Stage
from verifier.bab.relu_split import SearchResult, WeakDomains
from verifier.bab.splits import split_space
from verifier.bab.statistics import Stop
from verifier.bounds.crown import Specification, crown_hidden, initial_state
from verifier.bounds.engine import Engine
from verifier.config import BabConfig
from verifier.core.claims import Claims, Covered, Semantics
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval

# ------------------------------------------------------------------------------------------------- propositional logic

# (a or b), (a or not b), (not a or c), (not a or not c), then a, then a contradiction.
AXIOMS = [Clause((0, 2)), Clause((0, 3)), Clause((1, 4)), Clause((1, 5))]
STEPS = [Clause((0,), (0, 1)), Clause((), (2, 3, 4))]
ALL = range(4)


def test_a_derivation_holds() -> None:
    assert refutes([*AXIOMS, *STEPS], ALL)
    assert refutes([Clause(())], {0})  # the case is refuted without a split


@pytest.mark.parametrize("missing", range(4))
def test_every_axiom_needs_its_certificate(missing: int) -> None:
    assert not refutes([*AXIOMS, *STEPS], set(ALL) - {missing})


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Clause((0,), (0, 1))],  # no contradiction
        [Clause((0,), (0,)), Clause((), (2, 3, 4))],  # an antecedent is missing
        [Clause((0,), (0, 1)), Clause((), (3, 4))],
        [Clause((0,), (0, 1)), Clause((), (2, 3, 5))],  # rests on itself
        [Clause((0,), (5,)), Clause((), (2, 3, 4))],  # on what comes later
        [Clause((0,), (-2, 1)), Clause((), (2, 3, 4))],
        [Clause((), ())],
        [Clause((0,)), Clause((), (2, 3, 4))],  # a step that calls itself an axiom
    ],
)
def test_steps_that_do_not_follow(steps: Sequence[Clause]) -> None:
    assert not refutes([*AXIOMS, *steps], ALL)


def satisfiable(variables: int, axioms: Sequence[Sequence[int]]) -> bool:
    for values in itertools.product((0, 1), repeat=variables):
        if all(any(values[x >> 1] == 1 - (x & 1) for x in clause) for clause in axioms):
            return True
    return False


@pytest.mark.parametrize("seed", range(40))
def test_the_core_agrees_with_enumeration(seed: int) -> None:
    """Axioms become known where a full assignment contradicts them, as the relaxation tells them."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 9))
    axioms = []
    for _ in range(int(random.integers(n, 6 * n + 2))):
        chosen = random.permutation(n)[: int(random.integers(1, 4))]
        axioms.append([2 * int(v) + int(random.integers(0, 2)) for v in chosen])
    core, certified = Core(n), set()
    for _ in range(1000):
        conflict = core.propagate()
        if conflict is None:
            free = [v for v in range(n) if not core.assigned(v)]
            if free:
                core.decide(core.phase[free[int(random.integers(0, len(free)))]])
                continue
            true = set(core.trail)
            false = next((a for a in axioms if not true & set(a)), None)
            if false is None:
                assert satisfiable(n, axioms)
                return
            conflict = core.add(false)
            certified.add(conflict)
        if not core.learn(conflict):
            break
    assert not satisfiable(n, axioms)
    assert refutes(core.derivation, certified)
    for missing in certified:
        rest = certified - {missing}
        if satisfiable(n, [core.derivation[j].literals for j in rest]):
            assert not refutes(core.derivation, rest)


# ------------------------------------------------------------------------------------------------------------ networks


def searched(setting: Setting, thresholds: torch.Tensor, case: int = 0) -> LearningSearch:
    """A search of one case whose rows have other thresholds (S,)."""
    s = setting
    cases = replace(s.cases, thresholds=thresholds.expand(s.cases.thresholds.shape[0], -1).contiguous())
    graph, backend = s.made.graph, s.made.backend
    net = compact(graph, backend, s.state.box, s.space, cases.spec, cases.thresholds)
    assert net is not None
    certifier = Certifier(Engine(graph, backend), s.state, s.space, cases, case)
    relaxation = Relaxation(net, case * cases.rows, cases.rows)
    return LearningSearch(certifier, relaxation, Judge(lambda x: None), Deadline(60.0))


def sampled(setting: Setting, case: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Values (n, S) of a case's rows at points of the box, and (n, U) bool: pre-activations that are >= 0."""
    values = setting.made.values(setting.made.samples(4000, 3))
    y = values[setting.made.graph.output].double().reshape(4000, -1)
    rows = y @ setting.cases.spec.y[case].flatten(1).T
    z = torch.cat([values[g.value].reshape(4000, -1)[:, g.elements] for g in setting.space.groups], 1)
    return rows, (z >= 0).cpu().numpy()


@pytest.mark.parametrize("seed", range(1, 5))
def test_clauses_hold_at_every_counterexample(seed: int) -> None:
    s = Setting("mlp", seed)
    rows, active = sampled(s)
    thresholds = rows.amax(0)
    thresholds[0] = rows[:, 0].quantile(0.02)
    search = searched(s, thresholds)
    assert search.run(4000) is not End.REFUTED
    bad = active[(rows <= thresholds).all(1).cpu().numpy()]
    assert len(bad) > 0
    axioms = [c.literals for c in search.core.derivation]  # what is derived holds there as well
    for literals in axioms:
        holds = np.zeros(len(bad), dtype=bool)
        for literal in literals:
            holds |= bad[:, literal >> 1] == (literal & 1 == 0)
        assert holds.all()


@pytest.mark.parametrize("seed", range(1, 5))
def test_certificates_stand_for_their_splits_alone(seed: int) -> None:
    s = Setting("mlp", seed)
    rows, active = sampled(s)
    thresholds = rows.amax(0)
    thresholds[0] = rows[:, 0].min() - 1e-3 * (1 + rows[:, 0].min().abs())
    search = searched(s, thresholds)
    refused = confirmed = 0
    for some in active[:40]:
        signs = np.where(some, 1, -1).astype(np.int8)
        found = search.relaxation.check(signs, 10.0).refuted
        if found is None:
            continue
        used = np.where(found.used, signs, 0).astype(np.int8)
        if not search.certifier.confirm(used, found).sure:
            continue
        confirmed += 1
        # Without rows and multipliers nothing is left, and negative ones prove nothing.
        empty = replace(found, rows=0 * found.rows, beta=0 * found.beta)
        assert not search.certifier.confirm(used, empty).real
        negative = replace(found, rows=-found.rows, beta=-found.beta)
        assert not search.certifier.confirm(used, negative).real
        for u in np.flatnonzero(used):
            fewer = used.copy()
            fewer[u] = 0
            weaker = search.certifier.confirm(fewer, found)
            refused += not weaker.real
            if weaker.real:  # then it is true: no sample of the larger domain violates all rows
                inside = ((fewer == 0) | ((fewer > 0) == active)).all(1)
                assert not bool((rows[torch.from_numpy(inside).to(DEVICE)] <= thresholds).all(1).any())
    assert confirmed > 0 and refused > 0


@pytest.mark.parametrize("seed", range(1, 5))
def test_the_least_violation_tells_domains_apart_as_the_program_does(seed: int) -> None:
    """Whether there is a point; and its multipliers refute what they name."""
    s = Setting("mlp", seed)
    rows, active = sampled(s)
    thresholds = rows.amax(0)
    thresholds[0] = rows[:, 0].quantile(0.2)
    search = searched(s, thresholds)
    relaxation, random = search.relaxation, np.random.default_rng(seed)
    agreed = confirmed = 0
    for some in active[:40]:
        signs = np.where(some, 1, -1).astype(np.int8) * random.integers(0, 2, len(some)).astype(np.int8)
        found = relaxation.check(signs, 10.0)
        other = relaxation._violation(10.0)
        assert other is not None and (found.refuted is None) is (other.refuted is None)
        agreed += found.refuted is not None
        if other.refuted is not None:
            used = np.where(other.refuted.used, signs, 0).astype(np.int8)
            confirmed += search.certifier.confirm(used, other.refuted).real
        elif other.point is not None:
            assert (np.abs(other.point) <= 1 + 1e-6).all() and relaxation.violates(other.point) in (True, False)
    assert confirmed > 0.8 * agreed > 0


@pytest.mark.parametrize("seed", range(1, 4))
def test_units_of_neurons_make_no_difference(seed: int) -> None:
    """The same network with its neurons and rows in other units: the same domains are refuted, by the same weights."""
    s = Setting("mlp", seed)
    rows, active = sampled(s)
    search = searched(s, rows.quantile(0.3, 0))
    plain, random = search.relaxation, np.random.default_rng(seed)
    net = compact(s.made.graph, s.made.backend, s.state.box, s.space, s.cases.spec, rows.quantile(0.3, 0).expand(
        s.cases.thresholds.shape))  # fmt: skip
    assert net is not None
    factor = torch.from_numpy(2.0 ** random.integers(-12, 13, net.size)).float().to(DEVICE)
    layers = tuple(
        replace(part, weight=part.weight * factor[part.columns, None] / factor[part.sources]) for part in net.layers
    )
    scaled = replace(
        net,
        layers=layers,
        bias=net.bias * factor,
        intercept=net.intercept * factor,
        input_weight=net.input_weight * factor[net.entry, None],
        rows=1024.0 * net.rows / factor,
        row_constant=1024.0 * net.row_constant,
        row_input=None if net.row_input is None else 1024.0 * net.row_input,
    )
    other = Relaxation(scaled, 0, s.cases.rows)
    refuted = 0
    for some in active[:30]:
        signs = np.where(some, 1, -1).astype(np.int8) * random.integers(0, 2, len(some)).astype(np.int8)
        one, two = plain.check(signs, 10.0).refuted, other.check(signs, 10.0).refuted
        assert (one is None) is (two is None)
        if two is not None:
            back = replace(two, rows=1024.0 * two.rows, beta=two.beta * factor[net.places].double().cpu().numpy())
            used = np.where(two.used, signs, 0).astype(np.int8)
            refuted += search.certifier.confirm(used, back).real
    assert refuted > 0


@pytest.mark.parametrize("gives_up", [False, True], ids=["", "the solver gives up"])
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
@pytest.mark.parametrize("kind", ["mlp", "deep-mlp"])
def test_learning_agrees_with_the_truth(kind: str, sat: bool, gives_up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_SLICE", 1 << 30)
    if gives_up:
        monkeypatch.setattr(Relaxation, "_solve", lambda self, seconds: None)
    for seed in range(2, 6):
        case, graph = truth(kind, seed, sat, 0.02), network(kind, seed, sat, 0.02).graph
        backend, shape = single(graph), (1, *graph.input_shape)
        box = Interval(case.lower.reshape(shape), case.upper.reshape(shape)).to(DEVICE)
        engine = Engine(graph, backend)
        state = crown_hidden(engine, initial_state(engine, box))
        y = torch.from_numpy(case.row).to(DEVICE).reshape(1, 1, *graph.output_shape)
        threshold = torch.full((1, 1), case.threshold, dtype=torch.float64, device=DEVICE)
        context = SearchContext(graph, backend, BabConfig(), Deadline(60.0))
        cases = CaseRows(Specification(y), threshold, {})
        if split_space(graph, backend, state.bounds).size:
            found = attempt.learn(context, state, cases)
            assert bool(found.refuted.all()) is not sat and found.statistics.programs > 0


def test_a_clause_names_what_was_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting("mlp", 2)
    rows, _ = sampled(s)
    search = searched(s, torch.cat([rows[:, :1].amin(0) - 0.01, rows.amax(0)[1:]]))
    certified: list[tuple[int, ...]] = []
    confirm = Certifier.confirm

    def noted(self: Certifier, signs: np.ndarray, found: Multipliers) -> Confirmed:
        split = np.flatnonzero(signs)
        certified.append(tuple(sorted((2 * split + (signs[split] > 0)).tolist())))
        return confirm(self, signs, found)

    monkeypatch.setattr(Certifier, "confirm", noted)
    search.run(4000)
    axioms = [c.literals for c in search.core.derivation if c.antecedents is None]
    assert axioms and all(tuple(sorted(a)) in certified for a in axioms)


def test_negative_weights_prove_nothing() -> None:
    s = Setting("mlp", 1)
    rows, active = sampled(s)
    search = searched(s, rows.amax(0) + 100 * (1 + rows.amax(0).abs()))  # every point is a counterexample
    size = len(active[0])
    nothing = np.zeros(size)
    found = Multipliers(-np.ones(rows.shape[1]), nothing, nothing - 1.0, nothing > 0)
    for signs in (nothing, np.where(active[0], 1, -1)):
        assert not search.certifier.confirm(signs.astype(np.int8), found).real


def test_a_derivation_that_is_not_confirmed_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search believes neither its core nor the solver."""
    s = Setting("mlp", 1)
    rows, _ = sampled(s)
    search = searched(s, rows.amin(0) - 10 * (1 + rows.amin(0).abs()))
    search._certified = _Nothing()  # type: ignore[assignment]
    assert search.run(4000) is End.STUCK
    again = searched(s, rows.amin(0) - 10 * (1 + rows.amin(0).abs()))
    assert again.run(4000) is End.REFUTED
    assert clauses.refutes(again.core.derivation, again._certified)


class _Nothing(set[int]):
    """Forgets what is put in."""

    def add(self, element: int) -> None:
        pass


# ------------------------------------------------------------------------------------------------------ what it covers


def easy(weak: bool, runs: bool) -> LearningSearch:
    """A case that some clauses refute."""
    s = Setting("mlp", 2)
    rows, _ = sampled(s)
    search = searched(s, torch.cat([rows[:, :1].amin(0) - 0.5, rows.amax(0)[1:]]))
    return replace(search, judge=Judge(lambda x: None, weak, runs))


def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates hold for the network in real arithmetic alone."""
    confirm = Certifier.confirm
    monkeypatch.setattr(Certifier, "confirm", lambda *arguments: replace(confirm(*arguments), sure=False))


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("sure", [False, True])
def test_clauses_cover_what_their_certificates_do(monkeypatch: pytest.MonkeyPatch, sure: bool, runs: bool) -> None:
    if not sure:
        unsure(monkeypatch)
    search = easy(weak=True, runs=runs)
    assert search.run(1 << 20) is End.REFUTED and search.clauses
    assert search.covered.weak == (0 if sure and runs else search.clauses)


@pytest.mark.parametrize("semantics", [Semantics.REAL, Semantics.FLOAT32])
def test_what_holds_for_the_real_network_alone_refutes_nothing_for_runs(
    monkeypatch: pytest.MonkeyPatch, semantics: Semantics
) -> None:
    unsure(monkeypatch)
    monkeypatch.setattr(attempt, "_SLICE", 1 << 30)
    s = Setting("mlp", 2)
    rows, _ = sampled(s)
    thresholds = torch.cat([rows[:, :1].amin(0) - 0.5, rows.amax(0)[1:]])[None]
    cases = replace(s.cases.select(torch.tensor([0])), thresholds=thresholds)
    context = SearchContext(s.made.graph, s.made.backend, BabConfig(), Deadline(60.0), claims=Claims(semantics))
    found = attempt.learn(context, s.state, cases)
    real = semantics is Semantics.REAL
    assert bool(found.refuted.all()) == real and (found.covered.weak > 0) == real


def test_learned_cases_count_for_what_the_search_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case is learned, the other one is searched again: both parts of the proof count, for runs as well."""
    s = Setting("mlp", 2)
    cases = s.cases.select(torch.tensor([0, 1]))
    rest = WeakDomains(s.state, cases, s.domains[:1], Covered(weak=0), 10)
    ends = [
        SearchResult(None, 5, "domain limit reached", stop=Stop.DOMAINS),
        SearchResult(None, 0, "", covered=Covered(weak=1), weak=rest),
    ]
    asked: list[CaseRows] = []

    def searched_again(context: SearchContext, state: object, rows: CaseRows, **options: object) -> SearchResult:
        asked.append(rows)
        return ends[len(asked) - 1]

    learned = attempt.Attempt(torch.tensor([True, False], device=DEVICE), covered=Covered(weak=3))
    monkeypatch.setattr(refine, "plan", lambda *sizes: [Stage(0.0, 1e-3), Stage(0.0, float("inf"))])
    monkeypatch.setattr(attempt, "worthwhile", lambda *asked: True)
    monkeypatch.setattr(attempt, "learn", lambda *asked: learned)
    monkeypatch.setattr(relu_split, "search", searched_again)
    context = SearchContext(s.made.graph, s.made.backend, BabConfig(), Deadline(60.0))
    found = refine.search(context, s.state, cases)
    assert [len(rows.thresholds) for rows in asked] == [2, 1]
    assert torch.equal(asked[1].thresholds, cases.thresholds[1:])
    assert not found.open and found.covered.weak == 4
    assert found.weak is not None and found.weak.covered.weak == 3
