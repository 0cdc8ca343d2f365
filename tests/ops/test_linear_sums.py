"""Linear layers with very many inputs or outputs: their sums are those of ``core/sums.py``, streamed or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from verifier.core.handles import Blocks, Handle
from verifier.core.sums import BLOCK
from verifier.ops.linear import Linear, absolute_product


@dataclass(frozen=True)
class Streamed(Blocks):
    """Column blocks of a matrix, as a store gives them."""

    tensor: Tensor
    width: int

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return (self.tensor.shape[0], self.tensor.shape[1])

    def __iter__(self) -> Iterator[Tensor]:
        yield from (part.contiguous() for part in self.tensor.split(self.width, 1))


def cancelling(terms: int) -> tuple[Tensor, float]:
    """Weights whose sum is only right when ones do not meet the huge ends; and that sum."""
    w = torch.ones(terms)
    w[:BLOCK], w[-BLOCK:] = 0, 0
    w[0], w[-1] = 2.0**40, -(2.0**40)
    return w, float(terms - 2 * BLOCK)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("terms", [4 * BLOCK, 7 * BLOCK])
def test_blocks_do_not_touch_each_other(terms: int, rows: int) -> None:
    w, want = cancelling(terms)
    x, expected, bias = torch.ones(rows, terms), torch.full((rows, 2), want), torch.tensor([1.0, -1.0])
    assert not torch.equal(x @ w, expected[:, 0]), "one call loses nothing: this measures nothing"
    matrix = torch.stack((w, w))
    flat = Linear(Handle("w", (2, terms)), Handle("b", (2,)))
    for weight in (matrix, Streamed(matrix, 1000), Streamed(matrix, BLOCK)):
        p = (weight, bias)
        assert torch.equal(flat.linear([x], p), expected)  # type: ignore[arg-type]
        assert torch.equal(flat.forward([x], p), expected + bias)  # type: ignore[arg-type]
    tall = Linear(Handle("w", (terms, 2)), Handle("b", (terms,)))
    for weight in (matrix.t().contiguous(), Streamed(matrix.t(), 1)):
        (back,) = tall.transpose(x, (weight, w), [(2,)])  # type: ignore[arg-type]
        assert torch.equal(back, expected)
    assert torch.equal(tall.bias_dot(x, (matrix.t(), w)), expected[:, 0].double())  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [1000, BLOCK, 3 * BLOCK])
def test_streamed_columns(width: int) -> None:
    """Sums of positive terms are off by a few roundings, also when streamed blocks and blocks of terms do not meet."""
    g = torch.Generator().manual_seed(width)
    terms = 12 * BLOCK + 5
    op = Linear(Handle("w", (2, terms)), Handle("b", (2,)))
    x, w, b = torch.rand((3, terms), generator=g), -torch.rand((2, terms), generator=g), torch.zeros(2)
    exact = x.double() @ w.double().t()
    p = (Streamed(w, width), b)
    for found in (op.linear([x], p), op.forward([x], p), -op.spread([x], p), -absolute_product(x, w, b)):  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert float((found.double() / exact - 1).abs().max()) <= 40 * 2.0**-24
    tall = Linear(Handle("w", (terms, 9)))
    v = torch.rand((terms, 9), generator=g)
    (back,) = tall.transpose(x, (Streamed(v, 4),), [(9,)])  # type: ignore[arg-type]
    assert float((back.double() / (x.double() @ v.double()) - 1).abs().max()) <= 40 * 2.0**-24
