"""What a first look at neurons closes is spared thorough attacks and hidden slopes; the rest goes on from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from tests.bab.test_input_split import evaluate, network, problem
from tests.solver.test_root import forward
from tests.support.device import DEVICE, ON_DEVICE, single
from verifier.api import verify
from verifier.bab import refine
from verifier.bounds.crown import BoundState
from verifier.config import load_config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded
from verifier.core.problem import Problem
from verifier.core.result import Result, Verdict
from verifier.frontend.network import Network
from verifier.graph.graph import Graph
from verifier.solver import pipeline
from verifier.solver.phases import DeepenRoot, LookAtNeurons, Phase, RankState, SplitNeurons
from verifier.solver.root import Root, RootContext, bound_root, deepen

INPUTS = 24


def asked(graph: Graph, gap: float, radius: float = 0.15) -> tuple[Network, Problem]:
    """A row by so much below the least value that descents find."""
    x = (torch.rand(256, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 2 * radius
    store = single(graph).weights
    for step in range(60):
        x = x.to(DEVICE).requires_grad_()
        y = graph.forward(x.reshape(-1, *graph.input_shape), store)
        assert isinstance(y, torch.Tensor)
        (slope,) = torch.autograd.grad(y.flatten(1)[:, 0].sum(), x)
        x = (x.detach() - radius * 0.9**step * slope.sign()).clamp(-radius, radius)
    least = float(evaluate(graph, x.cpu().numpy())[:, 0].min())
    net = Network(graph, "net", graph.input_shape, graph.output_shape, np.dtype(np.float32), None, forward(graph))
    rows = [[1.0] + [0.0] * (graph.nodes[graph.output].size - 1)]
    return net, problem([([-radius] * INPUTS, [radius] * INPUTS)], rows, [least - gap], [(0, [0])])


def curved(seed: int) -> Graph:
    from tests.bounds.nets import Builder
    from verifier.ops.sigmoid import Tanh

    b = Builder((1, INPUTS), seed, gain=1.6)
    x = b.op(Tanh(), b.linear(0, 12))
    x = b.op(Tanh(), b.linear(x, 12))
    b.linear(x, 1)
    return b.graph()


def phases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes the names of attacks and of phases as they run."""
    seen: list[str] = []
    run_on_all, attack = pipeline.run_on_all, pipeline.methods.search

    def noted(state: RankState, phase: Phase[Any]) -> object:
        seen.append(phase.name)
        return run_on_all(state, phase)

    def attacked(target: Any, names: Iterable[str]) -> object:
        seen.append(f"attack of {target.config.restarts}")
        return attack(target, names)

    monkeypatch.setattr(pipeline, "run_on_all", noted)
    monkeypatch.setattr(pipeline.methods, "search", attacked)
    return seen


def answered(net: Network, question: Problem, **settings: object) -> Result:
    few = {"attack.restarts": 10, "attack.steps": 6, "attack.methods": "pgd", "threads": 1}
    return verify(net, question, {**few, **settings, **ON_DEVICE}, 60.0)


def test_what_a_look_closes_needs_no_thorough_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine.attempt, "worthwhile", lambda *_: False)
    net, question = asked(network(3, INPUTS, width=24, n_out=1, depth=2), 0.1)
    seen = phases(monkeypatch)
    found = answered(net, question)
    assert found.verdict is Verdict.UNSAT and found.statistics["relu_split"]["domains"] > 1
    assert seen[seen.index("bound") :][:2] == ["bound", "look_at_neurons"]
    assert [name for name in seen if name.startswith("attack")] == ["attack of 2"]


def test_a_look_that_closes_nothing_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search does the later stages only, on the bounds that the look has refined; its record counts both."""
    monkeypatch.setattr(refine.attempt, "worthwhile", lambda *_: False)
    monkeypatch.setattr(refine, "_FIRST", 0.02)
    monkeypatch.setattr(refine, "_LOOK", 0.05)
    monkeypatch.setattr(refine, "_FEW_ROUNDS", 0)
    kinds: list[tuple[bool, float]] = []
    relu_search, refined = refine.relu_split.search, refine.refine
    states: list[BoundState] = []

    def searching(context: Any, state: BoundState, cases: Any, **how: float) -> Any:
        kinds.append((bool(states) and state is states[-1], how["enough"]))
        return relu_search(context, state, cases, **how)

    def refining(context: Any, state: BoundState, seconds: float) -> BoundState:
        assert not states or state is states[-1]
        states.append(refined(context, state, seconds))
        return states[-1]

    monkeypatch.setattr(refine.relu_split, "search", searching)
    monkeypatch.setattr(refine, "refine", refining)
    net, question = asked(network(1, INPUTS, width=24, n_out=1, depth=4), 0.1, 0.3)
    seen = phases(monkeypatch)
    found = verify(net, question, {"attack.restarts": 5, "attack.steps": 3, "threads": 1, **ON_DEVICE}, 6.0)
    assert found.verdict is not Verdict.SAT
    after = seen[seen.index("look_at_neurons") + 1 :]
    assert after[0].startswith("attack of 5") and "split_neurons" in after
    stages = [enough for _, enough in kinds]
    assert stages == sorted(set(stages)) and len(stages) > 2  # none twice
    assert [own for own, _ in kinds] == [False] + [True] * (len(kinds) - 1)


def test_slopes_of_hidden_nodes_wait_for_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    net, question = asked(curved(1), 0.3)
    seen = phases(monkeypatch)
    found = answered(net, question)
    assert found.verdict is Verdict.UNSAT and found.statistics["value_split"]["domains"] > 1
    assert "deepen" not in seen and "split_neurons" not in seen and len(seen) == len(set(seen))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_put_off_ends_as_if_it_had_not_been(seed: int) -> None:
    graph = curved(seed)
    question, backend = asked(graph, 0.0, 0.5)[1], single(graph)
    config = load_config(values={"bounds.alpha.intermediate_iterations": 4})

    def context(puts_off: bool) -> RootContext:
        return RootContext(graph, backend, backend, config, 60.0, Deadline(), puts_off=puts_off)

    whole, first = (bound_root(context(later), question, np.arange(1)) for later in (False, True))
    assert (whole.steps, first.steps) == (0, 4) and whole.open.size
    later: Root = deepen(context(False), question, first, np.arange(1))
    assert later.steps == 0 and later.method == "alpha-crown"
    for index, bounds in later.state.bounds.items():
        old = first.state.bounds[index]
        assert (bounds.lower >= old.lower).all() and (bounds.upper <= old.upper).all()
        assert torch.equal(bounds.lower, whole.state.bounds[index].lower)
    assert later.gap == pytest.approx(whole.gap, rel=1e-9) and later.gap[0] > first.gap[0]
    assert later.rows is not None and later.rows.thresholds.device.type == DEVICE.type


def test_a_root_that_is_deepened_takes_the_place_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at one domain closes nothing."""
    monkeypatch.setattr("verifier.solver.phases._LOOK_DOMAINS", 1)
    net, question = asked(curved(1), 0.1)
    seen: list[Phase[Any]] = []
    run_on_all = pipeline.run_on_all

    def noted(state: RankState, phase: Phase[Any]) -> object:
        seen.append(phase)
        assert not isinstance(phase, SplitNeurons) or state.roots[phase.root].steps == 0
        return run_on_all(state, phase)

    monkeypatch.setattr(pipeline, "run_on_all", noted)
    found = answered(net, question, **{"bounds.alpha.intermediate_iterations": 2})
    assert found.verdict is Verdict.UNSAT and found.covers.real
    names = [phase.name for phase in seen]
    look, deeper = (next(p for p in seen if isinstance(p, kind)) for kind in (LookAtNeurons, DeepenRoot))
    assert names.index(look.name) < names.index(deeper.name) < names.index("split_neurons")
    assert found.statistics["root"]["method"] == "alpha-crown"


def test_a_look_whose_time_is_over_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise DeadlineExceeded("the look")

    monkeypatch.setattr(refine, "look", late)
    net, question = asked(network(3, INPUTS, width=24, n_out=1, depth=2), 0.1)
    seen = phases(monkeypatch)
    assert answered(net, question).verdict is Verdict.UNSAT
    assert seen.index("look_at_neurons") < seen.index("split_neurons")
