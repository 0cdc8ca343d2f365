"""Affine ops: the transpose is the VJP of forward, magnitudes and intervals bound what they claim to bound."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.samples import AFFINE
from tests.support.device import CONV_FLOAT32
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma, widen
from verifier.testing import Sample, affine
from verifier.testing.samples import inputs

every_sample = pytest.mark.parametrize("sample", AFFINE, ids=[s.name for s in AFFINE])
seeds = st.integers(0, 2**31)


def accounted(sample: Sample, dtype: torch.dtype) -> bool:
    """Whether bounds account for this op's rounding in a dtype on the device."""
    return CONV_FLOAT32 or dtype != torch.float32 or affine.affine(sample).plain_sums


@every_sample
@settings(max_examples=5)
@given(seed=seeds, n=st.sampled_from([1, 2, 7]))
def test_transpose_is_vjp_of_forward(sample: Sample, seed: int, n: int) -> None:
    affine.transpose_is_vjp(sample, seed, n)


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_rounding_of_forward_is_within_its_error_bound(sample: Sample, seed: int) -> None:
    if not accounted(sample, torch.float32):
        pytest.skip("float32 convolutions have error bounds on a CPU alone")
    affine.forward_rounding(sample, seed)


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_rounding_of_transpose_is_within_its_error_bound(sample: Sample, seed: int) -> None:
    if not accounted(sample, torch.float32):
        pytest.skip("float32 convolutions have error bounds on a CPU alone")
    affine.transpose_rounding(sample, seed)


@every_sample
@settings(max_examples=4)
@given(seed=seeds)
def test_magnitude_bounds_the_sum_of_absolute_terms(sample: Sample, seed: int) -> None:
    affine.magnitude_bounds_terms(sample, seed)


@every_sample
@settings(max_examples=5)
@given(seed=seeds, size=st.sampled_from([0.0, 1e-3, 1.0, 1e4]), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_interval_contains_corners_and_samples(sample: Sample, seed: int, size: float, dtype: torch.dtype) -> None:
    affine.interval_contains(sample, seed, size, dtype if accounted(sample, dtype) else torch.float64)


@every_sample
def test_infinite_bounds_give_no_nan(sample: Sample) -> None:
    affine.infinite_bounds_give_no_nan(sample)


def test_linear_interval_in_rational_arithmetic() -> None:
    """The widened float32 interval of a row contains the exact one."""
    sample = AFFINE[0]
    op, p = affine.affine(sample), sample.cast(torch.float32)
    (x,) = inputs(sample, 3, 1, torch.float32)
    box = Interval(x - 0.1, x + 0.1)
    found = op.interval([box], p)
    sums = op.magnitude([box.magnitude()], p) * ROUNDING_SAFETY
    wide = widen(found.lower, found.upper, 4 * gamma(5 + 5, torch.float32) * sums)
    for i in range(4):
        low = Fraction(p[1][i].item())
        for j in range(5):
            w = Fraction(p[0][i, j].item())
            low += w * Fraction((box.lower if w > 0 else box.upper)[0, j].item())
        assert Fraction(wide.lower[0, i].item()) <= low
        assert abs(float(low) - wide.lower[0, i].item()) < 1e-4
