"""What holds for every nonlinear op: forward and backward agree, gradients match autograd, planes enclose the values,
certified bounds of ops with several operands hold in rational arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.samples import NONLINEAR, Sample
from tests.ops.test_unary import chosen
from tests.support.device import DEVICE
from verifier.core.interval import Interval
from verifier.core.numerics import gamma, tiny
from verifier.graph.op import NonlinearOp, Relaxation
from verifier.ops.product import MatMul, Mul

every_sample = pytest.mark.parametrize("sample", NONLINEAR, ids=[s.name for s in NONLINEAR])
several = pytest.mark.parametrize(
    "sample", [s for s in NONLINEAR if isinstance(s.op, Mul | MatMul)], ids=lambda s: s.name
)
seeds = st.integers(0, 2**31)
B, S = 2, 3


def nonlinear(sample: Sample) -> NonlinearOp:
    assert isinstance(sample.op, NonlinearOp)
    return sample.op


def random_boxes(sample: Sample, seed: int, dtype: torch.dtype, width: float = 1.0, b: int = B) -> list[Interval]:
    """Boxes around random centres; some entries are points, some touch zero."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for shape in sample.in_shapes:
        centre = torch.randn((b, *shape), generator=g) * 2
        radius = torch.rand((b, *shape), generator=g) * width
        kind = torch.randint(0, 8, (b, *shape), generator=g)
        low = torch.where(
            kind == 0, centre, torch.where(kind == 1, -radius, torch.where(kind == 2, 0.0, centre - radius))
        )
        up = torch.where(
            kind == 0, centre, torch.where(kind == 1, 0.0, torch.where(kind == 2, radius, centre + radius))
        )
        if 0.0 in sample.domain:
            shift = 0.05 - low.amin()
            low, up = low + shift, up + shift
            if sample.domain[1] == 0.0:
                low, up = -up, -low
        out.append(Interval(low.to(DEVICE, dtype), up.to(DEVICE, dtype)))
    return out


def points(boxes: list[Interval], seed: int, rows: int, corners: bool) -> list[Tensor]:
    """(B, rows, *shape) in the boxes."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for box in boxes:
        shape = (box.lower.shape[0], rows, *box.lower.shape[1:])
        share = torch.rand(shape, generator=g, dtype=box.lower.dtype).to(DEVICE)
        low, up = box.lower[:, None], box.upper[:, None]
        value = torch.where(share > 0.5, up, low) if corners else low + (up - low) * share
        out.append(torch.minimum(torch.maximum(value, low), up))
    return out


def coefficients(op: NonlinearOp, zs: list[Tensor], seed: int) -> Tensor:
    """Random (B, S, *shape) with zeros."""
    y = op.forward([z.flatten(0, 1) for z in zs], ())
    g = torch.Generator().manual_seed(seed)
    a = torch.randn((*zs[0].shape[:2], *y.shape[1:]), generator=g, dtype=y.dtype)
    return (a * (torch.rand(a.shape, generator=g) > 0.2)).to(DEVICE)


def parameters(op: NonlinearOp, boxes: list[Interval], share: float | None) -> Mapping[str, Tensor] | None:
    return None if share is None else {k: chosen(s, share, S) for k, s in op.parameters(boxes).items()}


def linear_value(relaxation: Relaxation, a: Tensor, zs: list[Tensor]) -> Tensor:
    coefs, const = relaxation.backward(a)
    assert all(c.shape == z.shape for c, z in zip(coefs, zs, strict=True))
    assert const.shape == a.shape[:2]
    return sum(((c * z).flatten(2).sum(-1) for c, z in zip(coefs, zs, strict=True)), const)


shares = st.sampled_from([None, 0.0, 1.0]) | st.floats(0, 1)


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=shares, width=st.sampled_from([0.01, 1.0, 4.0]))
def test_forward_agrees_with_backward_and_bounds(sample: Sample, seed: int, share: float | None, width: float) -> None:
    op = nonlinear(sample)
    boxes = random_boxes(sample, seed, torch.float64, width)
    relaxation = op.relax(boxes, parameters(op, boxes, share))
    for corners in (False, True):
        zs = points(boxes, seed + 1, S, corners)
        a = coefficients(op, zs, seed + 2)
        value = linear_value(relaxation, a, zs)
        forward = (a * relaxation.forward(a, zs)).flatten(2).sum(-1)
        torch.testing.assert_close(forward, value, rtol=1e-9, atol=1e-9)
        y = op.forward([z.flatten(0, 1) for z in zs], ()).unflatten(0, (B, S))
        exact = (a * y).flatten(2).sum(-1)
        assert (value <= exact + 1e-9 * (1 + exact.abs())).all()
        assert (relaxation.constant_magnitude(a) >= 0).all()
        image = op.interval(boxes, ())
        assert (image.lower[:, None] <= y + 1e-12).all() and (y - 1e-12 <= image.upper[:, None]).all()


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=st.floats(0.05, 0.95))
def test_gradients_match_autograd(sample: Sample, seed: int, share: float) -> None:
    op = nonlinear(sample)
    boxes = random_boxes(sample, seed, torch.float64, 2.0)
    given_ = parameters(op, boxes, share)
    assert given_ is not None
    params = {k: v.clone().requires_grad_() for k, v in given_.items()}
    zs = points(boxes, seed + 1, S, False)
    a = coefficients(op, zs, seed + 2)
    relaxation = op.relax(boxes, params)
    found = relaxation.gradients(a, zs)
    assert set(found) == set(params)
    if not params:
        return
    total = linear_value(relaxation, a, zs).sum()
    expected = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    for (name, value), grad in zip(params.items(), expected, strict=True):
        want = torch.zeros_like(value) if grad is None else grad
        # At a limit autograd of clamp gives a subgradient of its own; compare inside.
        spec = op.parameters(boxes)[name]
        inside = (value > torch.as_tensor(spec.low)) & (value < torch.as_tensor(spec.high))
        got = found[name].expand(value.shape)
        torch.testing.assert_close(got[inside].detach(), want[inside], rtol=1e-6, atol=1e-7)


@every_sample
@settings(max_examples=4)
@given(seed=seeds, share=shares)
def test_infinite_bounds_never_give_nan(sample: Sample, seed: int, share: float | None) -> None:
    """Rows that ignore an unbounded entry stay finite; rows that use it get a sound plane or minus infinity."""
    op = nonlinear(sample)
    boxes = random_boxes(sample, seed, torch.float64)
    wild = []
    for box in boxes:
        low, up = box.lower.clone(), box.upper.clone()
        low.flatten(1)[:, 0] = -math.inf if sample.domain[0] != 0.0 else low.flatten(1)[:, 0]
        up.flatten(1)[:, -1] = math.inf if sample.domain[1] != 0.0 else up.flatten(1)[:, -1]
        wild.append(Interval(low, up))
    relaxation = op.relax(wild, parameters(op, wild, share))
    zs = points(boxes, seed + 1, S, True)
    a = coefficients(op, zs, seed + 2)
    coefs, const = relaxation.backward(a)
    assert all(torch.isfinite(c).all() for c in coefs)
    assert not const.isnan().any() and not (const == math.inf).any()
    value = linear_value(relaxation, a, zs)
    y = op.forward([z.flatten(0, 1) for z in zs], ()).unflatten(0, (B, S))
    assert (value <= (a * y).flatten(2).sum(-1) + 1e-7 * (1 + value.abs().nan_to_num(0.0, 0.0, 0.0))).all()
    zero = relaxation.backward(torch.zeros_like(a))
    assert (zero[1] == 0).all()
    assert not relaxation.constant_magnitude(a).isnan().any()


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
    """One-hot rows of either sign: exact linear value minus the charge of its coefficients is below the exact value."""
    op = nonlinear(sample)
    boxes = random_boxes(sample, seed, dtype, width, b=1)
    params = None if share is None else {k: chosen(s, share, 1) for k, s in op.parameters(boxes).items()}
    relaxation = op.relax(boxes, params)
    image = op.interval(boxes, ())
    n = image.lower.numel()
    one = torch.eye(n, dtype=dtype, device=DEVICE)
    eye = torch.cat([one, -one]).reshape(1, 2 * n, *image.lower.shape[1:])
    coefs, const = relaxation.backward(eye)
    charge = relaxation.constant_magnitude(eye) * gamma(n + 3, dtype) + 8 * n * tiny(dtype)
    if not isinstance(op, MatMul):
        charge = torch.zeros_like(charge)
    for corners in (False, True, True):
        zs = [z[0, 0] for z in points(boxes, seed + corners, 1, corners)]
        y = exact_forward(op, zs)
        for i, value in enumerate(y):
            assert Fraction(image.lower.flatten()[i].item()) <= value <= Fraction(image.upper.flatten()[i].item())
        for r in range(2 * n):
            exact = y[r] if r < n else -y[r - n]
            bound = Fraction(const[0, r].item()) - Fraction(charge[0, r].item())
            bound += sum((exact_dot(c[0, r], z) for c, z in zip(coefs, zs, strict=True)), Fraction(0))
            assert bound <= exact
