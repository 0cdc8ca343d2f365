"""Branch and bound on input boxes: verdicts against exact truth, covers, certificates, cuts and limits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds.nets import Builder
from tests.support.device import DEVICE, array, single
from verifier.bab.boxes import (
    Hidden,
    _scatter,
    bound_boxes,
    cuttable,
    halve,
)
from verifier.bab.clip import combine, cut, halfspaces, least
from verifier.bab.context import SearchContext
from verifier.bab.domains import BoxDomains
from verifier.bab.input_split import InputSplitResult, search, varying_inputs
from verifier.bounds.crown import Specification
from verifier.bounds.engine import ROUNDED_32, ROUNDED_64, Arithmetic, Engine
from verifier.config import BabConfig
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.ops.shape import Reshape


def network(seed: int, n_in: int = 2, width: int = 12, n_out: int = 2, depth: int = 2) -> Graph:
    b, x = Builder((1, n_in), seed, gain=1.6), 0
    for _ in range(depth):
        x = b.relu(b.linear(x, width))
    b.linear(x, n_out)
    return Graph(tuple(b.nodes), len(b.nodes) - 1, b.parameters)


def smooth(seed: int, n_in: int = 2) -> Graph:
    from verifier.ops.sigmoid import Sigmoid

    b = Builder((1, n_in), seed, gain=1.6)
    x = b.op(Sigmoid(), b.linear(0, 8))
    b.linear(b.relu(b.linear(x, 8)), 2)
    return Graph(tuple(b.nodes), len(b.nodes) - 1, b.parameters)


def evaluate(graph: Graph, x: np.ndarray) -> np.ndarray:
    """Outputs in float64, (n, n_out)."""
    backend = single(graph)
    y = graph.forward(torch.from_numpy(x).to(DEVICE).double().reshape(-1, *graph.input_shape), backend.weights)
    assert isinstance(y, Tensor)
    return array(Graph.flat(y))


def problem(
    boxes: list[tuple[list[float], list[float]]],
    rows: list[list[float]],
    limits: list[float],
    cases: list[tuple[int, list[int]]],
) -> Problem:
    low = np.array([b[0] for b in boxes], np.float32)
    up = np.array([b[1] for b in boxes], np.float32)
    most = max((len(r) for _, r in cases), default=0)
    table = np.full((len(cases), most), -1, np.int64)
    for i, (_, chosen) in enumerate(cases):
        table[i, : len(chosen)] = chosen
    box = np.array([b for b, _ in cases], np.int64)
    return Problem(low, up, low, up, np.array(rows, np.float64), None, np.array(limits, np.float64), box, table)


def run(
    graph: Graph,
    question: Problem,
    certify: bool = True,
    seconds: float | None = 20.0,
    cases: np.ndarray | None = None,
    **settings: object,
) -> InputSplitResult:
    def accept(x: np.ndarray) -> Witness | None:
        y = evaluate(graph, x[None])[0]
        slack = question.margins(x[None], y[None])[0]
        for i in range(question.n_cases):
            box = question.case_box[i]
            inside = (x >= question.lower[box]).all() and (x <= question.upper[box]).all()
            if inside and all(slack[r] >= 0 for r in question.case_rows[i] if r >= 0):
                return Witness(x.astype(np.float64), y, case=i)
        return None

    config = BabConfig.model_validate(settings)
    chosen = np.arange(question.n_cases) if cases is None else cases
    backend = single(graph)
    deadline = Deadline(seconds)
    context = SearchContext(graph, backend, config, deadline, accept, certify=certify)
    return search(context, question, chosen)


def lattice(low: list[float], up: list[float], steps: int) -> np.ndarray:
    axes = [np.linspace(a, b, steps, dtype=np.float32) for a, b in zip(low, up, strict=True)]
    return np.stack(np.meshgrid(*axes), -1).reshape(-1, len(low))


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [network, smooth])
def test_thresholds_on_both_sides_of_the_minimum(make: type, seed: int, certify: bool) -> None:
    graph = make(seed)
    low, up = [-1.0, -1.0], [1.0, 1.0]
    row = [1.0, -0.7]
    dense = (evaluate(graph, lattice(low, up, 401)) @ row).min()
    # Slopes of these networks are below 40, so the lattice misses the minimum by at most 0.15.
    unsafe = problem([(low, up)], [row], [dense - 0.2], [(0, [0])])
    found = run(graph, unsafe, certify)
    assert found.witness is None and found.open.size == 0 and found.reason == ""
    planted = problem([(low, up)], [row], [dense + 1e-3], [(0, [0])])
    found = run(graph, planted, certify)
    assert found.witness is not None
    assert evaluate(graph, found.witness.inputs[None])[0] @ row <= dense + 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_several_rows_and_cases(seed: int) -> None:
    """Both outputs low at once: no single row refutes the case, and the lattice knows whether a point exists."""
    graph = network(seed)
    low, up = [-1.0, -1.0], [1.0, 1.0]
    y = evaluate(graph, lattice(low, up, 401))
    worst = y.max(1).min()
    refuted = problem(
        [(low, up), ([0.0, 0.0], [0.5, 0.5])], [[1, 0], [0, 1]], [worst - 0.2] * 2, [(0, [0, 1]), (1, [1, 0])]
    )
    assert run(graph, refuted).open.size == 0
    holds = problem(
        [([0.0, 0.0], [0.5, 0.5]), (low, up)], [[1, 0], [0, 1]], [worst + 1e-3] * 2, [(0, [0, 1]), (1, [0, 1])]
    )
    assert run(graph, holds).witness is not None


@pytest.mark.parametrize("clip", [True, False])
def test_without_cuts_the_answers_are_the_same(clip: bool) -> None:
    graph = network(3, n_in=3)
    low, up = [-0.5] * 3, [0.5] * 3
    least_value = evaluate(graph, lattice(low, up, 61))[:, 0].min()
    assert run(graph, problem([(low, up)], [[1, 0]], [least_value - 0.6], [(0, [0])]), clip=clip).open.size == 0
    found = run(graph, problem([(low, up)], [[1, 0]], [least_value + 0.01], [(0, [0])]), clip=clip)
    assert found.witness is not None


def test_many_boxes_with_one_bad_one() -> None:
    graph = network(1, n_in=1)
    edges = np.linspace(-1, 1, 3001, dtype=np.float32)
    y = evaluate(graph, edges[:, None])[:, 0]
    limits = np.minimum(y[:-1], y[1:]) - 0.05
    boxes = [([float(a)], [float(b)]) for a, b in pairwise(edges)]
    cases = [(i, [i]) for i in range(3000)]
    rows = [[1.0, 0.0]] * 3000
    found = run(graph, problem(boxes, rows, limits.tolist(), cases))
    assert found.open.size == 0 and found.totals.statistics.bounded >= 3000
    limits[1234] = y[1234:1236].mean()
    found = run(graph, problem(boxes, rows, limits.tolist(), cases))
    assert found.witness is not None
    assert edges[1234] <= found.witness.inputs[0] <= edges[1235]
    rest = np.delete(np.arange(3000), 1234)
    assert run(graph, problem(boxes, rows, limits.tolist(), cases), cases=rest).open.size == 0


def test_fixed_inputs_keep_the_values_of_their_box() -> None:
    graph = network(2, n_in=4)
    boxes = [([0.1, 0.2, -1.0, 0.3], [0.1, 0.2, 1.0, 0.3]), ([-0.4, 0.5, -1.0, 0.0], [-0.4, 0.5, 1.0, 0.0])]
    lows = []
    for low, up in boxes:
        x = np.repeat(np.array([low], np.float32), 2001, 0)
        x[:, 2] = np.linspace(low[2], up[2], 2001)
        lows.append(evaluate(graph, x)[:, 0].min())
    limits = [lows[0] - 0.05, lows[1] - 0.05]
    assert run(graph, problem(boxes, [[1, 0]] * 2, limits, [(0, [0]), (1, [1])])).open.size == 0
    limits[1] = lows[1] + 1e-3
    found = run(graph, problem(boxes, [[1, 0]] * 2, limits, [(0, [0]), (1, [1])]))
    assert found.witness is not None and found.witness.case == 1


def test_points_and_nothing() -> None:
    graph = network(5)
    point = [0.25, -0.5]
    value = float(evaluate(graph, np.array([point], np.float32))[0, 0])
    assert run(graph, problem([(point, point)], [[1, 0]], [value - 1e-4], [(0, [0])])).open.size == 0
    assert run(graph, problem([(point, point)], [[1, 0]], [value + 1e-4], [(0, [0])])).witness is not None
    tie = run(graph, problem([(point, point)], [[1, 0]], [value - 1e-17], [(0, [0])]))
    assert tie.witness is not None or (tie.open.tolist() == [0] and tie.reason)
    nothing = problem([(point, point)], [[1, 0]], [value], [(0, [0])])
    assert run(graph, nothing, cases=np.zeros(0, np.int64)).open.size == 0
    everything = problem([([0.0, 0.0], [1.0, 1.0])], [[1, 0]], [0.0], [(0, [])])
    assert run(graph, everything).witness is not None


def test_a_tie_is_never_proved() -> None:
    """A row that holds with equality everywhere: boxes end as single cells and stay open."""
    graph = network(7, n_in=1)
    # 0 y <= 0 holds everywhere, and nothing is accepted.
    question = problem([([0.0], [float(np.float32(1e-40))])], [[0, 0]], [0.0], [(0, [0])])
    backend = single(graph)
    found = search(SearchContext(graph, backend, BabConfig(), Deadline(20)), question, np.arange(1))
    assert found.witness is None and found.open.tolist() == [0] and found.reason


@pytest.mark.parametrize("coefficient", [0.1, 0.3, -0.7, -0.9])
def test_ties_of_rows_that_float32_does_not_hold(coefficient: float) -> None:
    """float32 rounds these coefficients away from the tie, and the row meets no op whose own rounding covers that."""
    b = Builder((1, 1), 0)
    b.op(Reshape((1,)), 0)
    graph = Graph(tuple(b.nodes), len(b.nodes) - 1, b.parameters)
    least = min(coefficient, 2 * coefficient)
    question = problem([([1.0], [2.0])], [[coefficient]], [least], [(0, [0])])
    assert run(graph, question).witness is not None
    found = run(graph, replace(question, row_d=np.array([least - 1e-12])))
    assert found.witness is None and found.open.size == 0


def test_limits_leave_cases_open() -> None:
    graph = network(0, n_in=3, width=24)
    question = problem([([-9.0] * 3, [9.0] * 3)], [[1, 0]], [-1e-3], [(0, [0])])
    backend = single(graph)

    few = BabConfig(max_domains=50, batch_size=4)
    found = search(SearchContext(graph, backend, few, Deadline(20)), question, np.arange(1))
    assert found.open.tolist() == [0] and "max_domains" in found.reason
    late = Deadline(0.0)
    found = search(SearchContext(graph, backend, BabConfig(), late), question, np.arange(1))
    assert found.open.tolist() == [0] and "time limit" in found.reason
    short = Deadline(0.5)
    found = search(SearchContext(graph, backend, BabConfig(), short), question, np.arange(1))
    assert found.open.tolist() == [0] and short.elapsed() < 3.0


def test_halves_cover_their_parent() -> None:
    random = torch.Generator().manual_seed(0)
    low = torch.randn(500, 3, generator=random)
    up = low + torch.rand(500, 3, generator=random) * 10.0 ** torch.randint(-9, 3, (500, 3), generator=random)
    parts = torch.arange(500), low, up, torch.zeros(500, dtype=torch.int16), torch.zeros(500)
    domains = BoxDomains(*(part.to(DEVICE) for part in parts))
    can = cuttable(domains.box)
    dim = torch.randint(0, 3, (500,), generator=random).to(DEVICE)
    keep = can[torch.arange(500, device=DEVICE), dim]
    assert 100 < int(keep.sum()) < 500
    domains, dim = domains[keep], dim[keep]
    halves = halve(domains, dim)
    n = domains.count
    at = torch.arange(n, device=DEVICE)
    left, right = halves[:n], halves[n:]
    assert torch.equal(left.upper[at, dim], right.lower[at, dim])
    assert torch.equal(left.lower, domains.lower) and torch.equal(right.upper, domains.upper)
    assert bool((left.upper[at, dim] < domains.upper[at, dim]).all())
    assert bool((right.lower[at, dim] > domains.lower[at, dim]).all())


@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
@pytest.mark.parametrize("arithmetic", [ROUNDED_32, ROUNDED_64])
@pytest.mark.parametrize("make", [network, smooth])
def test_rows_lie_below_the_network(make: type, arithmetic: Arithmetic, hidden: Hidden) -> None:
    """Bounds, rows and cuts of random boxes against samples: nothing that violates all rows is cut away."""
    graph = make(11)
    backend = single(graph)
    random = torch.Generator().manual_seed(1)
    centre = torch.randn(40, 2, generator=random)
    width = 10.0 ** (-4 * torch.rand(40, 1, generator=random))
    box = Interval(centre - width, centre + width * torch.rand(40, 2, generator=random)).to(DEVICE)
    spec = Specification(torch.tensor([[[[1.0, -0.5]], [[-0.3, 1.0]]]], dtype=torch.float64, device=DEVICE))
    shaped = Interval(box.lower[:, None], box.upper[:, None])
    found = bound_boxes(Engine(graph, backend, arithmetic=arithmetic), shaped, spec, hidden)
    share = torch.rand(40, 300, 2, generator=random, dtype=torch.float64)
    share[:, :4] = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    x = box.lower[:, None].double() + share.to(DEVICE) * (box.upper - box.lower)[:, None].double()
    x = torch.minimum(torch.maximum(x, box.lower[:, None].double()), box.upper[:, None].double())
    y = torch.from_numpy(evaluate(graph, array(x.reshape(-1, 2)))).reshape(40, 300, 2).to(DEVICE)
    value = torch.einsum("so,bpo->bps", spec.y[0, :, 0], y)
    assert bool((found.lower[:, None] <= value + 1e-12).all())
    # Thresholds that some samples meet.
    threshold = value.quantile(0.3, dim=1)
    rows, _ = combine(halfspaces(found.walk, threshold, box.to(torch.float64), torch.arange(2, device=DEVICE)), box)
    bad = (value <= threshold[:, None]).all(-1)
    assert int(bad.any(1).sum()) > 5
    cut_box = cut(rows, box)
    assert bool((cut_box.lower >= box.lower).all()) and bool((cut_box.upper <= box.upper).all())
    inside = ((x >= cut_box.lower[:, None]) & (x <= cut_box.upper[:, None])).all(-1)
    assert bool(inside[bad].all())
    assert not bool((least(rows, box) > 0).any(1)[bad.any(1)].any())


def test_the_sweep_covers_inputs_that_are_not_cut() -> None:
    """A fixed decimal has a width of one rounding, any width is covered."""
    graph = network(11, n_in=4)
    random = torch.Generator().manual_seed(3)
    low = torch.randn(20, 4, generator=random)
    box = Interval(low, low + torch.rand(20, 4, generator=random) * torch.tensor([0.5, 0.3, 0.0, 0.01])).to(DEVICE)
    shaped = Interval(box.lower[:, None], box.upper[:, None])
    spec = Specification(torch.tensor([[[[1.0, -0.5]], [[-0.3, 1.0]]]], dtype=torch.float64, device=DEVICE))
    cut = torch.tensor([0], device=DEVICE)
    found = bound_boxes(Engine(graph, single(graph), arithmetic=ROUNDED_32), shaped, spec, "linear", cut)
    share = torch.randint(0, 2, (20, 200, 4), generator=random).to(DEVICE)
    x = torch.where(share == 0, box.lower[:, None], box.upper[:, None])
    y = torch.from_numpy(evaluate(graph, array(x.reshape(-1, 4)))).reshape(20, 200, 2).to(DEVICE)
    value = torch.einsum("so,bpo->bps", spec.y[0, :, 0], y)
    assert bool((found.lower[:, None] <= value + 1e-12).all())


def test_what_rounding_alone_widened_is_fixed() -> None:
    third = np.float32(1 / 3)
    low = np.array([[0.0, third, 1.0], [0.5, third, 1.0]], np.float32)
    up = np.array([[1.0, np.nextafter(third, np.float32(1)), 1.0], [0.5, np.nextafter(third, np.float32(1)), 1.0]])
    question = problem(list(zip(low.tolist(), up.tolist(), strict=True)), [[1, 0]], [0.0], [(0, [0]), (1, [0])])
    assert question.free().tolist() == [[True, False, False], [False, True, False]]
    assert varying_inputs(question, np.array([0])).tolist() == [0]
    assert varying_inputs(question, np.array([0, 1])).tolist() == [0, 1]


def test_rows_summed_in_float64_are_rounded_outward() -> None:
    """Bounds of hidden neurons found in float64 go into float32 intervals: no nearest value may cut them."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn((3, 400), generator=random, dtype=torch.float64).to(DEVICE)
    elements = torch.arange(200, device=DEVICE)
    like = Interval(*(torch.full((3, 200), end, device=DEVICE) for end in (-9.0, 9.0)))
    found = _scatter(like, elements, rows, None)
    assert bool((found.lower.double() <= rows[:, :200]).all()) and bool((found.upper.double() >= -rows[:, 200:]).all())
    assert bool((found.upper - found.lower - (-rows[:, 200:] - rows[:, :200])).abs().max() < 1e-5)


def test_cuts_do_cut() -> None:
    graph = network(4)
    backend = single(graph)
    box = Interval(torch.tensor([[0.1, 0.1]]), torch.tensor([[0.2, 0.2]])).to(DEVICE)
    shaped = Interval(box.lower[:, None], box.upper[:, None])
    spec = Specification(torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64, device=DEVICE))
    found = bound_boxes(Engine(graph, backend), shaped, spec)
    middle = float(evaluate(graph, np.array([[0.15, 0.15]], np.float32))[0, 0])
    lowest = float(found.lower[0, 0])
    threshold = torch.tensor([[lowest + 0.1 * (middle - lowest)]], dtype=torch.float64, device=DEVICE)
    after = cut(halfspaces(found.walk, threshold, box.to(torch.float64), torch.arange(2, device=DEVICE)), box)
    assert float((after.upper - after.lower).prod()) < 0.5 * 0.01


def test_same_seed_same_figures() -> None:
    graph = network(8, n_in=3)
    question = problem([([-1.0] * 3, [1.0] * 3)], [[1, 0.5]], [-6.0], [(0, [0])])
    first, second = run(graph, question), run(graph, question)
    assert first.totals == second.totals


def test_cases_of_different_lengths() -> None:
    """The padding of a short case refutes nothing."""
    graph = network(6)
    low, up = [-1.0, -1.0], [1.0, 1.0]
    y = evaluate(graph, lattice(low, up, 401))
    rows, limits = [[1, 0], [0, 1]], [y[:, 0].min() + 1e-3, y[:, 1].min() - 0.2]
    refuted = problem([(low, up)], rows, limits, [(0, [1]), (0, [0, 1])])
    assert run(graph, refuted).open.size == 0
    holds = problem([(low, up)], rows, limits, [(0, [0]), (0, [0, 1])])
    found = run(graph, holds)
    assert found.witness is not None and found.witness.case == 0
