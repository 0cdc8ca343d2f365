"""Unary ops: interval images and planes hold in exact arithmetic, for every box, parameter value and dtype."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.exact import UNARY, boxes
from tests.support.device import DEVICE
from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp
from verifier.ops.bent import BentOp
from verifier.ops.curves import CurveOp
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.relu import Relu
from verifier.testing import unary
from verifier.testing.samples import Exact

NAMES = [f"{i}-{op.kind}" for i, (op, _, _) in enumerate(UNARY)]
every_op = pytest.mark.parametrize("case", UNARY, ids=NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
Case = tuple[NonlinearOp, Exact, tuple[float, float]]


@every_op
@every_dtype
@settings(max_examples=10)
@given(data=st.data())
def test_interval_contains_exact_values(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    op, exact, domain = case
    unary.interval_contains_exact_values(op, exact, data.draw(boxes(domain, dtype)))


@every_op
@every_dtype
@settings(max_examples=16)
@given(data=st.data())
def test_planes_hold_exactly(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    op, exact, domain = case
    box = data.draw(boxes(domain, dtype))
    share = data.draw(st.sampled_from([None, 0.0, 0.3, 1.0]) | st.floats(0, 1))
    unary.planes_hold_exactly(op, exact, box, share)


magnitudes = st.floats(2.0**-120, 2.0**120, width=32) | st.floats(2.0**-7, 128, width=32)
ks = st.sampled_from([0.0, 0.5, 0.01, -1.0, 3.0])


@every_dtype
@settings(max_examples=60)
@given(
    ends=st.lists(st.tuples(magnitudes, magnitudes), min_size=1, max_size=8),
    k=st.sampled_from([0.0, 0.5, 0.01, -1.0, 3.0]),
)
def test_relu_chord_in_rational_arithmetic(dtype: torch.dtype, ends: list[tuple[float, float]], k: float) -> None:
    """At both ends and at zero the planes hold exactly, with ends of any size, and the chord is tight."""
    op = Relu(k)
    slope = Fraction(op.negative_slope)
    low = -torch.tensor([[e[0] for e in ends]], dtype=dtype, device=DEVICE)
    up = torch.tensor([[e[1] for e in ends]], dtype=dtype, device=DEVICE)
    planes = op.relax([Interval(low, up)])
    for i in range(len(ends)):
        ls, li, us, ui = (
            t.reshape(-1)[i] if t.numel() > 1 else t.reshape(())
            for t in (planes.lower_slope, planes.lower_intercept, planes.upper_slope, planes.upper_intercept)
        )
        for z in (low[0, i], low[0, i] * 0, up[0, i]):
            exact = Fraction(z.item())
            value = exact if exact >= 0 else slope * exact
            assert Fraction(ls.item()) * exact + Fraction(li.item()) <= value
            assert Fraction(us.item()) * exact + Fraction(ui.item()) >= value
        chord = us * up[0, i] + ui if k <= 1 else ls * up[0, i] + li
        size = up[0, i] - low[0, i]
        assert (chord - up[0, i]).abs() <= 8 * torch.finfo(dtype).eps * size * max(1.0, k) + 1e-37


@pytest.mark.parametrize("k", [0.0, 0.25, -1.0, 4.0])
def test_relu_stable_and_odd_bounds(k: float) -> None:
    """Stable neurons are exact; NaN means unbounded; crossed bounds give finite planes."""
    inf, nan = math.inf, math.nan
    low = torch.tensor([[0.0, 1.0, -2.0, -inf, 3.0, 0.0, -2.0, 1e-9, nan]], device=DEVICE)
    up = torch.tensor([[2.0, 1.0, -1.0, -1.0, inf, 0.0, 0.0, -1e-9, 1.0]], device=DEVICE)
    planes = Relu(k).relax([Interval(low, up)])
    exact = torch.tensor([1.0, 1.0, k, k, 1.0, 1.0, k], device=DEVICE)
    for slope, intercept in (
        (planes.lower_slope, planes.lower_intercept),
        (planes.upper_slope, planes.upper_intercept),
    ):
        assert torch.equal(slope[0, 0, :7], exact)
        assert torch.equal(intercept.expand_as(slope)[0, 0, :7], torch.zeros_like(exact))
        assert torch.isfinite(slope).all()
        assert not intercept.isnan().any()
    side = planes.upper_intercept if k <= 1 else planes.lower_intercept
    assert side.flatten()[8].abs() > 0.7  # one-sided: slope k through (1, 1)
    fixed = planes.d_lower or planes.d_upper
    assert fixed is not None
    assert torch.equal(fixed["alpha"][0][0, 0, :7], torch.zeros_like(exact))


CURVES = [case for case in UNARY if isinstance(case[0], CurveOp | Reciprocal | Relu)]


@pytest.mark.parametrize("case", CURVES, ids=[f"{i}-{c[0].kind}" for i, c in enumerate(CURVES)])
@settings(max_examples=8)
@given(start=st.floats(-4, 4), width=st.floats(0.01, 6))
def test_planes_touch_the_function(case: Case, start: float, width: float) -> None:
    """On ordinary boxes both default planes come close to f somewhere: no plane is needlessly low or constant."""
    op, _, domain = case
    low = abs(start) + 0.05 if domain[0] == 0.0 else -abs(start) - width - 0.05 if domain[1] == 0.0 else start
    if 0.0 not in domain and domain != (-math.inf, math.inf):
        ends = max(domain[0], -8.0), min(domain[1], 8.0)
        low = ends[0] + (ends[1] - ends[0]) * (start + 4) / 10
        width = min(width, ends[1] - low)
    z = torch.linspace(low, low + width, 2001, dtype=torch.float64, device=DEVICE)[:, None]
    box = Interval(z[:1].clone(), z[-1:].clone())
    planes = op.relax([box])
    f = op.forward([z], ())
    scale = f.abs().max() + (f.max() - f.min())
    below = f - (planes.lower_slope.reshape(-1) * z + planes.lower_intercept.reshape(-1))
    above = planes.upper_slope.reshape(-1) * z + planes.upper_intercept.reshape(-1) - f
    assert below.min() <= 2e-3 * scale and above.min() <= 2e-3 * scale
    # Never wider on average than the constant planes.
    assert (below + above).mean() <= (f.max() - f.min()) * 1.001 + 1e-12


@pytest.mark.parametrize("case", [c for c in UNARY if isinstance(c[0], BentOp)], ids=lambda c: c[0].kind)
def test_bent_planes_shrink_with_the_square_of_the_width(case: Case) -> None:
    """Between the planes the gap is of second order, so halving a small box quarters it."""
    op, _, _ = case
    gaps = []
    for width in (0.2, 0.1, 0.05):
        ends = torch.tensor([[[0.3]], [[0.3 + width]]], dtype=torch.float64, device=DEVICE)
        box = Interval(*ends)
        planes = op.relax([box])
        middle = 0.3 + width / 2
        low = planes.lower_slope * middle + planes.lower_intercept
        up = planes.upper_slope * middle + planes.upper_intercept
        gaps.append((up - low).item())
    assert gaps[1] < gaps[0] / 3 and gaps[2] < gaps[1] / 3
