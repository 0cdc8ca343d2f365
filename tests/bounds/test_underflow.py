"""Every pass is sound where products underflow and sums come near overflow, against rational arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.bounds.exact import affine_image, exact, walk_bound
from tests.bounds.extreme import extreme
from tests.bounds.nets import Case
from tests.support.device import CONV_FLOAT32, DEVICE
from verifier.bounds import ibp, walk
from verifier.bounds.crown import (
    BoundState,
    hidden_rows,
    initial_state,
    lower_bounds,
    preactivations,
    relaxations,
)
from verifier.core import numerics
from verifier.graph.op import AffineOp
from verifier.ops.conv import Conv

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
            continue
        found, charges = ibp.propagate(made.graph, made.backend, made.box.to(dtype))
        for node in made.graph.nodes[1:]:
            inputs = [found[i] for i in node.inputs]
            if not isinstance(node.op, AffineOp) or not all(bool(torch.isfinite(torch.stack(x)).all()) for x in inputs):
                continue
            low, high = affine_image(made, node, inputs)
            got, size = found[node.index], charges.partial[node.index].flatten()
            for k in range(node.size):
                below, above = float(got.lower.flatten()[k]), float(got.upper.flatten()[k])
                assert not np.isfinite(below) or Fraction(below) <= low[k]
                assert not np.isfinite(above) or Fraction(above) >= high[k]
                assert not bool(torch.isfinite(size[k])) or Fraction(float(size[k])) >= max(abs(low[k]), abs(high[k]))
                known += bool(np.isfinite(below) and np.isfinite(above))
    assert known > 20


def rows_hold(made: Case, dtype: torch.dtype, index: int) -> tuple[int, int]:
    """Rows of +-e of some elements: how many are finite, and how many of them exceed their formula's exact value."""
    known = initial_state(made.graph, made.backend, made.box)
    if dtype == WIDE:  # float64 bounds, as a search over input boxes has them: they reach farther
        known = BoundState(made.box, *ibp.propagate(made.graph, made.backend, made.box.to(dtype)), True)
    if not all(bool(torch.isfinite(torch.stack(known.bounds[i])).all()) for i in range(index)):
        return 0, 0
    node = made.graph.nodes[index]
    picked = list(range(0, node.size, max(1, node.size // 2)))[:2]
    planes = relaxations(made.graph, known.bounds, dtype, before=index)
    count = len(picked)
    form = hidden_rows(torch.tensor(picked, device=DEVICE), node.shape, 0, 2 * count, 2 * count, dtype)
    charges = known.charges.to(dtype)
    got, _ = lower_bounds(made.graph, made.backend, known, {index: form}, planes, dtype, charges)
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


def test_the_charges_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
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
