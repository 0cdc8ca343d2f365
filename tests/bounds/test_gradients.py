"""Closed-form gradients of the bound against autograd: every op with parameters, split multipliers, every graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bounds.nets import ARCHITECTURES, Builder, Case, case, make
from tests.support.device import DEVICE
from verifier.bounds.alpha import Parameters, Schedule, Splits, initial_parameters, optimise, sweep
from verifier.bounds.crown import BoundState, Specification, crown_hidden, crown_rows, relaxations
from verifier.bounds.engine import PLAIN, Arithmetic
from verifier.bounds.walk import backward, concretise, minimiser
from verifier.core.interval import Interval
from verifier.graph.linear_forms import Form
from verifier.graph.op import NonlinearOp, ParamSpec
from verifier.ops.power import Power
from verifier.ops.product import MatMul
from verifier.ops.registry import our_classes
from verifier.ops.relu import Relu
from verifier.ops.shape import Reshape
from verifier.ops.within import Within

F64 = Arithmetic(torch.float64, rounding=False)
ROWS = 3


def operators() -> list[NonlinearOp]:
    """Every nonlinear op that is built without arguments, and others with typical ones."""
    plain = [
        cls()
        for cls in our_classes()
        if issubclass(cls, NonlinearOp)
        and all(p.default is not p.empty for p in inspect.signature(cls).parameters.values())
    ]
    return [*plain, Relu(0.1), Relu(2.0), Power(3.0), Power(0.5)]


def arity(op: NonlinearOp) -> int | None:
    """How many operands an op takes: the first number that its forward accepts."""
    for n in (1, 2):
        try:
            op.forward([torch.ones(1, 2, 2)] * n, ())
        except (IndexError, ValueError, TypeError):
            continue
        return n
    return None


def parameterised() -> list[NonlinearOp]:
    box = Interval(torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 1.5))
    ops = [Within(-0.5, 1.0) if isinstance(op, Within) else op for op in operators()]  # by itself it has no ends
    return [op for op in ops if (n := arity(op)) is not None and op.parameters([box] * n)]


def around(op: NonlinearOp, centre: float, seed: int) -> Case | None:
    """linear - op - linear with every operand near ``centre``; None where the op is not bounded there."""
    builder = Builder((3,), seed)
    operands = []
    for _ in range(arity(op) or 0):
        z = builder.linear(0, 4)
        layer = builder.nodes[z].op
        builder.parameters[layer.handles[1]] = torch.full((4,), centre)
        operands.append(builder.op(Reshape((2, 2)), z))
    x = builder.op(op, *operands)
    builder.linear(builder.flat(x), 3)
    for radius in (0.6, 0.1):  # the second one for ops that are only defined near zero
        wide = torch.full((2, 3), radius)
        made = case(builder.graph(), Interval(-wide, wide))
        bounds = made.state().bounds[x]
        if bool(torch.isfinite(bounds.lower).all() and torch.isfinite(bounds.upper).all()):
            return made
    return None


def random_parameters(specs: Mapping[int, Mapping[str, ParamSpec]], seed: int) -> Parameters:
    """Values strictly between the limits, (B, ROWS, *shape), float64."""
    random = torch.Generator().manual_seed(seed)
    out: Parameters = {}
    for i, group in specs.items():
        out[i] = {}
        for name, s in group.items():
            b, _, *shape = s.initial.shape
            share = 0.1 + 0.8 * torch.rand((b, ROWS, *shape), generator=random, dtype=torch.float64).to(DEVICE)
            low, high = torch.as_tensor(s.low).double(), torch.as_tensor(s.high).double()
            out[i][name] = low + share * (high - low)
    return out


def rows(made: Case, seed: int) -> Specification:
    random = torch.Generator().manual_seed(seed + 77)
    shape = (1, ROWS, *made.graph.output_shape)
    return Specification(torch.randn(shape, generator=random, dtype=torch.float64).to(DEVICE))


def compare(made: Case, state: BoundState, seed: int, signs: Mapping[int, Tensor] | None = None) -> int:
    """Both gradients for all parameters and multipliers at random values; the number of entries that are not zero."""
    graph = made.graph
    wide = {i: b.to(torch.float64) for i, b in state.bounds.items()}
    _, specs = initial_parameters(graph, wide, ROWS, len(graph.nodes))
    parameters = random_parameters(specs, seed)
    signs = {i: s.double() for i, s in (signs or {}).items()}
    batch = made.box.lower.shape[0]
    random = torch.Generator().manual_seed(seed)
    multipliers = {
        i: torch.rand((batch, ROWS, *s.shape[2:]), generator=random, dtype=torch.float64).to(DEVICE)
        for i, s in signs.items()
    }
    # MatMul rounds its mixtures to a grid, which autograd takes for a constant.
    rounded = [isinstance(graph.nodes[i].op, MatMul) for i, g in parameters.items() for _ in g]
    leaves = [v for g in parameters.values() for v in g.values()] + list(multipliers.values())
    for leaf in leaves:
        leaf.requires_grad_(True)
    splits = {i: signs[i] * m for i, m in multipliers.items()}
    start = rows(made, seed).forms(made.backend, graph.output, torch.float64)
    planes = relaxations(graph, state.bounds, torch.float64, parameters)
    engine = made.engine.using(F64)
    walk = backward(engine, start, planes, None, splits, keep=True)
    box = made.box.to(torch.float64)
    value = concretise(engine, walk, box)
    expected = list(torch.autograd.grad(value.sum(), leaves, allow_unused=True))
    with torch.no_grad():
        for at in (n for n, r in enumerate(rounded) if r):
            expected[at] = differences(made, state, start, parameters, leaves[at])
        z = sweep(engine, walk, planes, minimiser(walk, box), value.shape)
        found = [
            planes[i].gradients(walk.kept[i], z[i])[name] if i in z else None
            for i, g in parameters.items()
            for name in g
        ]
        found += [signs[i] * z[i][0] if i in z else None for i in multipliers]
    owners = [i for i, g in parameters.items() for _ in g] + list(multipliers)
    count = 0
    for i, got, want, leaf in zip(owners, found, expected, leaves, strict=True):
        want = torch.zeros_like(leaf) if want is None else want
        got = torch.zeros_like(leaf) if got is None else got.expand_as(leaf)
        # Where an input has no width, and only there, autograd meets a division by zero in a branch that is not taken.
        blind = torch.isnan(want)
        if bool(blind.any()):
            inputs = [state.bounds[j] for j in graph.nodes[i].inputs]
            narrow = torch.stack([b.lower == b.upper for b in inputs]).any(0)[:, None]
            assert bool((narrow | ~blind).all())
        assert bool(torch.isfinite(got).all())
        want = torch.where(blind, got, want)
        torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-8)
        count += int((want != 0).sum())
    return count


def differences(
    made: Case, state: BoundState, start: Mapping[int, Form], parameters: Parameters, leaf: Tensor
) -> Tensor:
    """Central differences of the sum of all bounds by every entry of one parameter, over whole steps of its grid."""
    out, step = torch.zeros_like(leaf), 2.0**-16

    def total() -> float:
        planes = relaxations(made.graph, state.bounds, torch.float64, parameters)
        walk = backward(made.engine.using(F64), start, planes)
        return float(concretise(made.engine.using(F64), walk, made.box.to(torch.float64)).sum())

    flat, slopes = leaf.view(-1), out.view(-1)
    for k in range(flat.shape[0]):
        middle = round(float(flat[k]) * 2**16) / 2**16
        flat[k] = middle + step
        high = total()
        flat[k] = middle - step
        low = total()
        flat[k] = middle
        slopes[k] = (high - low) / (2 * step)
    return out


OPERATORS = parameterised()


def test_the_known_ops_are_among_them() -> None:
    assert {"Relu", "Sigmoid", "Tanh", "Reciprocal", "Square"} <= {type(op).__name__ for op in OPERATORS}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_every_op(op: NonlinearOp, seed: int) -> None:
    found = [around(op, centre, seed) for centre in (-3.0, -0.4, 0.0, 0.4, 3.0)]
    counts = [compare(made, made.state(), seed) for made in found if made is not None]
    assert counts and sum(counts) > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_graph(name: str, seed: int) -> None:
    made = make(name, seed, batch=2, radius=1.0)
    state = crown_hidden(made.engine, made.state())
    assert compare(made, state, seed) > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "preactivation", "shared", "concat"])
def test_split_multipliers(name: str, seed: int) -> None:
    made = make(name, seed, batch=2, radius=1.0)
    state = crown_hidden(made.engine, made.state())
    random = torch.Generator().manual_seed(seed)
    signs = {}
    for node in made.graph.nodes:
        if isinstance(node.op, Relu):
            shape = state.bounds[node.inputs[0]].lower.shape
            signs[node.index] = torch.randint(-1, 2, shape, generator=random)[:, None].float().to(DEVICE)
    assert compare(made, state, seed, signs) > 0


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_optimisation_reports_is_what_its_iterate_gives(name: str) -> None:
    """The best parameters and multipliers of every row, taken together, give the bounds that were reported."""
    made = make(name, 1, batch=2, radius=1.0)
    state = crown_hidden(made.engine, made.state())
    spec = rows(made, 1)
    values, _ = initial_parameters(made.graph, state.bounds, ROWS, len(made.graph.nodes))
    signs, multipliers = {}, {}
    for node in made.graph.nodes:
        if isinstance(node.op, Relu):
            b = state.bounds[node.inputs[0]]
            signs[node.index] = torch.where((b.lower < 0) & (b.upper > 0), -1.0, 0.0)[:, None]
            multipliers[node.index] = torch.zeros(2, ROWS, *b.lower.shape[1:], device=DEVICE)
    start = spec.forms(made.backend, made.graph.output, torch.float32)
    found = optimise(made.engine, state, start, values, Schedule(6), Splits(signs, multipliers))
    splits = {i: signs[i] * m for i, m in found.multipliers.items()}
    again, _ = crown_rows(made.engine.using(PLAIN), state, spec, found.parameters, splits)
    torch.testing.assert_close(again, found.lower, rtol=1e-5, atol=1e-5)
    first, _ = crown_rows(made.engine.using(PLAIN), state, spec)
    assert bool((found.lower >= first - 1e-5).all()) and bool((found.lower > first + 1e-4).any())


class _Reads(TorchDispatchMode):
    """Counts where the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_steps_read_no_value(name: str) -> None:
    made = make(name, 1, batch=2, radius=1.0)
    state = crown_hidden(made.engine, made.state())
    start = rows(made, 1).forms(made.backend, made.graph.output, torch.float32)

    def reads(steps: int) -> int:
        values, _ = initial_parameters(made.graph, state.bounds, ROWS, len(made.graph.nodes))
        with _Reads() as seen:
            optimise(made.engine, state, start, values, Schedule(steps))
        return seen.count

    assert reads(1) == reads(9)


def test_values_that_no_row_depends_on_stay() -> None:
    """Slopes of a branch that the rows do not read get no gradient, and none from the steps before either."""
    b = Builder((4,), 3, gain=1.5)
    x = b.linear(0, 6)
    read, other = b.relu(x), b.relu(b.linear(x, 5))
    b.linear(read, 2)
    wide = torch.full((1, 4), 0.8)
    made = case(b.graph(), Interval(-wide, wide))
    state = crown_hidden(made.engine, made.state())
    values, _ = initial_parameters(made.graph, state.bounds, ROWS, len(made.graph.nodes))
    before = {i: group["alpha"].clone() for i, group in values.items()}
    start = rows(made, 1).forms(made.backend, made.graph.output, torch.float32)
    found = optimise(made.engine, state, start, values, Schedule(6))
    assert torch.equal(found.parameters[other]["alpha"], before[other])
    assert not torch.equal(found.parameters[read]["alpha"], before[read])
