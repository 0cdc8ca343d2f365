"""The linear program at leaves: what it closes is refuted, what can be closed by a margin is closed."""

from __future__ import annotations

import time
from dataclasses import replace

import highspy
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from tests.bounds.nets import Builder, Case, case, make
from tests.support.device import DEVICE, array
from verifier.bab import highs
from verifier.bab.highs import Solved, WarmStarts
from verifier.bab.leaf_lp import LeafResult, LeafRows, LeafSolver
from verifier.bounds.crown import BoundState, Specification, crown_hidden
from verifier.bounds.engine import Engine
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.ops.relu import Relu

NAMES = ["mlp", "conv", "residual", "preactivation", "shared", "concat"]
ROWS = 3


class Leaf:
    """The leaf around a point: the signs of all neurons that the root leaves undecided."""

    def __init__(self, name: str, seed: int, radius: float = 0.3, flips: int = 0) -> None:
        self.case = make(name, seed, radius=radius)
        graph = self.case.graph
        self.state = crown_hidden(Engine(graph, self.case.backend), self.case.state())
        self.point = self.case.samples(3, seed)[2:]
        random = np.random.default_rng(seed)
        self.signs: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for node in graph.nodes:
            if isinstance(node.op, Relu):
                index = node.inputs[0]
                if index not in seen:
                    bounds = self.state.bounds[index]
                    value = self.case.values(self.point)[index][0]
                    free = (bounds.lower < 0) & (bounds.upper > 0)
                    sign = torch.where(free, torch.where(value > 0, -1.0, 1.0), 0.0)
                    places = free.flatten().nonzero()[:, 0]
                    for k in random.permutation(len(places))[:flips]:
                        sign.view(-1)[places[k]] *= -1
                    seen[index] = sign.float()[:, None]
                self.signs[node.index] = seen[index]
        rng = torch.Generator().manual_seed(seed)
        y = torch.randn((1, ROWS, *graph.output_shape), generator=rng, dtype=torch.float64)
        x = torch.randn((1, ROWS, *graph.input_shape), generator=rng, dtype=torch.float64) * (seed % 2)
        self.spec = Specification(y.to(DEVICE), x.to(DEVICE))

    def solve(self, thresholds: Tensor, seconds: float = 20.0) -> LeafResult:
        solver = LeafSolver(self.case.graph, self.case.backend)
        return solver.solve(self.state, self.signs, LeafRows(self.spec, thresholds), Deadline(seconds))

    def rows(self, points: Tensor) -> Tensor:
        """(count, ROWS) values at points (count, 1, *input_shape)."""
        assert self.spec.x is not None
        out = self.case.values(points)[self.case.graph.output]
        value = torch.einsum("nbo,so->ns", out.flatten(2), self.spec.y[0].flatten(1))
        return value + torch.einsum("nbi,si->ns", points.flatten(2), self.spec.x[0].flatten(1))

    def members(self, points: Tensor) -> Tensor:
        """Which points satisfy every split."""
        values = self.case.values(points)
        inside = torch.ones(points.shape[0], dtype=torch.bool, device=DEVICE)
        for node in self.case.graph.nodes:
            if node.index in self.signs:
                z = values[node.inputs[0]][:, 0].flatten(1)
                inside &= (self.signs[node.index].flatten() * z <= 0).all(1)
        return inside


def truth(leaf: Leaf, thresholds: np.ndarray) -> float | None:
    """Least value of max over rows of (row - d) on the leaf, from Jacobians of the masked network; None: empty."""
    made = leaf.case
    point = leaf.point[0].detach().clone()
    graph = made.graph
    masks = {}
    for node in graph.nodes:
        if isinstance(node.op, Relu):
            bounds = leaf.state.bounds[node.inputs[0]]
            sign = leaf.signs[node.index][0]
            masks[node.index] = torch.where(sign != 0, (sign < 0).double(), (bounds.lower >= 0).double())

    def network(x: Tensor) -> Tensor:
        values = {0: x[None]}
        parts = []
        for node in graph.nodes[1:]:
            if node.index in masks:
                z = values[node.inputs[0]]
                values[node.index] = z * masks[node.index]
                parts.append((leaf.signs[node.index][0].double() * z).flatten())
            else:
                with made.backend.weights.fetch(node.op.handles, torch.float64) as p:
                    values[node.index] = node.op.forward([values[i] for i in node.inputs], p)
        assert leaf.spec.x is not None
        y = leaf.spec.y[0].flatten(1) @ values[graph.output].flatten() + leaf.spec.x[0].flatten(1) @ x.flatten()
        return torch.cat([y, *parts])

    x0 = point[0]
    jacobian = array(torch.autograd.functional.jacobian(network, x0).flatten(1))
    constant = array(network(x0)) - jacobian @ array(x0.flatten())
    n = jacobian.shape[1]
    low, up = (array(t.flatten().double()) for t in made.box)
    above = np.append(-np.ones(ROWS), np.zeros(len(constant) - ROWS))[:, None]
    right = -constant
    right[:ROWS] += thresholds
    found = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=np.hstack([jacobian, above]),
        b_ub=right,
        bounds=[*zip(low, up, strict=True), (None, None)],
    )
    return None if found.status == 2 else float(found.fun)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_closes_exactly_what_is_refuted(name: str, seed: int) -> None:
    leaf = Leaf(name, seed)
    zero = torch.zeros(ROWS, dtype=torch.float64, device=DEVICE)
    least = truth(leaf, array(zero))
    assert least is not None
    scale = 1e-6 * (1 + abs(least))
    below = leaf.solve(zero + least - scale)
    assert below.closed and below.bound > 0 and below.candidate is None
    assert below.bound <= 1.01 * scale
    above = leaf.solve(zero + least + scale)
    assert not above.closed and above.candidate is not None
    x = torch.from_numpy(above.candidate).to(DEVICE).reshape(1, 1, *leaf.case.graph.input_shape)
    assert bool((x >= leaf.case.box.lower.double()).all() and (x <= leaf.case.box.upper.double()).all())
    assert float((leaf.rows(x) - (least + scale)).max()) <= 1e-5 * (1 + abs(least))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["mlp", "residual", "shared"])
def test_leaves_with_random_signs(name: str, seed: int) -> None:
    """Most of these are empty: they close whatever the thresholds; the others behave as above."""
    leaf = Leaf(name, seed, radius=1.0, flips=2)
    least = truth(leaf, np.zeros(ROWS))
    high = leaf.solve(torch.full((ROWS,), 1e3, dtype=torch.float64, device=DEVICE))
    if least is None:
        assert high.closed and high.bound == np.inf
    elif not high.closed:
        assert leaf.solve(torch.full((ROWS,), least - 1e-4, dtype=torch.float64, device=DEVICE)).closed


@pytest.mark.parametrize("seed", range(30))
def test_points_of_closed_leaves_refute_a_row(seed: int) -> None:
    leaf = Leaf("mlp", seed, radius=0.6)
    points = leaf.point + 0.2 * (leaf.case.samples(2000, seed + 1) - leaf.point)
    points = points[leaf.members(points)]
    values = leaf.rows(points)
    for quantile in (0.0, 0.3, 0.9):
        thresholds = values.quantile(quantile, dim=0)
        if leaf.solve(thresholds).closed:
            assert bool((values > thresholds).any(1).all())


def test_a_single_neuron_decides_emptiness() -> None:
    """z = x on [-1, 1] with splits x >= 0 and -x >= 0.5 of two neurons: empty, whatever the row says."""
    builder = Builder((1,), 0)
    z = builder.linear(0, 2)
    layer = builder.nodes[z].op
    builder.parameters[layer.handles[0]] = torch.tensor([[1.0], [-1.0]])
    builder.parameters[layer.handles[1]] = torch.tensor([0.0, -0.5])
    builder.linear(builder.relu(z), 1)
    one = torch.ones(1, 1)
    made = case(builder.graph(), Interval(-one, one))
    spec = Specification(torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE))
    threshold = torch.full((1,), 1e6, dtype=torch.float64, device=DEVICE)
    for signs, empty in (([-1.0, -1.0], True), ([-1.0, 1.0], False), ([1.0, -1.0], False), ([1.0, 1.0], False)):
        given = {2: torch.tensor(signs, device=DEVICE).reshape(1, 1, 2)}
        solver = LeafSolver(made.graph, made.backend)
        found = solver.solve(made.state(), given, LeafRows(spec, threshold), Deadline(10))
        assert found.closed == empty


def garbage(leaf: Leaf, seed: int) -> object:
    """A stand-in for the solver: any duals, any status."""
    random = np.random.default_rng(seed)

    def solver(self: object, cost: np.ndarray, rows: np.ndarray, right: np.ndarray, *_: object) -> Solved:
        duals = random.standard_normal(len(right)) * 10.0 ** random.integers(-6, 9)
        if seed % 4 == 0:
            duals[random.integers(len(duals))] = random.choice([np.nan, np.inf, -np.inf])
        infeasible = bool(random.random() < 0.5)
        point = None if infeasible or random.random() < 0.3 else random.standard_normal(len(cost)) * 10
        return Solved(infeasible, point, duals if random.random() < 0.9 else None, 0)

    return solver


@pytest.mark.parametrize("seed", range(60))
def test_wrong_duals_prove_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = Leaf("mlp", seed % 5, radius=0.6)
    value = leaf.rows(leaf.point)[0]
    monkeypatch.setattr(WarmStarts, "minimise", garbage(leaf, seed))
    # The leaf's own point satisfies every row with equality, so nothing may close the leaf.
    found = leaf.solve(value)
    assert not found.closed and not found.bound > 1e-9
    if found.candidate is not None:
        x = torch.from_numpy(found.candidate).to(DEVICE).reshape(leaf.case.box.lower.shape)
        assert bool((x >= leaf.case.box.lower.double()).all() and (x <= leaf.case.box.upper.double()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bounds_or_thresholds_that_are_not_numbers_close_nothing(value: float) -> None:
    leaf = Leaf("mlp", 1)
    low = torch.full((ROWS,), -1e6, dtype=torch.float64, device=DEVICE)
    assert leaf.solve(low).closed
    assert not leaf.solve(torch.full_like(low, value)).closed
    y = leaf.spec.y.clone()
    y[:] = value
    leaf.spec = replace(leaf.spec, y=y)
    assert not leaf.solve(low).closed


def test_no_time_left() -> None:
    leaf = Leaf("conv", 0)
    found = leaf.solve(torch.full((ROWS,), -1e6, dtype=torch.float64, device=DEVICE), seconds=0.0)
    assert found == LeafResult(False, None, -np.inf)


def test_the_solver_stops_at_the_deadline() -> None:
    """A program that takes far longer than the time it is given."""
    builder = Builder((600,), 0)
    x = builder.relu(builder.linear(0, 900))
    builder.linear(x, 30)
    one = torch.ones(1, 600)
    made: Case = case(builder.graph(), Interval(-one, one))
    state: BoundState = made.state()
    z = made.values(made.samples(1))[1][0]
    signs = {2: torch.where(z > 0, -1.0, 1.0)[:, None]}
    spec = Specification(torch.eye(30, dtype=torch.float64, device=DEVICE)[None])
    thresholds = torch.zeros(30, dtype=torch.float64, device=DEVICE)
    deadline = Deadline(1.0)
    start = time.monotonic()
    LeafSolver(made.graph, made.backend).solve(state, signs, LeafRows(spec, thresholds), deadline)
    assert time.monotonic() - start < 4.0


def test_leaves_that_are_alike_start_where_the_one_before_ended() -> None:
    """From the basis of the program before it a program takes fewer steps, and comes to the same end."""
    random = np.random.default_rng(0)
    rows, right = random.normal(size=(60, 21)), 1 - 0.1 * random.normal(size=60)
    rows[:, -1] = np.where(np.arange(60) < 5, -1.0, 0.0)
    cost, box = np.append(np.zeros(20), 1.0), np.append(np.ones(20), np.inf)
    starts = WarmStarts()
    cold = first = starts.minimise(cost, rows, right, (-box, box), 10.0)
    for _ in range(5):
        changed = rows + 1e-3 * random.normal(size=rows.shape) * (rows != 0)
        cold = WarmStarts().minimise(cost, changed, right, (-box, box), 10.0)
        warm = starts.minimise(cost, changed, right, (-box, box), 10.0)
        assert cold.point is not None and warm.point is not None
        assert warm.iterations < cold.iterations / 2
        assert abs(cold.point[-1] - warm.point[-1]) < 1e-6
    assert first.iterations > 0
    # Programs of other shapes, and ones without any point, start afresh.
    assert starts.minimise(cost, rows[:30], right[:30], (-box, box), 10.0).point is not None
    assert starts.minimise(cost, rows, right - 100, (-box, box), 10.0).infeasible


def test_the_solver_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    Leaf("mlp", 0).solve(torch.zeros(ROWS, dtype=torch.float64, device=DEVICE))
    assert capfd.readouterr() == ("", "")


def test_what_the_solver_cannot_say_is_tried_without_a_start_and_then_called_infeasible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The elastic program decides; its certificate is what closes a leaf."""
    rows, right, cost, box = np.array([[1.0, -1.0]]), np.zeros(1), np.array([0.0, 1.0]), np.array([1.0, np.inf])
    starts, solver = WarmStarts(), highs._solver
    assert starts.minimise(cost, rows, right, (-box, box), 10.0).point is not None
    begun = []

    class Unsure:
        def getModelStatus(self) -> object:
            return highspy.HighsModelStatus.kUnknown

    def unsure(model: object, basis: object, seconds: float) -> object:
        begun.append(basis is not None)
        return Unsure() if len(begun) != 2 else solver(model, basis, seconds)

    monkeypatch.setattr(highs, "_solver", unsure)
    assert starts.minimise(cost, rows, right, (-box, box), 10.0).point is not None
    assert begun == [True, False]
    begun[:] = [False, False]
    assert WarmStarts().minimise(cost, rows, right, (-box, box), 10.0).infeasible
