"""Small networks against exact truth: bounds never pass the exact minimum, verdicts are never the wrong one."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tests.support.device import DEVICE, ON_DEVICE, single
from tests.support.networks import KINDS
from tests.support.planted import Planted, planted
from verifier.api import verify
from verifier.bab.bounder import Bounder, WalkBounder
from verifier.bab.branching import neurons, probing
from verifier.bab.domains import NeuronDomains
from verifier.bab.kernel import Kernel
from verifier.bounds.alpha import Schedule, alpha_hidden, alpha_rows
from verifier.bounds.crown import BoundState, Specification, crown_hidden, crown_rows, initial_state
from verifier.bounds.engine import Engine
from verifier.core import folders
from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.core.result import Result, Verdict
from verifier.frontend.network import Network, from_module

NAMES = sorted(KINDS)
PLAIN = ["mlp", "deep-mlp", "shared"]  # the exact solver needs milliseconds for these, seconds for the others
PLANTED = [(kind, 0.02) for kind in NAMES] + [(kind, 1e-5) for kind in PLAIN]

# One way of searching each; the attack is off so that nothing but the search can answer.
SEARCHES = {
    **{name: {"bab.branching": name} for name in folders.HEURISTICS},
    # Every side of every split is tried before a domain is split.
    "probed": {"bab.branching": "kfsb", "bab.probes": 1000},
    "unprobed": {"bab.branching": "kfsb", "bab.probes": 0},
    "input": {"bab.branching": "input"},
    # Nothing is optimised: splits go on until every neuron is decided, and the leaf programs do the rest.
    "leaves": {
        "bab.branching": "babsr",
        "bab.iterations": 0,
        "bounds.alpha.iterations": 0,
        "bounds.alpha.intermediate_iterations": 0,
    },
    "no-leaf-lp": {"bab.branching": "babsr", "bab.leaf_lp": False},
}


@functools.cache
def truth(kind: str, seed: int, sat: bool, gap: float = 0.02) -> Planted:
    return planted(kind, seed, sat, gap)


@functools.cache
def network(kind: str, seed: int, sat: bool, gap: float = 0.02) -> Network:
    case = truth(kind, seed, sat, gap)
    return from_module(case.network, input_shape=(1, *case.network.input_shape))


def problem(case: Planted) -> Problem:
    low, up = (t.flatten().numpy()[None] for t in (case.lower, case.upper))
    return Problem(
        lower=low,
        upper=up,
        witness_lower=low,
        witness_upper=up,
        row_y=case.row[None],
        row_x=None,
        row_d=np.array([case.threshold]),
        case_box=np.zeros(1, dtype=np.int64),
        case_rows=np.zeros((1, 1), dtype=np.int64),
    )


def search(kind: str, seed: int, sat: bool, gap: float, settings: dict[str, object]) -> Result:
    values = {"attack.enabled": False, "threads": 1, **ON_DEVICE, **settings}
    return verify(network(kind, seed, sat, gap), problem(truth(kind, seed, sat, gap)), values, timeout=60.0)


def holds(case: Planted, result: Result) -> bool:
    """Whether the witness lies in the box and violates the property by the network's own float32 arithmetic."""
    assert result.witness is not None
    x = torch.from_numpy(result.witness.inputs.astype(np.float32)).reshape(case.lower.shape)
    inside = bool((x >= case.lower).all() and (x <= case.upper).all())
    value = float(case.network(x[None]).detach().flatten().double().numpy() @ case.row)
    return inside and value <= case.threshold + 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "seed"), [(k, 1) for k in NAMES] + [(k, s) for k in PLAIN for s in range(2, 10)])
def test_bounds_stay_below_the_minimum(kind: str, seed: int) -> None:
    case = truth(kind, seed, True)
    least = case.threshold - case.gap  # the exact minimum, attained at case.point
    graph = network(kind, seed, True).graph
    backend = single(graph)
    shape = (1, *graph.input_shape)
    box = Interval(case.lower.reshape(shape), case.upper.reshape(shape)).to(DEVICE)
    state = initial_state(Engine(graph, backend), box)
    spec = Specification(torch.from_numpy(case.row).to(DEVICE).reshape(1, 1, *graph.output_shape))
    found: list[float] = []

    def note(state: BoundState) -> None:
        plain, _ = crown_rows(Engine(graph, backend), state, spec)
        best = alpha_rows(Engine(graph, backend), state, spec, Schedule(10))
        again, _ = crown_rows(Engine(graph, backend), state, spec, best.parameters)
        found.extend([float(plain), float(again)])
        # At the minimiser every node's value lies in its bounds.
        point = torch.from_numpy(case.point).to(DEVICE).reshape(shape)
        values = graph.forward(point, backend.weights, range(len(graph.nodes)))
        assert isinstance(values, dict)
        for i, b in state.bounds.items():
            room = 1e-7 * (1 + values[i].abs())  # the minimiser may leave the float32 box by a rounding
            assert bool(((values[i] >= b.lower - room) & (values[i] <= b.upper + room)).all())

    note(state)
    state = crown_hidden(Engine(graph, backend), state)
    note(state)
    note(alpha_hidden(Engine(graph, backend), state, Schedule(5)))
    assert all(value <= least + 1e-9 * (1 + abs(least)) for value in found)
    assert max(found) > -np.inf


@pytest.mark.sampled(3)
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
@pytest.mark.parametrize(("kind", "gap"), PLANTED)
def test_verdicts(kind: str, sat: bool, gap: float) -> None:
    result = search(kind, 1, sat, gap, {"attack.enabled": True})
    assert result.verdict == (Verdict.SAT if sat else Verdict.UNSAT), result.reason
    assert not sat or holds(truth(kind, 1, sat, gap), result)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("how", sorted(SEARCHES))
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
@pytest.mark.parametrize("kind", [*PLAIN, "preactivation"])
def test_every_search_is_right_or_undecided(kind: str, sat: bool, how: str) -> None:
    for seed in (2, 3, 4) if kind in PLAIN else (1,):
        result = search(kind, seed, sat, 0.02, SEARCHES[how])
        wrong = Verdict.UNSAT if sat else Verdict.SAT
        assert result.verdict not in (wrong, Verdict.ERROR), result.reason
        if result.verdict is Verdict.SAT:
            assert holds(truth(kind, seed, sat), result)
        if how in (*folders.HEURISTICS, "probed", "unprobed", "leaves") and not sat:
            assert result.verdict is Verdict.UNSAT, result.reason


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 20])
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
def test_phases_follow_from_certified_sides_alone(sat: bool, iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that call every side refuted: only the float64 certificates stand between them and a wrong proof."""

    def refuted(self: Bounder, domains: NeuronDomains) -> torch.Tensor:
        return torch.ones(domains.count, device=DEVICE)

    for bounder in (Kernel, WalkBounder):
        monkeypatch.setattr(bounder, "evaluate", refuted)
    monkeypatch.setattr(probing, "_NEAR", -np.inf)
    monkeypatch.setattr(probing, "_WORTH", -np.inf)
    # One column per round, so that there are domains to probe in trees as small as these.
    monkeypatch.setattr(neurons, "_MOST_DEPTH", 1)
    settings = {"bab.branching": "kfsb", "bab.probes": 1000, "bab.iterations": iterations}
    if not iterations:
        settings |= {"bounds.alpha.iterations": 0, "bounds.alpha.intermediate_iterations": 0}
    forced = unsure = 0
    for kind in PLAIN:
        for seed in range(1, 7):
            result = search(kind, seed, sat, 1e-5, settings)
            assert result.verdict is (Verdict.SAT if sat else Verdict.UNSAT), (kind, seed, result.reason)
            found = result.statistics.get("relu_split", {})
            forced, unsure = forced + found.get("forced", 0), unsure + found.get("uncertified", 0)
    assert (forced > 0 and unsure > 0) or (sat and iterations)  # where the minimiser is a counterexample at once


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 8))
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
def test_thresholds_a_hair_from_the_minimum(sat: bool, seed: int) -> None:
    """A gap just above the exact solver's tolerance: undecided is allowed, wrong is not."""
    for kind in PLAIN:
        result = search(kind, seed, sat, 3e-6, {})
        assert result.verdict is not (Verdict.UNSAT if sat else Verdict.SAT)


@pytest.mark.slow
@pytest.mark.parametrize("sat", [True, False], ids=["sat", "unsat"])
def test_leaf_programs_decide(sat: bool) -> None:
    """Without optimisation a threshold just beside the minimum is decided at leaves alone."""
    leaves = 0
    for kind in PLAIN:
        for seed in range(1, 5):
            result = search(kind, seed, sat, 1e-5, SEARCHES["leaves"])
            assert result.verdict is (Verdict.SAT if sat else Verdict.UNSAT), (kind, seed, result.reason)
            leaves += result.statistics.get("relu_split", {}).get("leaves", 0)
    assert leaves > 0
