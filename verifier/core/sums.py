"""Very long float32 sums, of numbers or of products: computed in blocks of terms, with the blocks added in float64.

The error of a float32 sum grows with its length, and differs when a rank sums only its share. In blocks the error is
that of one block, whatever the length. The cut depends on the operands' shapes and dtype alone, so that equal layers
give equal kernel calls in every mode, and a share of whole blocks gives the same calls that the whole sum makes there.

Error bounds stay valid: within a block there are fewer roundings than the sum has terms, the conversion back is one
more, and those of float64 vanish in the safety factor of ``gamma``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Terms of a block, and the longest sum that is left to one kernel call. Columns of a result are made so many at a time,
# which keeps its float64 copy small.
BLOCK = 8192


def is_long(terms: int, dtype: torch.dtype) -> bool:
    """Whether sums of so many products are taken in blocks."""
    return dtype == torch.float32 and terms > BLOCK


def product(a: Tensor, w: Tensor) -> Tensor:
    """a w: (..., k) and (k, m) to (..., m), in the dtype of both."""
    terms, width = w.shape
    if not is_long(terms, a.dtype):
        return a @ w
    out = a.new_empty((*a.shape[:-1], width))
    for columns in _blocks(width):
        out[..., columns] = wide_product(a, w[:, columns])
    return out


def wide_product(a: Tensor, w: Tensor) -> Tensor:
    """a w with the broadcasting of matmul, for few columns: (..., k) and (..., k, m). Long sums are float64."""
    terms = w.shape[-2]
    if not is_long(terms, a.dtype):
        return a @ w
    first, *others = _blocks(terms)
    out = (a[..., first] @ w[..., first, :]).double()
    for part in others:
        out += a[..., part] @ w[..., part, :]
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., k), (m, k) and (m,) to (..., m)."""
    if not is_long(weight.shape[1], x.dtype):
        return F.linear(x, weight, bias)
    y = product(x, weight.t())
    return y if bias is None else y + bias


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a . b: (..., k) and (k,) to (...); long ones in float64, which they stay in, one block converted at a time."""
    if not is_long(b.shape[0], a.dtype):
        return a @ b
    out = a.new_zeros(a.shape[:-1], dtype=torch.float64)
    for part in _blocks(b.shape[0]):
        out += a[..., part].double() @ b[part].double()
    return out


def last_dim(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the last dim: (..., k) to (...). Long ones are float64.

    Args:
        dtype: of the sums of blocks, and of the result unless the sum is long.
    """
    terms = x.shape[-1]
    if dtype == x.dtype and not is_long(terms, dtype):
        return x.sum(-1)
    out = x.new_zeros(x.shape[:-1], dtype=torch.float64)
    for part in _blocks(terms):
        # Block by block, since a CPU converts all of what it sums.
        out += x[..., part].sum(-1, dtype=dtype)
    return out


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, size, BLOCK))
