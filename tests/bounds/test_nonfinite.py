"""What is not a number, or infinite, proves nothing: neither in the parameters nor in the bounds nor in the slopes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.bounds.nets import ARCHITECTURES, Case, case, make
from tests.support.device import DEVICE
from verifier.bounds.alpha import Schedule, alpha_hidden, alpha_rows, initial_parameters
from verifier.bounds.crown import BoundState, Specification, crown_hidden, crown_rows
from verifier.core.interval import Interval
from verifier.core.numerics import finite_lower, proved
from verifier.graph.graph import Graph
from verifier.ops.relu import Relu

BAD = [math.nan, math.inf, -math.inf]
NAMES = sorted(ARCHITECTURES)
# Far below anything that these networks compute.
LOW = torch.tensor(-1e30, dtype=torch.float64, device=DEVICE)
SCHEDULE = Schedule(2)


def eye(made: Case) -> Specification:
    n = made.graph.nodes[made.graph.output].size
    one = torch.eye(n, dtype=torch.float64, device=DEVICE)
    rows = torch.cat([one, -one])
    return Specification(rows.reshape(1, 2 * n, *made.graph.output_shape))


def all_bounds(made: Case, state: BoundState) -> list[Tensor]:
    """Lower bounds of both signs of every output by plain and by optimised CROWN, certified."""
    spec = eye(made)
    plain, _ = crown_rows(made.engine, state, spec)
    found = alpha_rows(made.engine, state, spec, SCHEDULE)
    again, _ = crown_rows(made.engine, state, spec, found.parameters)
    return [plain, found.lower, again]


def sound(made: Case, state: BoundState) -> None:
    values = made.values(made.samples(200))[made.graph.output][:, 0].flatten(1)
    least = torch.cat([values, -values], 1).amin(0)
    for lower in all_bounds(made, state):
        assert not bool(lower.isnan().any())
        assert bool((lower[0].double() <= least + 1e-4 * (1 + least.abs())).all())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str, bad: float) -> None:
    made = make(name, 0)
    for handle, value in made.graph.parameters.items():
        if not value.is_floating_point():
            continue
        broken = value.clone()
        broken.view(-1)[handle.shape[0] // 2] = bad
        parameters = {**made.graph.parameters, handle: broken}
        other = case(Graph(made.graph.nodes, made.graph.output, parameters), made.box)
        state = crown_hidden(other.engine, other.state())
        points = other.values(other.samples(20))[other.graph.output][:, 0].flatten(1)
        hit = ~points.isfinite().all(0)
        for lower in all_bounds(other, state):
            n = hit.shape[0]
            for part in (lower[0, :n], lower[0, n:]):
                assert not bool(proved(part.double(), LOW)[hit].any()), handle.name
        if bad != bad and name != "choice":  # a step is a number whatever it is of
            assert bool(hit.any())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_hidden_nodes(name: str) -> None:
    """A node about which nothing is known (NaN or infinite bounds) leaves the result sound."""
    made = make(name, 1)
    state = crown_hidden(made.engine, made.state())
    for index in range(1, len(made.graph.nodes)):
        low, up = state.bounds[index]
        for side in range(3):
            for value in (math.nan, math.inf):
                low2, up2 = low.contiguous().clone(), up.contiguous().clone()
                if side != 1:
                    low2.view(-1)[::2] = -value
                if side != 0:
                    up2.view(-1)[::2] = value
                bounds = {**state.bounds, index: Interval(low2, up2)}
                sound(made, BoundState(state.box, bounds, state.magnitudes, True))


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "smooth"])
@pytest.mark.parametrize("bad", BAD)
def test_slopes_and_multipliers(name: str, bad: float) -> None:
    made = make(name, 2)
    state = crown_hidden(made.engine, made.state())
    spec = eye(made)
    values = made.values(made.samples(200))[made.graph.output][:, 0].flatten(1)
    least = torch.cat([values, -values], 1).amin(0) + 1e-9
    parameters, _ = initial_parameters(made.graph, state.bounds, spec.y.shape[1], len(made.graph.nodes))
    for group in parameters.values():
        for value in group.values():
            kept = value.clone()
            value.view(-1)[::3] = bad
            lower, _ = crown_rows(made.engine, state, spec, parameters)
            assert bool((lower[0] <= least).all())
            value.copy_(kept)
    for node in made.graph.nodes:
        if isinstance(node.op, Relu):
            extra = torch.full((1, 1, *made.graph.nodes[node.inputs[0]].shape), bad, device=DEVICE)
            lower, _ = crown_rows(made.engine, state, spec, splits={node.index: extra})
            assert not bool(proved(lower, LOW).any())


@pytest.mark.parametrize("name", NAMES)
def test_boxes_that_are_huge_or_infinite(name: str) -> None:
    made = make(name, 3)
    for size in (1e10, 3e38, math.inf):
        wide = case(made.graph, Interval(made.box.lower - size, made.box.upper + size))
        state = crown_hidden(wide.engine, wide.state())
        state = alpha_hidden(wide.engine, state, SCHEDULE)
        values = made.values(made.samples(100))
        for i, b in state.bounds.items():
            assert bool(((values[i] >= b.lower.double()) & (values[i] <= b.upper.double())).all())
        sound(Case(made.graph, made.backend, made.box), BoundState(made.box, state.bounds, state.magnitudes, True))
        if size == math.inf:
            for lower in all_bounds(wide, state):
                assert not bool((lower == math.inf).any() or lower.isnan().any())


def test_the_test_that_closes_rows() -> None:
    numbers = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 0.0], dtype=torch.float64, device=DEVICE)
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    assert proved(numbers, zero).tolist() == [False, False, False, True, False]
    for bad in BAD:
        assert not bool(proved(numbers, torch.full_like(numbers, bad)).any())
    assert finite_lower(numbers).tolist() == [-math.inf, -math.inf, -math.inf, 1.0, 0.0]
