"""Places of the largest numbers: ArgMax, ArgMin, Hardmax and TopK.

Which element is the largest is told by comparisons of all pairs of a row, 0 or 1 each; the least of those of an element
is 1 for the largest alone. Of equal ones the first counts, or the last one where the operator says so.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from verifier.frontend.converters import Attributes, Function
from verifier.frontend.recorded import as_integers
from verifier.testing import Node

MOST_PAIRS = 1 << 22


def _beats(x: Tensor, last: bool) -> Tensor:
    """(..., n, n) of truth values: whether element i comes before element j in a descending order of the last dim."""
    n = x.shape[-1]
    if x.numel() * n > MOST_PAIRS:
        raise NotImplementedError(f"comparing all pairs of rows of {n} elements")
    one, other = x[..., :, None], x[..., None, :]
    place = torch.arange(n)
    ties = place[:, None] >= place[None, :] if last else place[:, None] <= place[None, :]
    gap = one - other
    return torch.where(ties, gap >= 0, gap > 0)


def largest(x: Tensor, last: bool = False) -> Tensor:
    """1 at the largest element of the last dim, else 0."""
    if x.shape[-1] == 1:
        return (x - x + 1).to(x.dtype)
    return _beats(x, last).to(x.dtype).amin(-1)


def _place(sign: float) -> Callable[[Attributes], Function]:
    def rule(a: Attributes) -> Function:
        axis, keep, last = a.get("axis", 0), bool(a.get("keepdims", 1)), bool(a.get("select_last_index", 0))

        def run(x: Tensor) -> Tensor:
            d = axis % x.dim()
            hot = largest(x.movedim(d, -1) * sign, last)
            places = torch.arange(x.shape[d], dtype=x.dtype)
            out = as_integers((hot * places).sum(-1), torch.int64)
            return out.unsqueeze(d) if keep else out

        return run

    return rule


def _hardmax(a: Attributes) -> Function:
    axis = a.get("axis", -1 if a.version >= 13 else 1)

    def run(x: Tensor) -> Tensor:
        if a.version >= 13:
            return largest(x.movedim(axis, -1)).movedim(-1, axis)
        k = axis % x.dim()
        rows = int(np.prod(x.shape[:k], dtype=np.int64))
        return largest(x.reshape(rows, -1)).reshape(x.shape)

    return run


def _top_k(a: Attributes) -> Function:
    """The k-th of a sorted row is the sum of its elements, each times 1 if k others come before it, else 0."""
    axis, descending, count = a.get("axis", -1), a.get("largest", 1), a.get("k")

    def run(x: Tensor, k: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        d = axis % x.dim()
        rows = x.movedim(d, -1)
        n, wanted = x.shape[d], int(k.reshape(())) if k is not None else int(count)
        before = _beats(rows if descending else -rows, False).to(x.dtype)
        rank = before.sum(-2) - 1  # how many come before each element
        values, places = [], []
        for r in range(wanted):
            # 1 for rank = r: whole numbers leave no more room.
            hot = ((rank >= r - 0.5).to(x.dtype) - (rank >= r + 0.5).to(x.dtype)) if r else (rank < 0.5).to(x.dtype)
            values.append((hot * rows).sum(-1))
            places.append((hot * torch.arange(n, dtype=x.dtype)).sum(-1))
        if a.outputs == 1:
            return torch.stack(values, d)
        indices = as_integers(torch.stack(places, d), torch.int64)
        return torch.stack(values, d), indices

    return run


CONVERTERS = {"ArgMax": _place(1.0), "ArgMin": _place(-1.0), "Hardmax": _hardmax, "TopK": _top_k}
NODES = [
    *(
        Node(op, (1, 3, 4), (), {"axis": axis, "keepdims": k, "select_last_index": last}, 13, out_type=7)
        for op in ("ArgMax", "ArgMin")
        for axis, k, last in ((1, 1, 0), (-1, 0, 1))
    ),
    Node("Hardmax", (1, 3, 4), (), {"axis": 1}, 13),
    Node("Hardmax", (1, 3, 4), (), {"axis": 1}, 11),
    Node("TopK", (1, 5), (np.array([3]),), {"axis": -1}, 11, outputs=2),
    Node("TopK", (1, 5, 2), (np.array([2]),), {"axis": 1, "largest": 0}, 11, outputs=2),
]
