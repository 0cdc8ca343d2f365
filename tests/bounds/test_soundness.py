"""Bounds of random small graphs contain what the graphs compute, and keeping the tighter one nests the methods."""

from __future__ import annotations

import pytest
import torch

from tests.bounds.nets import ARCHITECTURES, Case, inside, make
from tests.support.device import DEVICE
from verifier.bounds import ibp
from verifier.bounds.alpha import Schedule, alpha_hidden, alpha_rows
from verifier.bounds.crown import BoundState, Specification, crown_hidden, crown_rows
from verifier.bounds.engine import PLAIN, ROUNDED_32
from verifier.core.interval import Interval

SEEDS = range(4)
NAMES = sorted(ARCHITECTURES)
# Sampled values carry the rounding of a float64 forward pass; float32 search bounds that of float32.
F64, F32 = 1e-12, 2e-5
SCHEDULE = Schedule(iterations=4)


def copy(state: BoundState) -> BoundState:
    return BoundState(state.box, dict(state.bounds), state.magnitudes, state.certified)


def contains(case: Case, bounds: dict[int, Interval], slack: float) -> None:
    values = case.values(case.samples(200))
    for index, interval in bounds.items():
        assert inside(values[index], interval, slack), f"node {index}, {case.graph.nodes[index].op}"


def within(inner: dict[int, Interval], outer: dict[int, Interval]) -> None:
    for i, b in inner.items():
        assert bool((b.lower >= outer[i].lower).all() and (b.upper <= outer[i].upper).all()), f"node {i}"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_interval_bounds_contain_samples(name: str, seed: int) -> None:
    for radius in (0.0, 1e-6, 0.3, 3.0):
        case = make(name, seed, batch=3, radius=radius)
        contains(case, case.state().bounds, F64)
        found, magnitudes = ibp.propagate(case.engine.using(ROUNDED_32), case.box)
        contains(case, found, F64)
        values = case.values(case.samples(50))
        for i, m in magnitudes.value.items():
            assert bool((values[i].abs() <= m.double() * (1 + F64) + F64).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("certified", [True, False], ids=["certified", "float32"])
def test_crown_contains_samples_and_lies_within_ibp(name: str, seed: int, certified: bool) -> None:
    case = make(name, seed, batch=2)
    start = case.state(certified)
    found = crown_hidden(case.engine, start)
    contains(case, found.bounds, F64 if certified else F32)
    within(found.bounds, start.bounds)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("certified", [True, False], ids=["certified", "float32"])
def test_alpha_contains_samples_and_lies_within_crown(name: str, seed: int, certified: bool) -> None:
    case = make(name, seed)
    crown = crown_hidden(case.engine, case.state(certified))
    found = alpha_hidden(case.engine, copy(crown), SCHEDULE)
    contains(case, found.bounds, F64 if certified else F32)
    within(found.bounds, crown.bounds)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_bound_samples_and_optimisation_does_not_lose(name: str, seed: int) -> None:
    case = make(name, seed)
    state = crown_hidden(case.engine, case.state())
    random = torch.Generator().manual_seed(seed)
    y = torch.randn((1, 5, *case.graph.output_shape), generator=random, dtype=torch.float64).to(DEVICE)
    x = torch.randn((1, 5, *case.graph.input_shape), generator=random, dtype=torch.float64).to(DEVICE) * (seed % 2)
    spec = Specification(y, x)
    points = case.samples(300)
    values = case.values(points)[case.graph.output]
    rows = torch.einsum("nbo,so->nbs", values.flatten(2), y[0].flatten(1))
    least = (rows + torch.einsum("nbi,si->nbs", points.flatten(2), x[0].flatten(1))).amin(0)
    plain, _ = crown_rows(case.engine, state, spec)
    assert bool((plain <= least + F64).all())
    found = alpha_rows(case.engine, state, spec, SCHEDULE)
    assert bool((found.lower.double() <= least + F32 * (1 + least.abs())).all())
    assert bool((found.lower.double() >= plain - F32 * (1 + plain.abs())).all())
    exact, _ = crown_rows(case.engine, state, spec, found.parameters)
    assert bool((exact <= least + F64).all())
    torch.testing.assert_close(exact.float(), found.lower, rtol=1e-4, atol=1e-4)
    # A point of the box comes with the bound for free.
    low, up = case.box.lower[:, None], case.box.upper[:, None]
    assert bool(((found.candidate >= low) & (found.candidate <= up)).all())


@pytest.mark.parametrize("name", NAMES)
def test_batches_agree_with_single_boxes(name: str) -> None:
    case = make(name, 5, batch=3)
    whole = crown_hidden(case.engine, case.state())
    for i in range(3):
        part = Interval(case.box.lower[i : i + 1], case.box.upper[i : i + 1])
        one = crown_hidden(case.engine, Case(case.graph, case.backend, part).state())
        for index, b in one.bounds.items():
            # A neuron that is stable on one box gets rows when another box leaves it undecided: only ever tighter.
            assert bool((whole.bounds[index].lower[i : i + 1] >= b.lower - 1e-5).all())
            assert bool((whole.bounds[index].upper[i : i + 1] <= b.upper + 1e-5).all())


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "smooth"])
def test_a_point_box_gives_the_value(name: str) -> None:
    case = make(name, 2, radius=0.0)
    state = crown_hidden(case.engine, case.state())
    value = case.values(case.box.lower.double()[None])[case.graph.output][0].flatten()
    eye = torch.eye(value.shape[0], dtype=torch.float64, device=DEVICE).reshape(1, -1, *case.graph.output_shape)
    lower, _ = crown_rows(case.engine, state, Specification(eye))
    torch.testing.assert_close(lower[0], value, rtol=1e-5, atol=1e-5)


def test_search_precision_takes_the_certificate_away() -> None:
    case = make("mlp", 0)
    state = case.state(certified=True)
    assert crown_hidden(case.engine, state).certified
    assert not crown_hidden(case.engine.using(PLAIN), state).certified


def test_float32_certifies_nothing_whatever_it_accounts_for() -> None:
    """Rows are float64: rounded to float32 they are other rows."""
    case = make("mlp", 0)
    state = crown_hidden(case.engine.using(ROUNDED_32), case.state(certified=True))
    plain = crown_hidden(case.engine.using(PLAIN), case.state(certified=True))
    assert not state.certified
    assert all(torch.equal(state.bounds[i].lower, b.lower) for i, b in plain.bounds.items())
