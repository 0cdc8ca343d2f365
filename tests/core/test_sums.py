"""Very long float32 sums: as exact as short ones, within their rounding_error, without copies of what is summed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.core import sums
from verifier.core.numerics import gamma
from verifier.core.sums import BLOCK
from verifier.core.tracker import ByteTracker

LENGTHS = [BLOCK + 1, 3 * BLOCK, 131_072]
ROUNDING = 2.0**-24


@pytest.mark.parametrize("rows", [1, 4, 33])
@pytest.mark.parametrize("terms", LENGTHS)
def test_error_does_not_grow_with_the_length(terms: int, rows: int) -> None:
    """Sums of positive terms are off by no more than their worst block, however many blocks they have.

    How much a block is off depends on the order in which the machine's kernel adds, so it is measured here.
    """
    g = torch.Generator().manual_seed(terms + rows)
    x, w, b = (torch.rand(s, generator=g) for s in ((rows, terms), (3, terms), (terms,)))
    blocks = [slice(s, min(s + BLOCK, terms)) for s in range(0, terms, BLOCK)]
    exact = x.double() @ w.double().t()
    for found, right in ((sums.product(x, w.t().contiguous()), w.t().contiguous()), (sums.linear(x, w), w.t())):
        assert found.dtype == torch.float32
        worst = max(off(x[:, part] @ right[part], x[:, part].double() @ right[part].double()) for part in blocks)
        assert off(found, exact) <= worst + ROUNDING
    for found, right, most in (
        (sums.dot(x, b), x.double() @ b.double(), 1e-13),
        (sums.last_dim(x, torch.float64), x.double().sum(-1), 1e-13),
        (sums.last_dim(x, torch.float32), x.double().sum(-1), 16 * ROUNDING),
    ):
        assert found.dtype == torch.float64
        assert off(found, right) <= most


def off(found: Tensor, right: Tensor) -> float:
    """The largest relative error."""
    return float((found.double() / right - 1).abs().max())


@pytest.mark.parametrize("terms", LENGTHS)
def test_rounding_stays_within_its_error_bound(terms: int) -> None:
    g = torch.Generator().manual_seed(terms)
    x, w = torch.randn((5, terms), generator=g), torch.randn((3, terms), generator=g)
    size = gamma(terms, torch.float32) * (x.abs().double() @ w.abs().double().t())
    exact = x.double() @ w.double().t()
    for found in (sums.product(x, w.t()), sums.linear(x, w), torch.stack([sums.dot(x, row) for row in w], 1)):
        assert bool(((found.double() - exact).abs() <= size).all())


def test_short_sums_and_float64_are_one_call() -> None:
    g = torch.Generator().manual_seed(0)
    for terms, dtype in ((BLOCK, torch.float32), (BLOCK + 1, torch.float64)):
        x, w = (torch.randn((4, terms), generator=g, dtype=dtype) for _ in range(2))
        bias = torch.randn(4, generator=g, dtype=dtype)
        for found, call in (
            (sums.product(x, w.t()), x @ w.t()),
            (sums.linear(x, w, bias), F.linear(x, w, bias)),
            (sums.dot(x, w[0]), x @ w[0]),
            (sums.last_dim(x, dtype), x.sum(-1)),
        ):
            assert found.dtype == dtype and torch.equal(found, call)


def test_a_share_of_whole_blocks_makes_the_same_calls() -> None:
    """What a rank sums of its share is what one device sums there: the parts differ by the last rounding alone."""
    g = torch.Generator().manual_seed(0)
    a, w = torch.randn((4, 6 * BLOCK), generator=g), torch.randn((6 * BLOCK, 8), generator=g)
    whole = sums.product(a, w)
    cuts = [slice(s, s + 2 * BLOCK) for s in range(0, 6 * BLOCK, 2 * BLOCK)]
    parts = torch.stack([sums.product(a[:, cut], w[cut]) for cut in cuts])
    room = ROUNDING * (parts.abs().sum(0) + whole.abs())
    assert bool(((parts.double().sum(0) - whole.double()).abs() <= room).all())
    dots = torch.stack([sums.dot(a[:, cut], w[cut, 0]) for cut in cuts])
    assert torch.equal(dots.sum(0).float(), sums.dot(a, w[:, 0]).float())


@pytest.mark.parametrize("lead", [(1,), (2, 3)])
def test_gradients_cross_long_sums(lead: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn((*lead, 2 * BLOCK + 1), generator=g, requires_grad=True)
    w = torch.randn((3, 2 * BLOCK + 1), generator=g)
    c = torch.randn((*lead, 3), generator=g)
    (sums.linear(x, w) * c).sum().backward()
    torch.testing.assert_close(x.grad, c @ w)


def test_no_copies_of_what_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operands nothing is copied but a block of a vector, and of the result only a part exists in float64."""
    monkeypatch.setattr(sums, "BLOCK", 128)
    g = torch.Generator().manual_seed(0)
    a, w = torch.randn((8, 2000), generator=g), torch.randn((2000, 700), generator=g)
    part = 8 * 128 * 8
    with ByteTracker() as tracker:
        tracker.add([a, w])
        before = tracker.current
        found = sums.product(a, w)
        assert tracker.peak - before <= found.nbytes + 2 * part < w.nbytes // 100
        for work in (lambda: sums.dot(a, w[:, 0]), lambda: sums.last_dim(a, torch.float64)):
            before = tracker.current
            tracker.reset_peak()
            assert work().dtype == torch.float64
            assert tracker.peak - before <= 2 * part < a.nbytes // 2
    torch.testing.assert_close(found, (a.double() @ w.double()).float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sums.dot(a, w[:, 0]), a.double() @ w[:, 0].double())
    torch.testing.assert_close(sums.last_dim(a, torch.float64), a.double().sum(-1))
