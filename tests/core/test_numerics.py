"""What may close a row: equality for strict rows alone, thresholds that only grow, sums that are known to be exact."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from verifier.core.numerics import combined_strict, grain, proved, rounded_up, sums_exactly

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("lower", "threshold", "plain", "strict"),
    [
        (1.0, 1.0, False, True),
        (np.nextafter(1.0, 2.0), 1.0, True, True),
        (np.nextafter(1.0, 0.0), 1.0, False, False),
        (0.0, -0.0, False, True),
        (5e-324, 0.0, True, True),
        (INF, INF, False, False),
        (INF, 1.0, False, False),
        (-INF, -INF, False, False),
        (NAN, NAN, False, False),
    ],
)
def test_equality_refutes_strict_rows_alone(lower: float, threshold: float, plain: bool, strict: bool) -> None:
    low, limit = torch.tensor([lower] * 2, dtype=torch.float64), torch.tensor([threshold] * 2, dtype=torch.float64)
    assert proved(low, limit).tolist() == [plain, plain]
    assert proved(low, limit, torch.tensor([False, True])).tolist() == [plain, strict]


def test_a_combination_is_strict_when_a_strict_row_has_weight() -> None:
    strict = torch.tensor([True, False])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1e-300, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert combined_strict(weights, strict).tolist() == [True, False, True, False]
    assert not combined_strict(weights, torch.tensor([False, False])).any()


def test_thresholds_are_never_rounded_down() -> None:
    random = np.random.default_rng(0)
    exact = random.standard_normal(2000) * 10.0 ** random.integers(-50, 38, 2000)
    exact[:4] = [0.1, -0.1, 0.5, 3.5e38]
    near = rounded_up(torch.from_numpy(exact), torch.float32)
    assert near.dtype == torch.float32
    assert (near.double().numpy() >= exact).all()
    below = torch.nextafter(near, torch.tensor(-INF))
    assert (below.double().numpy() < exact).all()


def lowest_bit(value: float) -> int:
    """The largest g with value a multiple of 2^g, from the rational number."""
    q = Fraction(value)
    odd = q.numerator & -q.numerator
    return odd.bit_length() - 1 - (q.denominator.bit_length() - 1)


def test_the_grain_divides_every_number_and_no_larger_power_does() -> None:
    random = np.random.default_rng(1)
    values = random.standard_normal((200, 3)) * 2.0 ** random.integers(-300, 300, (200, 3))
    values[:50] = random.standard_normal((50, 3)).astype(np.float32)
    values[50:100] = np.round(values[50:100] % 64) / 8
    values[0] = [5e-324, 1.0, 0.0]
    values[1] = [-0.0, 0.0, 0.0]
    found = grain(torch.from_numpy(values)).tolist()
    for row, g in zip(values, found, strict=True):
        numbers = [lowest_bit(v) for v in row if v]
        assert g == min(numbers) if numbers else g > 1100


def test_sums_called_exact_have_no_rounding_in_any_order() -> None:
    random = np.random.default_rng(2)
    sure = 0
    for _ in range(400):
        bits, n = random.integers(1, 53), random.integers(1, 40)
        values = random.integers(-(2 ** int(bits)), 2 ** int(bits), n) * 2.0 ** random.integers(-900, 900)
        t = torch.from_numpy(values)
        if not bool(sums_exactly(t.abs().sum(), grain(t[None])[0])):
            continue
        sure += 1
        exact = sum(map(Fraction, values.tolist()))
        for order in (t, t.flip(0), t[torch.from_numpy(random.permutation(n))]):
            total = 0.0
            for v in order.tolist():
                total += v
            assert Fraction(total) == exact == Fraction(float(order.sum()))
    assert sure > 100


@pytest.mark.parametrize("values", [[2.0**53, 1.0], [1.0, 2.0**-53], [INF, 1.0], [5e-324, 5e-324]])
def test_sums_that_round_or_may_be_flushed_are_not_called_exact(values: list[float]) -> None:
    t = torch.tensor(values, dtype=torch.float64)
    assert not bool(sums_exactly(t.abs().sum(), grain(t[None])[0]))
