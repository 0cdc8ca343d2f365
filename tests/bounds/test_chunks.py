"""The geometry of row chunks, and that it does not change what is computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds.nets import make
from verifier.bounds.alpha import Schedule, alpha_hidden
from verifier.bounds.crown import BoundState, crown_hidden
from verifier.core.backend import CHUNK_MULTIPLE, SHARD_ROWS, Cost, canonical_chunks

fewest_ones = st.sampled_from([1, 8])
costs = st.builds(Cost, st.integers(1, 1 << 20), st.sampled_from([0.0, 1e3, 1e6, 1e9]))
budgets = st.builds(Cost, st.integers(1, 1 << 33), st.sampled_from([1.0, 1e7, 1e9, 1e12, math.inf]))


def fits(size: int, row: Cost, budget: Cost) -> bool:
    return size <= 4 or (size * row.nbytes <= budget.nbytes and size * row.flops <= budget.flops)


@given(st.integers(-3, 5000), costs, budgets, fewest_ones)
def test_geometry(rows: int, row: Cost, budget: Cost, fewest: int) -> None:
    chunks = canonical_chunks(rows, row, budget, fewest)
    assert [i for c in chunks for i in range(c.start, c.stop)] == list(range(max(rows, 0)))
    assert len({c.size for c in chunks}) <= 1
    for c in chunks:
        assert 0 <= c.stop - c.start <= c.size
        assert fits(c.size, row, budget)
    # Padding comes last.
    full = [c.stop - c.start == c.size for c in chunks]
    assert full == sorted(full, reverse=True)
    assert chunks == canonical_chunks(rows, row, budget, fewest)


@given(st.integers(1, SHARD_ROWS - 1), costs, budgets)
def test_few_rows_have_no_empty_chunk(rows: int, row: Cost, budget: Cost) -> None:
    for c in canonical_chunks(rows, row, budget):
        assert c.size % 4 == 0 and c.stop > c.start


@given(st.integers(SHARD_ROWS, 20_000), costs, budgets, fewest_ones)
def test_many_rows_are_dealt_evenly(rows: int, row: Cost, budget: Cost, fewest: int) -> None:
    chunks = canonical_chunks(rows, row, budget, fewest)
    assert len(chunks) % CHUNK_MULTIPLE == 0 or len(chunks) in (1, 2, 4, 8)
    if fits(84, row, budget):  # tiny budgets make tiny chunks
        assert sum(c.size for c in chunks) <= 1.05 * rows + CHUNK_MULTIPLE


@given(st.integers(SHARD_ROWS, 20_000), costs, budgets, fewest_ones)
def test_many_rows_are_cut_no_finer_than_the_budget_asks_for(rows: int, row: Cost, budget: Cost, fewest: int) -> None:
    count = len(canonical_chunks(rows, row, budget, fewest))
    most = max(4, budget.nbytes // row.nbytes // 4 * 4)
    if row.flops * most > budget.flops:
        most = max(4, int(budget.flops / row.flops) // 4 * 4)
    wanted = max(-(-rows // most), fewest)
    assert wanted <= count
    assert count < wanted + CHUNK_MULTIPLE if wanted > 8 else count < 2 * wanted


def test_what_is_kept_per_row_is_dealt_to_eight_ranks() -> None:
    """Slopes of 480 rows of a small network: one chunk is best for speed, and one rank would have to hold them all."""
    assert len(canonical_chunks(SHARD_ROWS, Cost(1024), Cost(256 << 20))) == 1
    assert len(canonical_chunks(SHARD_ROWS, Cost(1024), Cost(256 << 20), fewest=8)) == 8


def test_more_work_makes_more_chunks() -> None:
    """Much work on few bytes: the clock is looked at between chunks, and ranks share them."""
    quick, slow = (canonical_chunks(1000, Cost(1024, flops), Cost(8 << 30, 1e12)) for flops in (1e8, 5e9))
    assert (len(quick), len(slow)) == (1, 8)


def bounds(name: str, chunk_bytes: int, alpha: bool) -> BoundState:
    case = make(name, 3, batch=1 if alpha else 2, chunk_bytes=chunk_bytes)
    state = crown_hidden(case.engine, case.state())
    if alpha:
        state = alpha_hidden(case.engine, state, Schedule(2))
    return state


@pytest.mark.parametrize("alpha", [False, True], ids=["crown", "alpha"])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "shared", "smooth"])
def test_chunks_change_nothing_but_rounding(name: str, alpha: bool) -> None:
    whole, cut = bounds(name, 1 << 30, alpha), bounds(name, 1, alpha)
    for i, b in whole.bounds.items():
        torch.testing.assert_close(cut.bounds[i].lower, b.lower, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cut.bounds[i].upper, b.upper, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [False, True], ids=["crown", "alpha"])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 17, 1 << 30])
def test_same_chunks_same_bits(chunk_bytes: int, alpha: bool) -> None:
    for name in ("mlp", "concat", "smooth") if alpha else ("mlp", "residual", "concat", "smooth"):
        first, second = bounds(name, chunk_bytes, alpha), bounds(name, chunk_bytes, alpha)
        for i, b in first.bounds.items():
            assert torch.equal(b.lower, second.bounds[i].lower)
            assert torch.equal(b.upper, second.bounds[i].upper)
