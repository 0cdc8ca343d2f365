"""Boxes, clips and leaf certificates are sound where products underflow, against rational arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.bounds.exact import exact, walk_bound
from tests.bounds.extreme import exact_values, extreme, wild
from tests.support.device import DEVICE
from verifier.bab import boxes, clip, forward, leaf_lp
from verifier.bab.boxes import Hidden, bound_boxes
from verifier.bounds import ibp, walk
from verifier.bounds.crown import Specification, crown_hidden, initial_state, relaxations
from verifier.bounds.engine import ROUNDED_32, ROUNDED_64, Arithmetic
from verifier.bounds.walk import Walk
from verifier.core.interval import Interval
from verifier.ops.relu import Relu

F64 = torch.float64


@pytest.fixture(params=[False, True], ids=["gradual", "flush"])
def flush(request: pytest.FixtureRequest) -> Iterator[None]:
    """Subnormal numbers kept by this thread, and flushed."""
    torch.set_flush_denormal(request.param)
    yield
    torch.set_flush_denormal(False)


def violations(
    arithmetic: Arithmetic, hidden: Hidden, stored: torch.dtype, seeds: range, wide: bool
) -> tuple[int, int]:
    """Rows +-e of the outputs: how many have finite bounds, and how many bounds exceed the exact value of a point.

    Args:
        wide: on boxes, not on single points, where nothing but magnitudes lies between bound and value.
    """
    known = wrong = 0
    for seed in seeds:
        made = extreme("mlp", seed, arithmetic.dtype, stored)
        if not wide:
            made = replace(made, box=Interval(made.box.lower, made.box.lower))
        n = made.graph.nodes[made.graph.output].size
        one = torch.cat([torch.eye(n, dtype=F64), -torch.eye(n, dtype=F64)]).to(DEVICE)
        found = bound_boxes(
            made.engine.using(arithmetic),
            made.box,
            Specification(one.reshape(1, 2 * n, *made.graph.output_shape)),
            hidden,
            torch.arange(4, device=DEVICE),
        )
        for point in made.samples(6 if wide else 1)[:, 0]:
            values = exact_values(made, point.double())[made.graph.output]
            for bound, value in zip(found.lower[0].double().tolist(), [*values, *(-values)], strict=True):
                known += bool(np.isfinite(bound))
                wrong += bool(np.isfinite(bound)) and Fraction(bound) > value
    return known, wrong


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
@pytest.mark.parametrize(
    ("arithmetic", "stored"),
    [(ROUNDED_32, torch.float32), (ROUNDED_32, F64), (ROUNDED_64, F64)],
    ids=["float32", "float64-in-float32", "float64"],
)
def test_rows_of_boxes(arithmetic: Arithmetic, stored: torch.dtype, hidden: Hidden) -> None:
    """Intervals, the linear sweep forward with its Jacobians, and rows of hidden nodes."""
    for wide in (True, False):
        known, wrong = violations(arithmetic, hidden, stored, range(12), wide)
        assert wrong == 0
        assert known > 20


@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
@pytest.mark.parametrize("arithmetic", [ROUNDED_32, ROUNDED_64], ids=["float32", "float64"])
def test_accounting_for_rounding_is_needed(
    arithmetic: Arithmetic, hidden: Hidden, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (boxes, forward, ibp, walk):
        monkeypatch.setattr(module, "underflow", lambda dtype: 0.0, raising=False)
    assert violations(arithmetic, hidden, F64, range(12), wide=False)[1] > 0


def halfspaces(random: np.random.Generator, rows: int = 3, n: int = 5) -> tuple[clip.Halfspaces, Interval]:
    """Rows whose coefficients are small where the box is large, on one box."""
    decade = random.uniform(-322, 300)
    low, up = np.sort(wild((2, n), random, (-38, 38)).float().numpy(), axis=0)
    box = Interval(*(torch.from_numpy(b)[None].to(DEVICE) for b in (low, up)))
    a = wild((1, rows, n), random, (-5, 5)) * 10.0**decade
    a = a / torch.where(torch.from_numpy(random.random(n) < 0.5), 1.0, box.magnitude()[0].double().cpu().clamp(1e-30))
    constant = wild((1, rows), random, (-5, 5)) * 10.0 ** max(-300.0, decade)
    none = torch.zeros((1, rows), dtype=F64, device=DEVICE)
    walked = Walk(a.to(DEVICE), constant.to(DEVICE), none, none)
    zero = torch.zeros((1, rows), dtype=F64, device=DEVICE)
    return clip.halfspaces(walked, zero, box.to(F64), torch.arange(n - 1, device=DEVICE)), box


@pytest.mark.usefixtures("flush")
def test_cuts_and_combinations() -> None:
    """No combination says more than its rows, no cut loses a point that satisfies all of them."""
    random = np.random.default_rng(0)
    cut = 0
    for _ in range(60):
        half, box = halfspaces(random)
        part = Interval(box.lower[:, :-1], box.upper[:, :-1])
        ends = [exact(b[0]) for b in part]
        both = clip.combine(half, part)[0]
        for k, value in enumerate(clip.least(both, part)[0].tolist()):
            if np.isfinite(value) and k < 3:
                a = exact(half.a[0, k])
                true = np.minimum(a * ends[0], a * ends[1]).sum() + Fraction(float(half.c[0, k]))
                assert Fraction(value) + Fraction(float(half.slack[0, k])) <= true
        new = clip.cut(both, part)
        cut += bool(((new.lower > part.lower) | (new.upper < part.upper)).any())
        kept = [exact(b[0]) for b in new]
        usable = [k for k in range(3) if np.isfinite(float(half.c[0, k]))]
        rows = [
            (exact(half.a[0, k]), Fraction(float(half.c[0, k])) - Fraction(float(half.slack[0, k]))) for k in usable
        ]
        for share in random.integers(0, 9, (40, 4)):
            x = ends[0] + np.array([Fraction(int(s), 8) for s in share]) * (ends[1] - ends[0])
            if all((a * x).sum() + c <= 0 for a, c in rows):
                assert (kept[0] <= x).all() and (x <= kept[1]).all()
    assert cut > 5


@pytest.mark.usefixtures("flush")
@pytest.mark.parametrize("seed", range(8))
def test_certificates_of_leaves(seed: int) -> None:
    """Weights and multipliers of many decades: the margin is never more than the exact value of the combination."""
    random = np.random.default_rng(seed)
    made = extreme("mlp", seed, torch.float32, (torch.float32, F64)[seed % 2])
    state = crown_hidden(made.engine, initial_state(made.engine, made.box))
    spec = Specification(wild((1, 3, *made.graph.output_shape), random, (-30, 30)).to(DEVICE))
    planes = relaxations(made.graph, state.bounds, F64)
    for _ in range(6):
        thresholds = wild((3,), random, (-300, 20)).to(DEVICE)
        weights = wild((3,), random, (-320, 0)).abs().numpy()
        splits = {
            node.index: wild((1, 1, *node.shape), random, (-300, 0)).to(DEVICE)
            for node in made.graph.nodes
            if isinstance(node.op, Relu)
        }
        closed, real, margin, error = leaf_lp.certify(
            made.engine, state, leaf_lp.LeafRows(spec, thresholds), (weights, splits)
        )
        assert real == closed and error == 0.0  # nothing is claimed about runs
        w = exact(torch.from_numpy(weights))
        row = (w[:, None] * exact(spec.y[0].flatten(1))).sum(0)[None]
        true = walk_bound(made, {made.graph.output: row}, planes, splits)[0] - (w * exact(thresholds)).sum()
        assert not np.isfinite(margin) or Fraction(margin) <= true + abs(true) * Fraction(2) ** -50
        assert not closed or true > 0
