"""ReLU planes multiply both parts of a coefficient instead of choosing a slope: the bits of choosing, and its sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import UnaryPlanes, times_intercept
from verifier.ops.relu import OriginPlanes, Relu

SLOPES = (0.0, 0.01, 0.5, 1.0, -0.3)
TYPES = (torch.float32, torch.float64)


def planes(k: float, dtype: torch.dtype, batch: int = 3, wild: bool = False) -> OriginPlanes:
    """Planes on random intervals of all sizes, stable and unstable, single points among them."""
    seed = torch.Generator().manual_seed(7)
    ends = torch.randn(2, batch, 4, 9, dtype=dtype, generator=seed)
    ends = ends * 10 ** torch.randint(-30, 30, (batch, 4, 9), generator=seed).to(dtype)
    low, up = ends.amin(0), ends.amax(0)
    low[:, 0, 0], up[:, 0, 0] = 0.0, 0.0
    low[:, 0, 1] = up[:, 0, 1]
    if wild:
        low[:, 1, 0], up[:, 1, 1] = -torch.inf, torch.inf
        low[:, 1, 2], up[:, 1, 2] = -torch.inf, torch.inf
    found = Relu(k).relax([Interval(low, up)])
    assert isinstance(found, OriginPlanes)
    return found


def rows(dtype: torch.dtype, batch: int = 3) -> Tensor:
    a = torch.randn(batch, 5, 4, 9, dtype=dtype, generator=torch.Generator().manual_seed(8))
    a[:, 0] = 0.0
    a[:, 1, :2] = -0.0
    return a


def chosen(p: UnaryPlanes, a: Tensor) -> tuple[Tensor, Tensor]:
    """What choosing a plane by the coefficient's sign gives: coefficients, and terms of the constant."""
    slope = torch.where(a > 0, p.lower_slope, p.upper_slope)
    return a * slope, times_intercept(a, torch.where(a > 0, p.lower_intercept, p.upper_intercept))


def by_element(p: OriginPlanes, a: Tensor) -> OriginPlanes:
    """The same planes, given for every row, as windows of a convolution see them."""
    return p.mapped(lambda t: t.expand(a.shape).clone())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", SLOPES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "by row"])
@pytest.mark.parametrize(("batch", "rows_batch"), [(3, 3), (1, 3), (3, 1)])
def test_the_bits_of_choosing(k: float, dtype: torch.dtype, own: bool, batch: int, rows_batch: int) -> None:
    p, a = planes(k, dtype, batch), rows(dtype, rows_batch)
    before = a.clone()
    if own:
        a = before = a.expand(3, *a.shape[1:]).clone()
        p = by_element(p, a)
    (coefficients,), constant = p.backward(a)
    expected, terms = chosen(p, a)
    assert torch.equal(coefficients, expected) and torch.equal(a, before)
    torch.testing.assert_close(constant, terms.flatten(2).sum(-1))
    assert torch.equal(p.terms(a), terms)


@pytest.mark.parametrize(("k", "wild"), [*((k, False) for k in SLOPES), *((k, True) for k in SLOPES if k != 1)])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "by row"])
def test_constants_say_how_large_their_terms_are(k: float, dtype: torch.dtype, own: bool, wild: bool) -> None:
    p, a = planes(k, dtype, wild=wild), rows(dtype)
    if own:
        p = by_element(p, a)
    assert p.one_sign and (p.upper_intercept >= 0).all()
    _, constant = p.backward(a)
    assert (constant <= 0).all()
    magnitude = chosen(p, a)[1].abs().flatten(2).sum(-1)
    torch.testing.assert_close(constant.abs(), magnitude)
    assert torch.isinf(constant).any() == torch.isinf(magnitude).any() == (wild and bool((a[:, :, 1, :3] < 0).any()))


def test_a_coefficient_that_is_no_number_stays_visible() -> None:
    p, a = planes(0.0, torch.float64), rows(torch.float64)
    a[0, 2, 3, 4] = torch.nan
    (coefficients,), constant = p.backward(a)
    assert coefficients[0, 2, 3, 4].isnan() and coefficients.isnan().sum() == 1
    assert constant[0, 2].isnan() and constant.isnan().sum() == 1
