"""Branch and bound under tensor parallelism: ranks search in step, and verdicts are those of one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bab.test_input_split import evaluate, lattice, network, problem, smooth
from tests.bounds.nets import Builder
from tests.parallel.threads import ThreadGroup, on_ranks
from verifier.bab import input_split, relu_split
from verifier.bab.context import SearchContext
from verifier.config import Config, as_config
from verifier.core.backend import ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.parallel.single import SingleBackend
from verifier.parallel.tp import tensor_parallel
from verifier.solver.root import RootContext, bound_root

CPU = torch.device("cpu")
Accept = Callable[[np.ndarray], Witness | None]


@dataclass(frozen=True)
class Outcome:
    """What a search ended with."""

    verdict: str
    witness: bytes
    domains: float
    leaves: float = 0.0


def accepting(graph: Graph, question: Problem) -> Accept:
    def accept(x: np.ndarray) -> Witness | None:
        y = evaluate(graph, x[None])[0]
        slack = question.margins(x[None], y[None])[0]
        for i in range(question.n_cases):
            box = question.case_box[i]
            inside = (x >= question.lower[box]).all() and (x <= question.upper[box]).all()
            if inside and all(slack[r] >= 0 for r in question.case_rows[i] if r >= 0):
                return Witness(x.astype(np.float64), y, case=i)
        return None

    return accept


def neurons(
    graph: Graph, backend: ParallelBackend, question: Problem, config: Config, accept: Accept, seconds: float = 60.0
) -> Outcome:
    """Root bounds, then neuron splits."""
    deadline = Deadline(seconds)
    cases = np.arange(question.n_cases)
    root = bound_root(RootContext(graph, backend, backend, config, 60.0, deadline), question, cases)
    if not root.open.size:
        return Outcome("unsat", b"", 0)
    assert root.rows is not None
    context = SearchContext(graph, backend, config.bab, deadline, accept, memory_limit=1 << 30)
    found = relu_split.search(context, root.state, root.rows)
    verdict = "sat" if found.witness is not None else "unknown" if found.open else "unsat"
    witness = b"" if found.witness is None else found.witness.inputs.tobytes()
    return Outcome(verdict, witness, found.totals.statistics.bounded, found.totals.statistics.leaves)


def inputs(graph: Graph, backend: ParallelBackend, question: Problem, config: Config, accept: Accept) -> Outcome:
    cases = np.arange(question.n_cases)
    found = input_split.search(SearchContext(graph, backend, config.bab, Deadline(60.0), accept), question, cases)
    verdict = "sat" if found.witness is not None else "unknown" if found.open.size else "unsat"
    witness = b"" if found.witness is None else found.witness.inputs.tobytes()
    return Outcome(verdict, witness, float(found.totals.statistics.bounded))


def both(
    run: Callable[[Graph, ParallelBackend, Problem, Config, Accept], Outcome],
    graph: Graph,
    question: Problem,
    ranks: int,
    **settings: object,
) -> tuple[Outcome, Outcome]:
    """One device's outcome and that of a group, whose ranks all end alike."""
    config = as_config(settings)
    accept = accepting(graph, question)
    alone = run(graph, SingleBackend(graph, CPU), question, config, accept)

    def work(group: ThreadGroup) -> Outcome:
        backend = tensor_parallel(graph, group, CPU)
        return run(backend.graph, backend, question, config, accept)

    found = on_ranks(ranks, work)
    assert all(f == found[0] for f in found)
    return alone, found[0]


def residual(seed: int) -> Graph:
    b = Builder((1, 4, 4), seed, gain=1.5)
    x = b.relu(b.conv(0, 3, padding=1))
    y = b.conv(b.relu(b.conv(x, 3, padding=1)), 3, padding=1)
    x = b.relu(b.add(x, y))
    b.linear(b.flat(x), 2)
    return b.graph()


def deep(seed: int) -> Graph:
    b = Builder((3,), seed, gain=1.8)
    x = b.relu(b.linear(0, 11))
    x = b.relu(b.linear(x, 10))
    x = b.relu(b.linear(x, 9))
    b.linear(x, 2)
    return b.graph()


def near_minimum(graph: Graph, radius: float, below: float) -> tuple[Problem, float]:
    """A threshold just below (unsat, if the search of minima is good) or above the least value that points reach."""
    n = int(np.prod(graph.input_shape))
    row = [1.0, -0.7]
    random = np.random.default_rng(0)
    points = random.uniform(-radius, radius, (20000, n)).astype(np.float32)
    x = torch.from_numpy(points[np.argsort(evaluate(graph, points) @ row)[:50]]).double()
    store = SingleBackend(graph, CPU).weights
    for _ in range(200):
        x.requires_grad_(True)
        y = graph.forward(x.reshape(-1, *graph.input_shape), store)
        assert isinstance(y, Tensor)
        value = Graph.flat(y) @ torch.tensor(row, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        x = (x.detach() - 0.01 * radius * gradient.sign()).clamp(-radius, radius)
    least = float((evaluate(graph, x.detach().float().numpy()) @ row).min())
    box = ([-radius] * n, [radius] * n)
    return problem([box], [row], [least - below], [(0, [0])]), least


@pytest.mark.parametrize(("seed", "ranks", "branching"), [(0, 2, "babsr"), (1, 3, "kfsb"), (0, 4, "kfsb")])
def test_neuron_splits_prove_alike(seed: int, ranks: int, branching: str) -> None:
    graph = deep(seed)
    question, least = near_minimum(graph, 0.7, 0.2)
    # One rank alone would leave the hidden slopes to the refinement, which is not asked for here.
    settings = {"bounds.alpha.iterations": 5, "bounds.alpha.intermediate_iterations": 20}
    alone, group = both(neurons, graph, question, ranks, **settings, **{"bab.branching": branching})
    assert alone.verdict == group.verdict == "unsat", least
    # One device may bound domains on a compact network, and so take another way.
    assert alone.domains > 1 and group.domains > 1


def test_neuron_splits_of_a_residual_network() -> None:
    graph = residual(1)
    question, _ = near_minimum(graph, 0.05, 0.1)
    alone, group = both(neurons, graph, question, 2, **{"bounds.alpha.iterations": 5})
    assert alone.verdict == group.verdict == "unsat"
    assert alone.domains > 1


@pytest.mark.parametrize(("seed", "ranks"), [(0, 2), (1, 3)])
def test_counterexamples_are_found_alike(seed: int, ranks: int) -> None:
    graph = deep(seed)
    question, _ = near_minimum(graph, 0.7, -0.05)
    alone, group = both(neurons, graph, question, ranks, **{"bounds.alpha.iterations": 5})
    assert alone.verdict == group.verdict == "sat"


@pytest.mark.parametrize("ranks", [2, 3])
def test_decided_leaves(ranks: int) -> None:
    """Without optimisation and with few neurons the search reaches leaves, whose programs one rank solves for all."""
    b = Builder((2,), 5, gain=2.0)
    b.linear(b.relu(b.linear(b.relu(b.linear(0, 3)), 3)), 2)
    graph = b.graph()
    question, _ = near_minimum(graph, 1.0, 0.01)
    settings = {"bab.iterations": 0, "bounds.alpha.iterations": 0, "bounds.alpha.intermediate_iterations": 0}
    alone, group = both(neurons, graph, question, ranks, **settings)
    assert alone.leaves > 0 and group.leaves > 0
    assert alone.verdict == group.verdict == "unsat"


def test_several_cases_and_rows() -> None:
    graph = deep(3)
    _, least = near_minimum(graph, 0.5, 0.03)
    box = ([-0.5] * 3, [0.5] * 3)
    rows, limits = [[1.0, -0.7], [-1.0, 0.2], [0.3, 1.0]], [least - 0.3, -4.0, -4.0]
    several = problem([box], rows, limits, [(0, [0]), (0, [1, 2]), (0, [2])])
    alone, group = both(neurons, graph, several, 3, **{"bounds.alpha.iterations": 3})
    assert alone.verdict == group.verdict == "unsat"


@pytest.mark.parametrize("make", [network, smooth])
@pytest.mark.parametrize(("seed", "ranks"), [(0, 2), (1, 3)])
def test_input_splits(make: Callable[[int], Graph], ranks: int, seed: int) -> None:
    graph = make(seed)
    low, up = [-1.0, -1.0], [1.0, 1.0]
    row = [1.0, -0.7]
    dense = (evaluate(graph, lattice(low, up, 401)) @ row).min()
    # Slopes of these networks are below 40, so the lattice misses the minimum by at most 0.15.
    for limit, verdict in ((dense - 0.2, "unsat"), (dense + 1e-3, "sat")):
        question = problem([(low, up)], [row], [limit], [(0, [0])])
        alone, group = both(inputs, graph, question, ranks)
        assert alone.verdict == group.verdict == verdict
        assert group.domains == pytest.approx(alone.domains, rel=0.5, abs=16)


def test_many_inputs_by_intervals() -> None:
    """Too many varying inputs for the linear sweep."""
    b = Builder((1, 40), 2, gain=1.0)
    b.linear(b.relu(b.linear(b.relu(b.linear(0, 16)), 8)), 2)
    graph = b.graph()
    question = problem([([-0.01] * 40, [0.01] * 40)], [[1.0, 0.0]], [-9.0], [(0, [0])])
    alone, group = both(inputs, graph, question, 2)
    assert alone.verdict == group.verdict == "unsat"


def test_a_time_limit_ends_all_ranks() -> None:
    """Ranks leave the search at the same round although their clocks differ."""
    graph = deep(1)
    question, _ = near_minimum(graph, 0.7, 1e-7)
    config = as_config({"bounds.alpha.iterations": 2, "bab.iterations": 2, "bab.leaf_lp": False})
    accept = accepting(graph, question)

    def work(group: ThreadGroup) -> Outcome:
        backend = tensor_parallel(graph, group, CPU)
        return neurons(backend.graph, backend, question, config, accept, seconds=2.0 if group.rank == 1 else 1e4)

    found = on_ranks(2, work)
    assert found[0] == found[1]
    assert found[0].verdict in ("unknown", "unsat")
