"""Affine ops: the transpose is the VJP of forward, magnitudes and intervals bound what they claim to bound."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.samples import AFFINE, Sample
from tests.support.device import CONV_FLOAT32, DEVICE
from verifier.core.interval import Interval
from verifier.core.numerics import CHARGE_SAFETY, gamma, tiny, widen
from verifier.graph.op import AffineOp

every_sample = pytest.mark.parametrize("sample", AFFINE, ids=[s.name for s in AFFINE])
seeds = st.integers(0, 2**31)


def inputs(sample: Sample, seed: int, n: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn((n, *s), generator=g) * size).to(DEVICE, dtype) for s in sample.in_shapes]


def charged(sample: Sample, dtype: torch.dtype) -> bool:
    """Whether bounds charge this op's rounding in a dtype on the device."""
    return CONV_FLOAT32 or dtype != torch.float32 or affine(sample).plain_sums


def affine(sample: Sample) -> AffineOp:
    assert isinstance(sample.op, AffineOp)
    return sample.op


@every_sample
@settings(max_examples=5)
@given(seed=seeds, n=st.sampled_from([1, 2, 7]))
def test_transpose_is_vjp_of_forward(sample: Sample, seed: int, n: int) -> None:
    op, p = affine(sample), sample.params
    xs = inputs(sample, seed, n)
    y = op.forward(xs, p)
    a = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE)
    expected = torch.func.vjp(lambda *v: op.forward(v, p), *xs)[1](a)
    found = op.transpose(a, p, sample.in_shapes)
    for e, f, x in zip(expected, found, xs, strict=True):
        assert f.shape == x.shape
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    inner = sum((f * x).flatten(1).sum(1) for f, x in zip(found, xs, strict=True))
    bias = op.bias_dot(a, p)
    total = inner + (0 if bias is None else bias)
    torch.testing.assert_close((a * y).flatten(1).sum(1), total, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(op.linear(xs, p), y - op.forward([torch.zeros_like(x) for x in xs], p))


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_rounding_of_forward_is_within_the_charge(sample: Sample, seed: int) -> None:
    """float32 against float64: the difference is at most gamma_terms times the magnitude."""
    if not charged(sample, torch.float32):
        pytest.skip("float32 convolutions are charged on a CPU alone")
    op = affine(sample)
    xs = inputs(sample, seed, 3, torch.float32, 10.0)
    exact = op.forward([x.double() for x in xs], sample.cast(torch.float64))
    found = op.forward(xs, sample.cast(torch.float32)).double()
    terms = op.forward_terms(sample.in_shapes, tuple(exact.shape[1:]))
    sums = op.magnitude([x.abs().double() for x in xs], sample.cast(torch.float64))
    assert sums.shape[1:] == exact.shape[1:]
    if terms == 0:
        assert torch.equal(exact, found)
    assert ((exact - found).abs() <= gamma(terms, torch.float32) * sums * CHARGE_SAFETY + tiny(torch.float32)).all()


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_rounding_of_transpose_is_within_the_charge(sample: Sample, seed: int) -> None:
    if not charged(sample, torch.float32):
        pytest.skip("float32 convolutions are charged on a CPU alone")
    op = affine(sample)
    y = op.forward(inputs(sample, seed, 2), sample.params)
    a = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    exact = op.transpose(a.double(), sample.cast(torch.float64), sample.in_shapes)
    absolute = tuple(p.abs() if p.is_floating_point() else p for p in sample.params)
    size = op.transpose(a.abs().double(), absolute, sample.in_shapes)
    if isinstance(op, AffineOp) and op.kind == "Add":
        size = tuple(3 * s.abs() + a.abs().double().flatten(1).sum(1).max() for s in size)
    terms = op.backward_terms(sample.in_shapes, tuple(y.shape[1:]))
    for e, f, s in zip(exact, op.transpose(a, sample.cast(torch.float32), sample.in_shapes), size, strict=True):
        if terms == 0:
            assert torch.equal(e, f.double())
        assert ((e - f.double()).abs() <= gamma(terms, torch.float32) * s.abs() * 1.001 + tiny(torch.float32)).all()


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_magnitude_bounds_the_sum_of_absolute_terms(sample: Sample, seed: int) -> None:
    """|W| |x| + |b|, found entry by entry from the dense matrix, bounds every partial sum in any order."""
    op, p = affine(sample), sample.params
    xs = [x.abs() for x in inputs(sample, seed, 1)]
    bias = op.forward([torch.zeros_like(x) for x in xs], p)
    expected = bias.abs()
    jac = torch.func.jacrev(lambda *v: op.linear(v, p), argnums=tuple(range(len(xs))))(*xs)
    for j, x in zip(jac, xs, strict=True):
        expected = expected + (j.abs() * x).flatten(bias.dim()).sum(-1)
    assert (op.magnitude(xs, p) >= expected * (1 - 1e-12)).all()
    spread = op.spread(xs, p)
    torch.testing.assert_close(spread, expected - bias.abs(), rtol=1e-10, atol=1e-10)


@every_sample
@settings(max_examples=5)
@given(seed=seeds, size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_interval_contains_corners_and_samples(sample: Sample, seed: int, size: float, dtype: torch.dtype) -> None:
    op, dtype = affine(sample), dtype if charged(sample, dtype) else torch.float64
    centres, radii = inputs(sample, seed, 2, dtype, 3.0), inputs(sample, seed + 1, 2, dtype, size)
    boxes = [Interval(c - r.abs(), c + r.abs()) for c, r in zip(centres, radii, strict=True)]
    p, p64 = sample.cast(dtype), sample.cast(torch.float64)
    found = op.interval(boxes, p)
    sums = op.magnitude([b.magnitude() for b in boxes], p) * CHARGE_SAFETY
    terms = op.forward_terms(sample.in_shapes, tuple(sums.shape[1:]))
    wide = widen(found.lower, found.upper, 4 * gamma(terms + 4, dtype) * sums + tiny(dtype)) if terms else found
    g = torch.Generator().manual_seed(seed)
    for i in range(6):
        share = [torch.rand(b.lower.shape, generator=g, dtype=torch.float64).to(DEVICE) for b in boxes]
        share = [s.round() if i % 2 else s for s in share]
        xs = [torch.lerp(b.lower.double(), b.upper.double(), s) for b, s in zip(boxes, share, strict=True)]
        y = op.forward(xs, p64)
        room = 1e-13 * sums.double()
        assert (y >= wide.lower.double() - room).all() and (y <= wide.upper.double() + room).all()
    # Tight: the extreme corners are reached for every output.
    jac = torch.func.jacrev(lambda *v: op.linear(v, p64), argnums=tuple(range(len(boxes))))(
        *[b.lower[:1].double() for b in boxes]
    )
    up = op.forward([torch.zeros_like(b.lower[:1].double()) for b in boxes], p64)
    for j, b in zip(jac, boxes, strict=True):
        ends = torch.where(j > 0, b.upper[:1].double(), b.lower[:1].double())
        up = up + (j * ends).flatten(up.dim()).sum(-1)
    torch.testing.assert_close(found.upper[:1].double(), up, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-2)


@every_sample
def test_infinite_bounds_give_no_nan(sample: Sample) -> None:
    op = affine(sample)
    boxes = []
    for x in inputs(sample, 0, 1):
        low, up = x - 1, x + 1
        low.flatten(1)[:, 0] = -math.inf
        up.flatten(1)[:, -1] = math.inf
        boxes.append(Interval(low, up))
    found = op.interval(boxes, sample.params)
    assert not found.lower.isnan().any() and not found.upper.isnan().any()
    inside = inputs(sample, 0, 1)
    y = op.forward(inside, sample.params)
    assert (found.lower <= y + 1e-9).all() and (y - 1e-9 <= found.upper).all()


def test_linear_interval_in_rational_arithmetic() -> None:
    """The widened float32 interval of a row contains the exact one."""
    sample = AFFINE[0]
    op, p = affine(sample), sample.cast(torch.float32)
    (x,) = inputs(sample, 3, 1, torch.float32)
    box = Interval(x - 0.1, x + 0.1)
    found = op.interval([box], p)
    sums = op.magnitude([box.magnitude()], p) * CHARGE_SAFETY
    wide = widen(found.lower, found.upper, 4 * gamma(5 + 5, torch.float32) * sums)
    for i in range(4):
        low = Fraction(p[1][i].item())
        for j in range(5):
            w = Fraction(p[0][i, j].item())
            low += w * Fraction((box.lower if w > 0 else box.upper)[0, j].item())
        assert Fraction(wide.lower[0, i].item()) <= low
        assert abs(float(low) - wide.lower[0, i].item()) < 1e-4
