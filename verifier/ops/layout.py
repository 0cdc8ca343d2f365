"""Broadcasting and batching helpers shared by the ops. Values are (N, *shape); shapes align from the right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import Shape


def align(x: Tensor, rank: int) -> Tensor:
    """Insert ones after N until the value has ``rank`` dims of its own."""
    missing = rank - (x.ndim - 1)
    return x.reshape(x.shape[0], *[1] * missing, *x.shape[1:]) if missing > 0 else x


def unbroadcast(a: Tensor, shape: Shape) -> Tensor:
    """Transpose of broadcasting: sum (N, *wide) down to (N, *shape)."""
    extra = a.ndim - 1 - len(shape)
    if extra:
        a = a.flatten(1, extra).sum(1)
    dims = tuple(i + 1 for i, s in enumerate(shape) if s == 1 and a.shape[i + 1] != 1)
    return a.sum(dims, keepdim=True) if dims else a


def broadcast_shape(*shapes: Shape) -> Shape:
    """Shape of the broadcast of all; torch.broadcast_shapes would import sympy, which costs most of a second."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(next((d for d in dims if d != 1), 1) for dims in zip(*padded, strict=True))


def reduce_count(shape: Shape, wide: Shape) -> int:
    """How many entries of ``wide`` read one entry of ``shape``."""
    return math.prod(wide) // max(math.prod(shape), 1)


def kept_dim(dim: int, reduced: Sequence[int], shape: Shape, keepdim: bool) -> int | None:
    """Where a dim of a value is after a reduction over other dims; None when it is reduced itself."""
    gone = {d % len(shape) for d in reduced} if shape else {dim}
    if dim in gone:
        return None
    return dim if keepdim else dim - sum(d < dim for d in gone)


def merge_lead(x: Tensor, rank: int) -> Tensor:
    """(N, ..., *last ``rank`` dims) to one batch axis and those dims."""
    return x.reshape(-1, *x.shape[x.ndim - rank :])


def sum_rest(x: Tensor) -> Tensor:
    """(N, ...) to (N,): the sum over all other dims."""
    return x.flatten(1).sum(1) if math.prod(x.shape[1:]) != 1 else x.reshape(-1)


def tuple_of(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """An int repeated, or a sequence of length one or n, as a tuple of n ints."""
    values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return values * n if len(values) == 1 else values


def sane(x: Interval) -> tuple[Tensor, Tensor]:
    """Bounds with NaN replaced by no bound at all."""
    inf = float("inf")
    return x.lower.nan_to_num(-inf, inf, -inf), x.upper.nan_to_num(inf, inf, -inf)
