"""Every pass is sound where products underflow and sums come near overflow, against rational arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.bounds.exact import affine_image, exact, walk_bound
from tests.bounds.extreme import extreme, wild
from tests.bounds.nets import Case, case, make
from tests.support.device import CONV_FLOAT32, DEVICE
from verifier.bab.boxes import bound_boxes
from verifier.bounds import ibp, walk
from verifier.bounds.crown import (
    BoundState,
    Specification,
    crown_hidden,
    crown_rows,
    hidden_rows,
    initial_state,
    lower_bounds,
    preactivations,
    relaxations,
)
from verifier.bounds.engine import Arithmetic, Engine
from verifier.bounds.walk import Walk, concretise
from verifier.core import numerics
from verifier.core.backend import Chunk
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu

NARROW, WIDE = torch.float32, torch.float64
NAMES = ["mlp", "wide_shape", "shared", "conv", "strided", "residual", "preactivation", "pooled"]
# Arithmetic of the pass, and the dtype of the parameters.
KINDS = [(NARROW, NARROW), (NARROW, WIDE), (WIDE, WIDE)]
IDS = ["float32", "float64-in-float32", "float64"]


@pytest.fixture(params=[False, True], ids=["gradual", "flush"])
def flush(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Subnormal numbers kept by this thread, and flushed."""
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def finite(values: torch.Tensor) -> list[bool]:
    return torch.isfinite(values).tolist()


def rounded(made: Case, dtype: torch.dtype) -> Engine:
    """Accounts for rounding errors in this dtype."""
    return made.engine.using(Arithmetic(dtype, rounding=True))


def convolves(made: Case, dtype: torch.dtype) -> bool:
    """Whether float32 convolutions without an error bound are among the ops."""
    return dtype == NARROW and not CONV_FLOAT32 and any(isinstance(n.op, Conv) for n in made.graph.nodes)


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize(("dtype", "stored"), KINDS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_intervals(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    known = 0
    for seed in range(2):
        made = extreme(name, seed, dtype, stored)
        if convolves(made, dtype):
            pytest.skip("float32 convolutions have no error bound on this device")
        found, magnitudes = ibp.propagate(rounded(made, dtype), made.box)
        for node in made.graph.nodes[1:]:
            inputs = [found[i] for i in node.inputs]
            if not isinstance(node.op, AffineOp) or not all(bool(torch.isfinite(torch.stack(x)).all()) for x in inputs):
                continue
            low, high = affine_image(made, node, inputs)
            got, size = found[node.index], magnitudes.partial[node.index].flatten()
            for k in range(node.size):
                below, above = float(got.lower.flatten()[k]), float(got.upper.flatten()[k])
                assert not np.isfinite(below) or Fraction(below) <= low[k]
                assert not np.isfinite(above) or Fraction(above) >= high[k]
                assert not bool(torch.isfinite(size[k])) or Fraction(float(size[k])) >= max(abs(low[k]), abs(high[k]))
                known += bool(np.isfinite(below) and np.isfinite(above))
    assert known > 20


def rows_hold(made: Case, dtype: torch.dtype, index: int) -> tuple[int, int]:
    """Rows of +-e of some elements: how many are finite, and how many of them exceed their formula's exact value."""
    known = initial_state(made.engine, made.box)
    if dtype == WIDE:  # float64 bounds, as a search over input boxes has them: they reach farther
        known = BoundState(made.box, *ibp.propagate(rounded(made, dtype), made.box), True)
    if not all(bool(torch.isfinite(torch.stack(known.bounds[i])).all()) for i in range(index)):
        return 0, 0
    node = made.graph.nodes[index]
    picked = list(range(0, node.size, max(1, node.size // 2)))[:2]
    planes = relaxations(made.graph, known.bounds, dtype, before=index)
    count = len(picked)
    form = hidden_rows(torch.tensor(picked, device=DEVICE), node.shape, Chunk(0, 2 * count, 2 * count), dtype)
    got, _ = lower_bounds(rounded(made, dtype), known, {index: form}, planes)
    one = np.zeros((2 * count, node.size))
    one[range(2 * count), picked * 2] = [1.0] * count + [-1.0] * count
    want = walk_bound(made, {index: exact(one)}, planes)
    pairs = [(g, w) for g, w in zip(got[0].double().tolist(), want, strict=True) if np.isfinite(g)]
    return len(pairs), sum(Fraction(g) > w for g, w in pairs)


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize(("dtype", "stored"), KINDS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_from_single_elements(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Products with parameters, sums, relaxations and the concretisation of whole walks."""
    total = 0
    small = name in ("mlp", "wide_shape", "shared")
    for seed in range(6 if small else 1):
        made = extreme(name, seed, dtype, stored)
        if convolves(made, dtype):
            continue
        nodes = (*preactivations(made.graph), made.graph.output)
        for index in nodes if small else nodes[-2:]:
            count, wrong = rows_hold(made, dtype, index)
            assert wrong == 0, (seed, index)
            total += count
    assert total > 0 or not small


def test_accounting_for_rounding_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them bounds are wrong, in both arithmetics."""
    for module in (walk, ibp, numerics):
        monkeypatch.setattr(module, "underflow", lambda dtype: 0.0, raising=False)
    for dtype, stored in KINDS:
        wrong = 0
        for name in ("mlp",):
            for seed in range(8):
                made = extreme(name, seed, dtype, stored)
                wrong += sum(rows_hold(made, dtype, i)[1] for i in (*preactivations(made.graph), made.graph.output))
        assert wrong > 0, (dtype, stored)


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_a_specification_with_multipliers(seed: int) -> None:
    """Rows over outputs and inputs, and multipliers of splits, over many decades."""
    random = np.random.default_rng(seed)
    made = extreme(("mlp", "shared")[seed % 2], seed, NARROW, WIDE)
    state = crown_hidden(made.engine, initial_state(made.engine, made.box))
    outputs, inputs = made.graph.output_shape, made.graph.input_shape
    spec = Specification(*(wild((1, 3, *shape), random, (-300, 30)).to(DEVICE) for shape in (outputs, inputs)))
    splits = {
        node.index: wild((1, 1, *node.shape), random, (-300, 20)).to(DEVICE)
        for node in made.graph.nodes
        if isinstance(node.op, Relu)
    }
    assert spec.x is not None
    start = {made.graph.output: exact(spec.y[0].flatten(1)), 0: exact(spec.x[0].flatten(1))}
    planes = relaxations(made.graph, state.bounds, WIDE)
    for given in (None, splits):
        got, _ = crown_rows(made.engine, state, spec, splits=given)
        want = walk_bound(made, start, planes, given)
        assert bool(torch.isfinite(got).any())
        assert all(Fraction(g) <= w for g, w in zip(got[0].tolist(), want, strict=True) if np.isfinite(g))


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize(("dtype", "decades"), [(NARROW, (-44, 38)), (WIDE, (-322, 300))], ids=["float32", "float64"])
def test_concretisation(dtype: torch.dtype, decades: tuple[float, float]) -> None:
    random = np.random.default_rng(0)
    made = make("mlp", 0)
    known = 0
    for _ in range(60):
        low, up = np.sort(wild((2, 6), random, (-38, 38)).float().numpy(), axis=0)
        box = Interval(*(torch.from_numpy(b)[None].to(DEVICE, dtype) for b in (low, up)))
        # The largest coefficients stand at the smallest numbers, so that products are neither all huge nor all lost.
        small = torch.from_numpy(random.uniform(*decades, (1, 1, 1)))
        a = (wild((1, 4, 6), random, (-8, 8)) * 10.0**small).to(DEVICE, dtype)
        constant, rounding_error = wild((1, 4), random, decades).to(DEVICE, dtype), torch.zeros((1, 4), dtype=dtype)
        walked = Walk(a, constant, rounding_error.to(DEVICE), torch.zeros_like(rounding_error, device=DEVICE))
        got = numerics.finite_lower(concretise(rounded(made, dtype), walked, box))[0]
        least, most = exact(box.lower[0]), exact(box.upper[0])
        for row, offset, value in zip(a[0], constant[0], got.double().tolist(), strict=True):
            if not bool(torch.isfinite(row).all() and torch.isfinite(offset)):
                assert value == -np.inf
            elif np.isfinite(value):
                terms = exact(row)
                assert Fraction(value) <= np.minimum(terms * least, terms * most).sum() + Fraction(float(offset))
                known += 1
    assert known > 50


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize("slope", [0.0, 0.25, -1.0, 3.0, 1e30, 1e-38])
@pytest.mark.parametrize("dtype", [NARROW, WIDE], ids=["float32", "float64"])
def test_planes_of_relus(dtype: torch.dtype, slope: float) -> None:
    """Planes at the ends of the format enclose the function at both ends and at zero, where they need to."""
    random = np.random.default_rng(1)
    least, most = (-38, 38) if dtype == NARROW else (-307, 307)
    low, up = -wild((200,), random, (least, most)).abs(), wild((200,), random, (least, most)).abs()
    op, box = Relu(slope), Interval(low[None].to(dtype), up[None].to(dtype))
    planes = op.relax([box])
    k = Fraction(op.negative_slope)
    parts = (planes.lower_slope, planes.lower_intercept, planes.upper_slope, planes.upper_intercept)
    wide = [p.expand(1, 1, 200)[0, 0].double().tolist() for p in parts]
    for ls, li, us, ui, z0, z1 in zip(
        *wide, box.lower[0].double().tolist(), box.upper[0].double().tolist(), strict=True
    ):
        for z in map(Fraction, (z0, 0, z1)):
            value = z if z >= 0 else k * z
            assert not np.isfinite([ls, li]).all() or Fraction(ls) * z + Fraction(li) <= value
            assert not np.isfinite([us, ui]).all() or Fraction(us) * z + Fraction(ui) >= value


def test_overflow_proves_nothing() -> None:
    """Coefficients, sums and magnitudes that become infinite leave no bound, in both arithmetics."""
    for dtype, scale in ((NARROW, 1e30), (WIDE, 1e200)):
        made = make("mlp", 0)
        grown = {h: v.double() * scale for h, v in made.graph.parameters.items()}
        renamed = {h: Handle(h.name, h.shape, WIDE) for h in grown}
        nodes = tuple(
            replace(n, op=replace(n.op, weight=renamed[n.op.weight], bias=renamed[n.op.bias]))
            if isinstance(n.op, Linear) and n.op.bias is not None
            else n
            for n in made.graph.nodes
        )
        huge = case(Graph(nodes, made.graph.output, {renamed[h]: v for h, v in grown.items()}), made.box)
        for kind in ("interval", "linear", "crown"):
            spec = Specification(torch.eye(3, dtype=WIDE, device=DEVICE)[None])
            found = bound_boxes(rounded(huge, dtype), huge.box, spec, kind, torch.arange(4, device=DEVICE))
            assert found.lower.tolist() == [[-np.inf] * 3]
