"""What bounds take: the peak of one device, nothing that stays, and the counts by kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds.nets import Builder, make
from verifier.bounds.alpha import Schedule
from verifier.bounds.api import Method, NetworkBounds, Wanted, compute_graph_bounds
from verifier.bounds.engine import Engine
from verifier.core.interval import Interval
from verifier.core.inventory import Usage
from verifier.core.tracker import ByteTracker
from verifier.graph.graph import Graph, parameter_bytes
from verifier.ops.linear import absolute_product
from verifier.parallel.single import SingleBackend

MIB = 1 << 20
CPU = torch.device("cpu")


def network(hidden: int, depth: int, n_in: int = 784) -> Graph:
    b, x = Builder((n_in,), 0, gain=1.4), 0
    for _ in range(depth):
        x = b.relu(b.linear(x, hidden))
    b.linear(x, 10)
    return b.graph()


def run(
    graph: Graph, backend: SingleBackend, method: Method, radius: float, certify: bool = False, steps: int = 2
) -> NetworkBounds:
    x = torch.rand(graph.nodes[0].size, generator=torch.Generator().manual_seed(1))
    schedule = Schedule(steps)
    wanted = Wanted(method, True, schedule, schedule, certified=certify)
    return compute_graph_bounds(Engine(graph, backend), Interval(x - radius, x + radius), wanted)


def chunk_of(rows: int, widest: int) -> int:
    """``memory.chunk_bytes`` for chunks of at most so many float32 rows."""
    return rows * 16 * widest


@pytest.mark.slow
def test_crown_of_one_device_takes_little_more_than_the_weights() -> None:
    """784-1024x4-10 with chunks of 256 rows: 15.1 MiB of weights, at most 25 MiB in all."""
    graph = network(1024, 4)
    with ByteTracker() as tracker:
        tracker.add(graph.parameters.values())
        found = run(graph, SingleBackend(graph, CPU, chunk_of(256, 1024)), "crown", 0.01)
    unstable = [int(((b.lower < 0) & (b.upper > 0)).sum()) for b in found.plain.values()]
    assert max(unstable) > 500, "a network without unstable neurons measures nothing"
    assert parameter_bytes(graph) < tracker.peak <= 25 * MIB


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_a_second_pass_takes_no_more_and_leaves_nothing(method: Method) -> None:
    graph = network(48, 3, n_in=20)
    backend = SingleBackend(graph, CPU, chunk_of(16, 48))
    with ByteTracker() as tracker:
        tracker.add(graph.parameters.values())
        before, peaks = tracker.current, []
        for _ in range(2):
            tracker.reset_peak()
            found = run(graph, backend, method, 0.1)
            peaks.append(tracker.peak)
            del found
            assert tracker.current == before
    assert peaks[0] == peaks[1] > before


@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_blocks_of_magnitudes_change_nothing_but_rounding(
    n: int, out: int, width: int, biased: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(n + out * 100 + width)
    weight = torch.randn((out, width), generator=generator, dtype=dtype)
    bias = torch.randn(out, generator=generator, dtype=dtype) if biased else None
    x = torch.rand((n, width), generator=generator, dtype=dtype)
    found = absolute_product(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight.abs(), None if bias is None else bias.abs()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_of_a_large_layer_take_one_block(dtype: torch.dtype) -> None:
    weight = torch.randn((3000, 1000), dtype=dtype)  # 3 or 6 blocks, the last one smaller
    bias, x = torch.randn(3000, dtype=dtype), torch.rand((2, 3, 1000), dtype=dtype)
    with ByteTracker() as tracker:
        tracker.add([weight, bias, x])
        before = tracker.current
        found = absolute_product(x, weight, bias)
    assert tracker.peak - before <= 4 * MIB + 4 * found.nbytes < weight.nbytes
    torch.testing.assert_close(found, F.linear(x, weight.abs(), bias.abs()))


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_certification_can_be_left_out(method: Method) -> None:
    graph = network(12, 2, n_in=5)
    backend = SingleBackend(graph, CPU)
    plain, sure = run(graph, backend, method, 0.2), run(graph, backend, method, 0.2, certify=True)
    assert plain.certified == {} and set(sure.certified) == set(sure.plain)
    assert set(plain.plain) == set(sure.plain)
    for name, bounds in plain.plain.items():
        assert torch.equal(bounds.lower, sure.plain[name].lower) and torch.equal(bounds.upper, sure.plain[name].upper)


def test_state_of_rows_is_counted_over_chunks() -> None:
    """One hidden layer: the rows of the outputs carry one slope per hidden neuron."""
    graph = network(30, 1, n_in=6)
    backend = SingleBackend(graph, CPU, 3 * chunk_of(4, 30))
    run(graph, backend, "alpha-crown", 5.0)
    rows = backend.usage.rows
    assert rows.chunks == 5  # 2 * 10 output rows, four by four
    slopes = 5 * 4 * 30 * 4
    assert (rows.slopes, rows.gradients, rows.optimizer) == (2 * slopes, slopes, 2 * slopes)
    assert backend.usage.coefficients == 4 * 30 * 4
    assert run(graph, backend, "alpha-crown", 5.0, steps=0) and backend.usage.rows == rows  # the most is kept


def test_without_steps_there_are_no_gradients() -> None:
    graph = network(30, 1, n_in=6)
    backend = SingleBackend(graph, CPU)
    run(graph, backend, "alpha-crown", 5.0, steps=0)
    assert backend.usage.rows.slopes > 0
    assert (backend.usage.rows.gradients, backend.usage.rows.optimizer) == (0, 0)


def test_ibp_counts_no_rows() -> None:
    case = make("mlp", 0)
    run(case.graph, case.backend, "ibp", 0.1)
    assert case.backend.usage == Usage()


@pytest.mark.parametrize(("hidden", "outputs"), [(300, 10), (30, 240)], ids=["hidden rows", "output rows"])
def test_slopes_are_cut_into_parts_for_eight_ranks(hidden: int, outputs: int) -> None:
    """Though one chunk would do for speed: a rank holds the slopes of its chunks."""
    b = Builder((20,), 0, gain=1.4)
    x = b.relu(b.linear(0, hidden))
    x = b.relu(b.linear(x, hidden))
    b.linear(x, outputs)
    graph = b.graph()
    backend = SingleBackend(graph, CPU)
    run(graph, backend, "alpha-crown", 1.0)
    assert backend.usage.rows.chunks == 8
