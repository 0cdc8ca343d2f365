"""Tensor parallelism gives the bounds of one device: layouts, every op, networks, certificates, search, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.bounds.exact import exact, walk_bound
from tests.bounds.nets import ARCHITECTURES, Builder, Case, case, make
from tests.bounds.test_certificates import hostile
from tests.ops.samples import SAMPLES, Sample
from tests.parallel.threads import ThreadGroup, on_ranks
from verifier.bounds.alpha import Schedule
from verifier.bounds.api import Method, NetworkBounds, Wanted, compute_graph_bounds
from verifier.bounds.crown import (
    BoundState,
    Specification,
    crown_hidden,
    crown_rows,
    initial_state,
    open_elements,
    preactivations,
    relaxations,
)
from verifier.bounds.engine import Arithmetic, Engine
from verifier.bounds.ibp import propagate
from verifier.core.backend import ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, UnsupportedError
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph, Input, Node, parameter_bytes
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu
from verifier.ops.shape import Gather, Reshape
from verifier.parallel.tp import CutGraph, Exchanged, Layout, TensorParallel, cut_graph, tensor_parallel

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def every_rank(graph: Graph, ranks: int, work: Callable[[CutGraph, TensorParallel], object]) -> list:
    """The result of every rank of a group that has the network's parts."""

    def run(group: ThreadGroup) -> object:
        backend = tensor_parallel(graph, group, CPU)
        return work(backend.graph, backend)

    return on_ranks(ranks, run)


# ------------------------------------------------------------------------------------------------------------- layouts

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)


@given(shapes, st.integers(0, 2), st.integers(1, 6), st.lists(st.integers(1, 3), max_size=2))
def test_layouts_cut_and_join(shape: tuple[int, ...], dim: int, ranks: int, lead: list[int]) -> None:
    layout = Layout(shape, min(dim, max(0, len(shape) - 1)), ranks)
    value = torch.randn((*lead, *shape))
    parts = [layout.take(value, r, repeat=True) for r in range(ranks)]
    bare = [layout.take(value, r, repeat=False) for r in range(ranks)]
    assert {tuple(p.shape) for p in parts} == {(*lead, *layout.part)}
    for some in (parts, bare):
        assert torch.equal(layout.join(torch.stack(some)), value)
    assert torch.equal(layout.blocks(value), torch.stack(bare))
    total = sum(layout.embed(p, r) for r, p in enumerate(parts))
    assert isinstance(total, Tensor) and torch.equal(total, value)
    # Beyond the value: nothing that it does not contain, and nothing that counts.
    for p, q in zip(parts, bare, strict=True):
        assert torch.isin(p, value).all()
        assert q.count_nonzero() == 0 or torch.isin(q[q != 0], value).all()
    assert sum(int(q.count_nonzero()) for q in bare) == int(value.count_nonzero())


@given(shapes, st.integers(0, 2), st.integers(1, 6))
def test_every_element_has_one_place(shape: tuple[int, ...], dim: int, ranks: int) -> None:
    layout = Layout(shape, min(dim, max(0, len(shape) - 1)), ranks)
    count = math.prod(shape)
    value = torch.arange(count).reshape(shape)
    seen = torch.zeros(count, dtype=torch.int64)
    for rank in range(ranks):
        positions, here = layout.place(torch.arange(count), rank)
        block = layout.take(value, rank, repeat=False).flatten()
        assert torch.equal(block[positions[here]], torch.arange(count)[here])
        assert bool((positions[~here] == 0).all())
        seen += here
    assert bool((seen == 1).all())


# ----------------------------------------------------------------------------------------------------------- every op

UNSUPPORTED = {
    "mul-broadcast", "mul-outer", "bilinear", "bilinear-batched", "max-keep", "same-broadcast",
    "exp-sum", "exp-sum-last",
}  # fmt: skip


def around(sample: Sample) -> Case:
    """A network whose input is the sample's operands in one row, between the op's domain, and the op last."""
    sizes = [math.prod(s) for s in sample.in_shapes]
    nodes = [Node(0, "x", Input(), (), (sum(sizes),))]
    parameters: dict[Handle, Tensor] = {}
    for i, (shape, size) in enumerate(zip(sample.in_shapes, sizes, strict=True)):
        index = Handle(f"index{i}", (size,), torch.int64)
        parameters[index] = torch.arange(size) + sum(sizes[:i])
        nodes.append(Node(len(nodes), f"operand{i}", Gather(index, shape), (0,), shape))
    casted = sample.cast(torch.float32)
    parameters |= {h: t.to(h.dtype) for h, t in zip(sample.op.handles, sample.params, strict=True)}
    operands = tuple(range(1, len(nodes)))
    dummy = [torch.ones(2, *s) for s in sample.in_shapes]
    shape = tuple(sample.op.forward(dummy, casted).shape[1:])
    nodes.append(Node(len(nodes), "op", sample.op, operands, shape))
    low, up = max(sample.domain[0], -2.0), min(sample.domain[1], 3.0)
    if sample.domain[0] > -math.inf:
        low += 0.25
    random = torch.Generator().manual_seed(len(sample.name))
    ends = torch.rand((2, 1, sum(sizes)), generator=random).sort(0).values * (up - low) + low
    return case(Graph(tuple(nodes), len(nodes) - 1, parameters), Interval(ends[0], ends[1]))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("sample", SAMPLES, ids=[s.name for s in SAMPLES])
@pytest.mark.usefixtures("no_float32_proofs")
def test_every_op(sample: Sample, ranks: int) -> None:
    made = around(sample)
    if sample.name in UNSUPPORTED:
        with pytest.raises(UnsupportedError, match=rf"{made.graph.nodes[-1].op.kind} 'op' .* parallel.backend"):
            every_rank(made.graph, ranks, lambda graph, backend: None)
        return
    want = compute_graph_bounds(made.engine, made.box, Wanted("crown", True))
    points = made.samples(20)[:, 0]
    values = made.values(points[:, None])[made.graph.output][:, 0]

    def work(graph: CutGraph, backend: TensorParallel) -> tuple[NetworkBounds, Tensor]:
        y = graph.whole.forward(points, backend.weights)
        assert isinstance(y, Tensor)
        return compute_graph_bounds(Engine(graph, backend), made.box, Wanted("crown", True)), y

    found = every_rank(made.graph, ranks, work)
    compare(want, [f for f, _ in found])
    for bounds, y in found:
        torch.testing.assert_close(y, values, rtol=1e-12, atol=1e-12)
        sure = bounds.certified["op"]
        room = 1e-12 * (1 + values.abs())
        assert bool(((values >= sure.lower - room) & (values <= sure.upper + room)).all())


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.fixture
def no_float32_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass in float32 that accounts for rounding: its magnitudes, not its values, depend on how sums are cut."""
    monkeypatch.setattr("verifier.bounds.crown.float32_has_error_bounds", lambda *a: False)


def compare(want: NetworkBounds, found: list[NetworkBounds], tolerance: float = TOLERANCE) -> None:
    """All ranks have equal bits, and where both decide the same neurons the bounds are those of one device."""
    for kind in ("plain", "certified"):
        differ = total = 0
        for name, expected in getattr(want, kind).items():
            got = [torch.stack(getattr(f, kind)[name]) for f in found]
            assert all(torch.equal(g, got[0]) for g in got)
            reference = torch.stack(expected)
            scale = max(1.0, float(reference.abs().max()))
            both = [(b[0] < 0) & (b[1] > 0) for b in (got[0], reference)]
            differ += int((both[0] != both[1]).sum())
            total += both[0].numel()
            error = (got[0] - reference).abs() / scale * (both[0] == both[1])
            assert float(error.max()) <= tolerance
        assert differ <= total / 1000


def bounds_of(made: Case, ranks: int, method: Method, steps: int = 10) -> tuple[NetworkBounds, list[NetworkBounds]]:
    settings = {"intermediate": True, "hidden": Schedule(steps), "final": Schedule(steps)}
    want = compute_graph_bounds(made.engine, made.box, Wanted(method, **settings))  # type: ignore[arg-type]

    def work(graph: CutGraph, backend: TensorParallel) -> NetworkBounds:
        return compute_graph_bounds(Engine(graph, backend), made.box, Wanted(method, **settings))  # type: ignore[arg-type]

    return want, every_rank(made.graph, ranks, work)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("method", ["ibp", "crown"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.usefixtures("no_float32_proofs")
def test_bounds_of_architectures(name: str, method: Method, ranks: int) -> None:
    compare(*bounds_of(make(name, 3), ranks, method))


@pytest.mark.parametrize(("name", "ranks"), [(n, 2 + i % 3) for i, n in enumerate(ARCHITECTURES)])
@pytest.mark.usefixtures("no_float32_proofs")
def test_optimised_bounds_and_slopes(name: str, ranks: int) -> None:
    want, found = bounds_of(make(name, 3), ranks, "alpha-crown")
    compare(want, found)
    assert want.slopes and want.slopes.keys() == found[0].slopes.keys()
    for key, slopes in want.slopes.items():
        assert all(torch.equal(f.slopes[key], found[0].slopes[key]) for f in found)
        # A slope that hardly matters may drift; most must be where one device has them.
        near = (found[0].slopes[key] - slopes).abs() <= 1e-3
        assert float(near.double().mean()) > 0.97


def deep(seed: int, width: int) -> Graph:
    b = Builder((width,), seed)
    x = 0
    for _ in range(3):
        x = b.relu(b.linear(x, width))
    b.linear(x, 10)
    return b.graph()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("width", [64, 61])
@pytest.mark.usefixtures("no_float32_proofs")
def test_wider_networks(width: int, ranks: int) -> None:
    graph = deep(1, width)
    centre = torch.zeros(1, width)
    made = case(graph, Interval(centre - 0.05, centre + 0.05))
    compare(*bounds_of(made, ranks, "crown"))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_long_sums(ranks: int) -> None:
    """Sums over very many neurons: one device and every share of them are close to float64, and to each other."""
    n_in, hidden = 8, 1 << 18
    b = Builder((n_in,), 0)
    b.linear(b.relu(b.linear(0, hidden)), 1)
    # Nothing cancels: what is lost is lost of the bound itself.
    parameters = {h: t.abs() / t.abs().mean() for h, t in b.parameters.items()}
    last = next(h for h in parameters if h.shape == (1, hidden))
    graph = Graph(tuple(b.nodes), len(b.nodes) - 1, {**parameters, last: parameters[last] / hidden})
    centre = torch.full((1, n_in), 0.5)
    made = case(graph, Interval(centre - 0.1, centre + 0.1))
    spec = Specification(torch.ones((1, 1, 1), dtype=torch.float64))

    def row(part: Graph, backend: ParallelBackend, dtype: torch.dtype = torch.float32) -> float:
        engine = Engine(part, backend, arithmetic=Arithmetic(dtype, rounding=False))
        box = Interval(*(backend.local_part(0, end) for end in made.box)).to(dtype)
        bounds, magnitudes = propagate(engine, box)
        lower, _ = crown_rows(engine, BoundState(box, bounds, magnitudes, False), spec)
        assert lower.dtype == dtype
        return float(lower)

    exact, alone = row(made.graph, made.backend, torch.float64), row(made.graph, made.backend)
    found = every_rank(made.graph, ranks, row)
    assert len(set(found)) == 1
    scale = max(1.0, abs(exact))
    assert abs(alone - exact) <= 1e-6 * scale
    assert abs(found[0] - exact) <= 1e-6 * scale
    assert abs(found[0] - alone) <= 1e-6 * scale


@pytest.mark.parametrize("name", ["mlp", "conv", "dilated", "residual"])
def test_float32_proofs(name: str) -> None:
    """Certified neurons that float32 proofs decide differ by their magnitudes alone."""
    compare(*bounds_of(make(name, 3), 3, "crown"), tolerance=1e-4)


@pytest.mark.usefixtures("no_float32_proofs")
def test_hidden_intervals_only() -> None:
    """The mode without hidden rows: nothing but intervals there, so looser outputs, still those of one device."""
    made = make("mlp", 3)
    settings = {"intermediate": True, "hidden_rows": False}
    want = compute_graph_bounds(made.engine, made.box, Wanted("crown", **settings))  # type: ignore[arg-type]
    ibp = compute_graph_bounds(made.engine, made.box, Wanted("ibp", True))
    tight = compute_graph_bounds(made.engine, made.box, Wanted("crown", True))

    def work(graph: CutGraph, backend: TensorParallel) -> NetworkBounds:
        return compute_graph_bounds(Engine(graph, backend), made.box, Wanted("crown", **settings))  # type: ignore[arg-type]

    found = every_rank(made.graph, 2, work)
    compare(want, found)
    for index in preactivations(made.graph):
        name = made.graph.nodes[index].name
        torch.testing.assert_close(found[0].plain[name].lower, ibp.plain[name].lower)
    out = made.graph.nodes[made.graph.output].name
    assert bool((tight.plain[out].lower > found[0].plain[out].lower + 1e-3).any())


# -------------------------------------------------------------------------------------------------------- certificates


@pytest.mark.parametrize("nasty", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("name", ["mlp", "wide_shape", "conv", "residual", "shared", "concat"])
def test_certificates_stay_below_the_exact_formula(name: str, nasty: bool) -> None:
    """Rows certified in parts never exceed the rational value of the walk with the same planes."""
    made = make(name, 2)
    made = hostile(made, 2) if nasty else made
    random = torch.Generator().manual_seed(5)
    y = torch.randn((1, 4, *made.graph.output_shape), generator=random, dtype=torch.float64)
    x = torch.randn((1, 4, *made.graph.input_shape), generator=random, dtype=torch.float64)
    spec = Specification(y, x)

    def work(graph: CutGraph, backend: TensorParallel) -> tuple[dict[int, Interval], Tensor]:
        box = Interval(backend.local_part(0, made.box.lower), backend.local_part(0, made.box.upper))
        state = crown_hidden(Engine(graph, backend), initial_state(Engine(graph, backend), box))
        lower, _ = crown_rows(Engine(graph, backend), state, spec)
        whole = {i: Interval(*backend.gather_features(i, torch.stack(b))) for i, b in state.bounds.items()}
        return whole, lower

    for bounds, lower in every_rank(made.graph, 3, work):
        planes = relaxations(made.graph, bounds, torch.float64)
        start = {made.graph.output: exact(y[0].flatten(1)), 0: exact(x[0].flatten(1))}
        for got, want in zip(lower[0].tolist(), walk_bound(made, start, planes), strict=True):
            if math.isfinite(got):
                assert Fraction(got) <= want
            if not nasty:
                assert want - Fraction(got) <= Fraction(1e-9) * (1 + abs(want))


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_samples_lie_inside(name: str) -> None:
    made = make(name, 4, radius=0.5)
    values = made.values(made.samples(200))
    _, found = bounds_of(made, 3, "crown")
    for node in made.graph.nodes:
        if node.name in found[0].certified:
            low, up = found[0].certified[node.name]
            room = 1e-12 * (1 + values[node.index].abs())
            assert bool((values[node.index] >= low - room).all() and (values[node.index] <= up + room).all())


def test_padding_is_never_bounded() -> None:
    """Blocks beyond a value are no neurons: nothing there is undecided, and no row starts there."""
    made = make("mlp", 1)

    def work(graph: CutGraph, backend: TensorParallel) -> list[list[int]]:
        box = Interval(backend.local_part(0, made.box.lower), backend.local_part(0, made.box.upper))
        state = initial_state(Engine(graph, backend), box)
        wide = {
            i: Interval(torch.full_like(b.lower, -1.0), torch.full_like(b.upper, 1.0)) for i, b in state.bounds.items()
        }
        return [open_elements(Engine(graph, backend), i, wide[i]).tolist() for i in preactivations(graph)]

    for found in every_rank(made.graph, 4, work):
        sizes = [made.graph.nodes[i].size for i in preactivations(made.graph)]
        assert any(n % 4 for n in sizes)
        assert found == [list(range(n)) for n in sizes]


def test_rounding_of_the_exchange_is_accounted_for() -> None:
    """More partial sums cost more: the transposed rule counts a rank's outputs and the ranks."""
    graph = deep(0, 9)

    def work(cut: CutGraph, backend: TensorParallel) -> None:
        for node, whole in zip(cut.nodes, graph.nodes, strict=True):
            if isinstance(whole.op, Linear):
                assert isinstance(node.op, Exchanged)
                terms = node.op.backward_terms(cut.in_shapes(node), node.shape)
                assert terms == -(-whole.size // 4) + 4
                assert node.op.forward_terms(cut.in_shapes(node), node.shape) == whole.op.weight.shape[1] + 1

    every_rank(graph, 4, work)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_holds_its_share(name: str, ranks: int) -> None:
    graph = make(name, 0).graph
    rows = {h: next(d for d in h.shape) for h in graph.parameters}
    padded = sum(t.nbytes // t.shape[0] * -(-rows[h] // ranks) for h, t in graph.parameters.items())
    for held in every_rank(graph, ranks, lambda cut, backend: backend.weights.resident_bytes()):
        assert (
            held
            == padded
            <= parameter_bytes(graph) / ranks + sum(t.nbytes // t.shape[0] for t in graph.parameters.values())
        )


def test_blocks_are_copies() -> None:
    """A rank's block must not keep the whole tensor alive."""
    graph = make("mlp", 0).graph

    def work(cut: CutGraph, backend: TensorParallel) -> None:
        for source, tensor in graph.parameters.items():
            for handle, block in cut.blocks(source, tensor):
                assert tuple(block.shape) == handle.shape
                assert block.untyped_storage().nbytes() == block.nbytes

    every_rank(graph, 2, work)


def test_flattening_keeps_blocks() -> None:
    """With channels that the ranks divide, nothing but convolutions and linear layers talks."""
    b = Builder((2, 6, 6), 0)
    x = b.relu(b.conv(0, 4, padding=1))
    b.linear(b.relu(b.linear(b.flat(x), 8)), 4)
    graph = b.graph()

    def work(cut: CutGraph, backend: TensorParallel) -> list[str]:
        return [n.op.kind for n in cut.nodes if isinstance(n.op, Exchanged)]

    for found in every_rank(graph, 2, work):
        assert found == ["Conv", "Linear", "Linear"]
    for found in every_rank(graph, 3, work):
        assert "Reshape" in found
    assert any(isinstance(n.op, Reshape) for n in graph.nodes)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_mixes_ranks_is_named() -> None:
    class Mixing(Relu):
        def split(self, *_: object) -> None:
            return None

    b = Builder((6,), 0)
    b.op(Mixing(), b.linear(0, 6))
    with pytest.raises(UnsupportedError) as caught:
        every_rank(b.graph(), 2, lambda graph, backend: None)
    assert "Relu 'n2'" in str(caught.value) and "fsdp" in str(caught.value)


def test_a_deadline_ends_all_ranks() -> None:
    """One rank's clock is ahead: all stop at the same question, none waits for ever."""
    made = make("mlp", 0)

    def run(group: ThreadGroup) -> str:
        backend = tensor_parallel(made.graph, group, CPU)
        deadline = Deadline(0.0 if group.rank == 1 else 1e6)
        try:
            compute_graph_bounds(Engine(backend.graph, backend, deadline), made.box, Wanted("alpha-crown"))
        except DeadlineExceeded:
            return "stopped"
        return "went on"

    assert on_ranks(3, run) == ["stopped"] * 3


def test_groups_deal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of two ranks: each bounds half of the rows, all have the bounds of one device."""
    import threading

    from tests.parallel.threads import _Room
    from verifier.core import backend as protocol
    from verifier.core.backend import Cost
    from verifier.parallel import distributed
    from verifier.parallel.stores import Resident

    monkeypatch.setattr(protocol, "SHARD_ROWS", 8)
    monkeypatch.setattr(distributed, "SHARD_ROWS", 8)
    made = make("mlp", 3)
    want = compute_graph_bounds(made.engine, made.box, Wanted("crown", True))
    groups = [_Room(2) for _ in range(2)]
    teams = [_Room(2) for _ in range(2)]
    dealt: list[int] = []
    lock = threading.Lock()

    def run(everyone: ThreadGroup) -> NetworkBounds:
        group, place = divmod(everyone.rank, 2)
        inside, team = ThreadGroup(groups[group], place, 2), ThreadGroup(teams[place], group, 2)
        part = cut_graph(made.graph, inside)
        store = Resident(CPU)
        for source, tensor in made.graph.parameters.items():
            for handle, block in part.blocks(source, tensor):
                store.put(handle, block)
        backend = TensorParallel(part, CPU, store, 1 << 9, team)
        chunks = backend.row_chunks(16, Cost(64))
        with lock:
            dealt.append(sum(c.stop - c.start for c in chunks))
        return compute_graph_bounds(Engine(part, backend), made.box, Wanted("crown", True))

    compare(want, on_ranks(4, run))
    assert sum(dealt) == 2 * 16 and max(dealt) < 16
