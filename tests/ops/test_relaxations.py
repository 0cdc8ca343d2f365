"""What holds for every nonlinear op: forward and backward agree, gradients match autograd, planes enclose the values,
certified bounds of ops with several operands hold in rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.samples import NONLINEAR
from tests.support.device import DEVICE
from verifier.core.numerics import gamma, tiny
from verifier.graph.op import NonlinearOp
from verifier.ops.product import MatMul, Mul, ProductPlanes
from verifier.testing import Sample, nonlinear
from verifier.testing.samples import parameters, points, random_boxes

every_sample = pytest.mark.parametrize("sample", NONLINEAR, ids=[s.name for s in NONLINEAR])
several = pytest.mark.parametrize(
    "sample", [s for s in NONLINEAR if isinstance(s.op, Mul | MatMul)], ids=lambda s: s.name
)
seeds = st.integers(0, 2**31)


shares = st.sampled_from([None, 0.0, 1.0]) | st.floats(0, 1)


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=shares, width=st.sampled_from([0.01, 1.0, 4.0]))
def test_forward_agrees_with_backward_and_bounds(sample: Sample, seed: int, share: float | None, width: float) -> None:
    nonlinear.planes_enclose_values(sample, seed, share, width)


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=st.floats(0.05, 0.95))
def test_gradients_match_autograd(sample: Sample, seed: int, share: float) -> None:
    nonlinear.gradients_match_autograd(sample, seed, share)


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=shares)
def test_infinite_bounds_never_give_nan(sample: Sample, seed: int, share: float | None) -> None:
    nonlinear.infinite_bounds_never_give_nan(sample, seed, share)


def exact_dot(coef: Tensor, z: Tensor) -> Fraction:
    pairs = zip(coef.flatten().tolist(), z.flatten().tolist(), strict=True)
    return sum((Fraction(c) * Fraction(v) for c, v in pairs), Fraction(0))


def exact_forward(op: NonlinearOp, zs: list[Tensor]) -> list[Fraction]:
    """Flat output in rational arithmetic; zs are (*shape)."""
    if isinstance(op, Mul):
        x, y = torch.broadcast_tensors(*zs)
        return [Fraction(u) * Fraction(v) for u, v in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
    x, y = (z.reshape(-1, *z.shape[-2:]) for z in zs)
    return [
        sum((Fraction(u) * Fraction(v) for u, v in zip(row, col, strict=True)), Fraction(0))
        for left, right in zip(x, y, strict=True)
        for row in left.tolist()
        for col in right.mT.tolist()
    ]


@several
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@settings(max_examples=12)
@given(seed=seeds, share=shares, width=st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
def test_planes_hold_in_rational_arithmetic(
    sample: Sample, dtype: torch.dtype, seed: int, share: float | None, width: float
) -> None:
    """One-hot rows of either sign: linear value less the error of its coefficients is below the exact value."""
    op = nonlinear.nonlinear(sample)
    boxes = random_boxes(sample, seed, dtype, width, b=1)
    params = parameters(op, boxes, share, 1)
    relaxation = op.relax(boxes, params)
    image = op.interval(boxes, ())
    n = image.lower.numel()
    one = torch.eye(n, dtype=dtype, device=DEVICE)
    eye = torch.cat([one, -one]).reshape(1, 2 * n, *image.lower.shape[1:])
    coefs, const = relaxation.backward(eye)
    rounding_error = relaxation.constant_magnitude(eye) * gamma(n + 3, dtype) + 8 * n * tiny(dtype)
    if not isinstance(op, MatMul):
        rounding_error = torch.zeros_like(rounding_error)
    for corners in (False, True, True):
        zs = [z[0, 0] for z in points(boxes, seed + corners, 1, corners)]
        y = exact_forward(op, zs)
        for i, value in enumerate(y):
            assert Fraction(image.lower.flatten()[i].item()) <= value <= Fraction(image.upper.flatten()[i].item())
        for r in range(2 * n):
            exact = y[r] if r < n else -y[r - n]
            bound = Fraction(const[0, r].item()) - Fraction(rounding_error[0, r].item())
            bound += sum((exact_dot(c[0, r], z) for c, z in zip(coefs, zs, strict=True)), Fraction(0))
            assert bound <= exact


@several
@settings(max_examples=12)
@given(seed=seeds, width=st.sampled_from([0.0, 1e-6, 1.0, 1e6]))
def test_a_magnitude_is_at_least_what_is_summed(sample: Sample, seed: int, width: float) -> None:
    """The intercepts of the chosen planes, and their slopes times the operands, in float64."""
    op = nonlinear.nonlinear(sample)
    boxes = random_boxes(sample, seed, torch.float64, width, b=1)
    relaxation = op.relax(boxes)
    shape = op.interval(boxes, ()).lower.shape[1:]
    one = torch.eye(shape.numel(), dtype=torch.float64, device=DEVICE)
    rows = torch.cat([one, -one]).reshape(1, -1, *shape)
    found = relaxation.constant_magnitude(rows)
    _, constant = relaxation.backward(rows)
    assert bool((found >= constant.abs()).all())
    if isinstance(op, Mul):  # one row is one pair: nothing is summed that could cancel
        planes = relaxation
        assert isinstance(planes, ProductPlanes)
        most = torch.zeros_like(found)
        for side, chosen in ((planes.lower, one), (planes.upper, one)):
            slopes = side.x_slope.abs() * planes.x_most + side.y_slope.abs() * planes.y_most
            size = (chosen.reshape(1, -1, *shape) * (slopes + side.intercept.abs())).flatten(2).sum(-1)
            n = shape.numel()
            most[:, :n] = size if side is planes.lower else most[:, :n]
            most[:, n:] = size if side is planes.upper else most[:, n:]
        assert bool((found * (1 + 1e-12) >= most).all())
