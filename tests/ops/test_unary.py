"""Unary ops: interval images and planes hold in exact arithmetic, for every box, parameter value and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor

from tests.ops.exact import UNARY, Exact, boxes, plane_at, points
from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, ParamSpec, UnaryPlanes

NAMES = [f"{i}-{op.kind}" for i, (op, _, _) in enumerate(UNARY)]
every_op = pytest.mark.parametrize("case", UNARY, ids=NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
Case = tuple[NonlinearOp, Exact, tuple[float, float]]


def chosen(spec: ParamSpec, share: float, rows: int) -> Tensor:
    """A parameter between its limits; share 0 and 1 are the limits."""
    low = torch.as_tensor(spec.low, dtype=spec.initial.dtype).expand_as(spec.initial)
    high = torch.as_tensor(spec.high, dtype=spec.initial.dtype).expand_as(spec.initial)
    return (low + (high - low) * share).clamp(low, high).repeat(1, rows, *[1] * (spec.initial.dim() - 2))


def assert_planes(planes: UnaryPlanes, exact: Exact, box: Interval, fractions: list[float]) -> None:
    shape = torch.broadcast_shapes(*(t.shape for t in (planes.lower_slope, planes.upper_slope)), (1, 1, 1))
    parts = [
        t.expand(shape)[0, 0].tolist()
        for t in (planes.lower_slope, planes.lower_intercept, planes.upper_slope, planes.upper_intercept)
    ]
    for i, zs in enumerate(points(box, fractions)):
        ls, li, us, ui = (p[i] for p in parts)
        assert not any(map(math.isnan, (ls, li, us, ui)))
        assert math.isfinite(ls) and math.isfinite(us)
        for z in zs:
            value = exact(mpf(z))
            assert li == -math.inf or plane_at(ls, li, z) <= value, (box.lower[0, i], box.upper[0, i], z, ls, li)
            assert ui == math.inf or plane_at(us, ui, z) >= value, (box.lower[0, i], box.upper[0, i], z, us, ui)


@every_op
@every_dtype
@settings(max_examples=10)
@given(data=st.data())
def test_interval_contains_exact_values(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    op, exact, domain = case
    box = data.draw(boxes(domain, dtype))
    image = op.interval([box], ())
    for i, zs in enumerate(points(box, [0.25, 0.5, 0.9])):
        low, up = image.lower[0, i].item(), image.upper[0, i].item()
        assert not math.isnan(low) and not math.isnan(up)
        for z in zs:
            assert low <= exact(mpf(z)) <= up, (box.lower[0, i], box.upper[0, i], z)


@every_op
@every_dtype
@settings(max_examples=16)
@given(data=st.data())
def test_planes_hold_exactly(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    op, exact, domain = case
    box = data.draw(boxes(domain, dtype))
    share = data.draw(st.sampled_from([None, 0.0, 0.3, 1.0]) | st.floats(0, 1))
    specs = op.parameters([box])
    params = None if share is None else {k: chosen(s, share, 1) for k, s in specs.items()}
    planes = op.relax([box], params)
    assert isinstance(planes, UnaryPlanes)
    assert_planes(planes, exact, box, [0.01, 0.2, 0.5, 0.77, 0.99])
