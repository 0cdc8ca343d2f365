"""Certified bounds never exceed the exact rational value of the formula that they compute, and stay close to it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds.exact import affine_image, exact, walk_bound
from tests.bounds.nets import Builder, Case, case, make
from tests.support.device import CONV_FLOAT32, DEVICE
from verifier.bounds import ibp
from verifier.bounds.crown import (
    BoundState,
    Specification,
    crown_hidden,
    crown_rows,
    exact_by_ibp,
    hidden_rows,
    lower_bounds,
    preactivations,
    relaxations,
)
from verifier.bounds.engine import Arithmetic
from verifier.core.backend import Chunk
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import AffineOp
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu

NAMES = ["mlp", "wide_shape", "conv", "strided", "residual", "preactivation", "shared", "concat", "smooth"]
ROWS = 4


def hostile(made: Case, seed: int) -> Case:
    """The same graph with parameters over fifteen orders of magnitude that nearly cancel in pairs."""
    random = np.random.default_rng(seed)
    parameters = {}
    for handle, value in made.graph.parameters.items():
        scale = torch.from_numpy(np.exp2(random.integers(-25, 25, size=handle.shape)).astype(np.float32))
        bad = value * scale
        if bad.dim() == 2:
            bad[:, 1::2] = -bad[:, : bad.shape[1] // 2 * 2 : 2] * (1 + 2.0**-20)
        parameters[handle] = bad
    return case(Graph(made.graph.nodes, made.graph.output, parameters), made.box)


def specification(made: Case, seed: int) -> Specification:
    random = torch.Generator().manual_seed(seed)
    y = torch.randn((1, ROWS, *made.graph.output_shape), generator=random, dtype=torch.float64)
    x = torch.randn((1, ROWS, *made.graph.input_shape), generator=random, dtype=torch.float64)
    return Specification(y.to(DEVICE), x.to(DEVICE))


def exact_rows(made: Case, state: BoundState, spec: Specification, splits: dict[int, Tensor] | None) -> list[Fraction]:
    planes = relaxations(made.graph, state.bounds, torch.float64)
    assert spec.x is not None
    start = {made.graph.output: exact(spec.y[0].flatten(1)), 0: exact(spec.x[0].flatten(1))}
    return walk_bound(made, start, planes, splits)


def multipliers(made: Case, state: BoundState, seed: int) -> dict[int, Tensor]:
    """Random multipliers of random signs, zero for half of the neurons."""
    random = torch.Generator().manual_seed(seed)
    out = {}
    for node in made.graph.nodes:
        if isinstance(node.op, Relu):
            shape = (1, 1, *made.graph.nodes[node.inputs[0]].shape)
            raw = torch.randn(shape, generator=random, dtype=torch.float64)
            out[node.index] = (raw * (torch.rand(shape, generator=random) < 0.5)).to(DEVICE)
    return out


@pytest.mark.parametrize("nasty", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_rows(name: str, seed: int, nasty: bool) -> None:
    made = make(name, seed)
    made = hostile(made, seed) if nasty else made
    state = crown_hidden(made.engine, made.state())
    spec = specification(made, seed)
    for splits in (None, multipliers(made, state, seed)):
        certified, _ = crown_rows(made.engine, state, spec, splits=splits)
        expected = exact_rows(made, state, spec, splits)
        for got, want in zip(certified[0].tolist(), expected, strict=True):
            if np.isfinite(got):
                assert Fraction(got) <= want
            if not nasty:
                assert want - Fraction(got) <= Fraction(1e-9) * (1 + abs(want))


def test_rounding_is_real() -> None:
    """Without accounting for rounding some of the same bounds would be wrong: accounting for it is needed."""
    wrong = 0
    for seed in range(10):
        made = hostile(make("mlp", seed), seed)
        state = crown_hidden(made.engine, made.state())
        free = BoundState(state.box, state.bounds, state.magnitudes, False)
        spec = specification(made, seed)
        plain, _ = crown_rows(made.engine, free, spec)
        expected = exact_rows(made, state, spec, None)
        wrong += sum(Fraction(got) > want for got, want in zip(plain[0].tolist(), expected, strict=True))
    assert wrong > 0


@pytest.mark.parametrize("nasty", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_intervals_of_affine_nodes(name: str, seed: int, dtype: torch.dtype, nasty: bool) -> None:
    made = make(name, seed)
    made = hostile(made, seed) if nasty else made
    found, magnitudes = ibp.propagate(made.engine.using(Arithmetic(dtype, rounding=True)), made.box)
    stored = made.state().bounds
    for node in made.graph.nodes[1:]:
        got = found[node.index]
        if isinstance(node.op, AffineOp) and dtype == torch.float64:
            low, high = affine_image(made, node, [found[i] for i in node.inputs])
            assert (exact(got.lower.flatten()) <= low).all() and (exact(got.upper.flatten()) >= high).all()
            assert (exact(magnitudes.partial[node.index].flatten()) >= np.maximum(abs(low), abs(high))).all()
        if dtype == torch.float64:
            assert bool((stored[node.index].lower.double() <= got.lower).all())
            assert bool((stored[node.index].upper.double() >= got.upper).all())
        elif isinstance(node.op, AffineOp) and (CONV_FLOAT32 or not isinstance(node.op, Conv)):
            # Weights are float32, so the exact image is the same question in the narrower arithmetic.
            low, high = affine_image(made, node, [found[i] for i in node.inputs])
            assert (exact(got.lower.flatten()) <= low).all() and (exact(got.upper.flatten()) >= high).all()


@pytest.mark.parametrize("nasty", [False, True], ids=["plain", "hostile"])
@pytest.mark.parametrize("name", NAMES)
def test_hidden_bounds(name: str, nasty: bool, seed: int = 0) -> None:
    """float32 bounds of pre-activations contain the best of the exact CROWN bounds and the exact interval images, the
    first ones and those of the tightened operands."""
    made = make(name, seed)
    made = hostile(made, seed) if nasty else made
    start = made.state()
    state = crown_hidden(made.engine, start)
    checked = 0
    for index in preactivations(made.graph):
        node = made.graph.nodes[index]
        if exact_by_ibp(made.graph, node):
            continue
        planes = relaxations(made.graph, state.bounds, torch.float64, before=index)
        picked = list(range(0, node.size, max(1, node.size // 3)))
        one = np.zeros((len(picked), node.size))
        one[range(len(picked)), picked] = 1.0
        # Rows may have been bounded with the planes of either arithmetic; both are valid.
        narrow = relaxations(made.graph, state.bounds, torch.float32, before=index)
        lower, upper = (
            [
                max(pair)
                for pair in zip(*(walk_bound(made, {index: exact(s * one)}, p) for p in (planes, narrow)), strict=True)
            ]
            for s in (1.0, -1.0)
        )
        upper = [-v for v in upper]
        image = _image(made, state, index)
        for k, low, up in zip(picked, lower, upper, strict=True):
            old, new = ([float(t.flatten()[k]) for t in b] for b in (start.bounds[index], state.bounds[index]))
            assert Fraction(new[0]) <= max(low, Fraction(old[0]), image[0][k])
            assert Fraction(new[1]) >= min(up, Fraction(old[1]), image[1][k])
            checked += 1
    assert checked > 0


def _image(made: Case, state: BoundState, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact interval image of one node from the state's bounds of its operands."""
    node = made.graph.nodes[index]
    assert isinstance(node.op, AffineOp)
    return affine_image(made, node, [state.bounds[i].to(torch.float64) for i in node.inputs])


@pytest.mark.parametrize("seed", range(20))
def test_folded_parameters_are_accounted_for(seed: int) -> None:
    """A stored parameter may be off by its recorded roundings; bounds hold for the worst true parameters."""
    folded = 1000  # so many that no other allowance can pay for them
    b = Builder((3,), seed)
    x = b.relu(b.linear(0, 4))
    x = b.relu(b.linear(x, 4))
    b.linear(x, 3)
    made = b.graph()
    nodes: list[Node] = [Node(0, "x", Input(), (), (3,))]
    parameters: dict[Handle, Tensor] = {}
    for node in made.nodes[1:]:
        op = node.op
        if isinstance(op, Linear):
            assert op.bias is not None
            new = [Handle(f"{h.name}d", h.shape, torch.float64) for h in (op.weight, op.bias)]
            for handle, old in zip(new, (op.weight, op.bias), strict=True):
                parameters[handle] = made.parameters[old].double() * (1 + 2.0**-30)
            size = Handle(f"{op.bias.name}m", op.bias.shape, torch.float64)
            parameters[size] = parameters[new[1]].abs()
            op = Linear(new[0], new[1], size, folded=folded)
        nodes.append(Node(node.index, node.name, op, node.inputs, node.shape))
    graph = Graph(tuple(nodes), made.output, parameters)
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn((1, 3), generator=random)
    stored = case(graph, Interval(centre - 0.3, centre + 0.3))
    state = crown_hidden(stored.engine, stored.state())
    intervals = ibp.propagate(stored.engine, stored.box)[0]
    # All true parameters larger, or smaller, by all roundings but the two that adding them up may leave.
    for direction in (-1, 1):
        true = {h: v + direction * v.abs() * (folded - 2) * 2.0**-53 for h, v in parameters.items()}
        other = case(Graph(tuple(nodes), made.output, true), stored.box)
        for index in (*preactivations(graph), graph.output):
            size = graph.nodes[index].size
            planes = relaxations(graph, state.bounds, torch.float64, before=index)
            want = walk_bound(other, {index: exact(np.eye(size))}, planes)
            form = hidden_rows(torch.arange(size, device=DEVICE), (size,), Chunk(0, size, size), torch.float64)
            got, _ = lower_bounds(stored.engine, state, {index: form}, planes)
            assert all(Fraction(v) <= w for v, w in zip(got[0].tolist(), want, strict=True))
            if exact_by_ibp(graph, graph.nodes[index]):
                low = intervals[index].lower[0].tolist()
                assert all(Fraction(v) <= w for v, w in zip(low, want, strict=True))
