"""Reductions and running sums that are made of several functions: logarithms of sums, products, norms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from verifier.frontend.converters import Attributes, Function, ints, tree
from verifier.testing import Node


def _over(apply: Callable[[Tensor], Tensor]) -> Callable[[Attributes], Function]:
    """A reduction of the last dim, made one over any dims."""

    def rule(a: Attributes) -> Function:
        fixed, keep, noop = a.get("axes"), bool(a.get("keepdims", 1)), a.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
            given = fixed if axes is None else ints(axes)
            if not given and noop:
                return apply(x[..., None])
            dims = sorted(d % x.dim() for d in given) if given else list(range(x.dim()))
            rest = [d for d in range(x.dim()) if d not in dims]
            kept = [x.shape[d] for d in rest]
            if not dims:
                return apply(x[..., None])
            out = apply(x.permute(*rest, *dims).reshape(*kept, math.prod(x.shape[d] for d in dims)))
            return out.reshape([1 if d in dims else n for d, n in enumerate(x.shape)] if keep else kept)

        return run

    return rule


def _log_sum_exp(x: Tensor) -> Tensor:
    """x_0 + log sum_j exp(x_j - x_0): the differences see what the elements have in common."""
    first = x[..., :1]
    return (first + (x - first).exp().sum(-1, keepdim=True).log())[..., 0]


def _product(x: Tensor) -> Tensor:
    return tree(torch.mul, list(x.unbind(-1)))


def _ends(x: Tensor, axis: int, reverse: bool, exclusive: bool, neutral: float) -> list[Tensor]:
    """The slices of a running operation in its order, the first one neutral when each result leaves out its own."""
    slices = list(x.unbind(axis))
    slices = slices[::-1] if reverse else slices
    return [torch.full_like(slices[0], neutral), *slices[:-1]] if exclusive else slices


def _cum_sum(a: Attributes) -> Function:
    exclusive, reverse = a.get("exclusive", 0), a.get("reverse", 0)

    def run(x: Tensor, axis: Tensor) -> Tensor:
        d = int(axis.reshape(())) % x.dim()
        n = x.shape[d]
        ones = torch.ones((n, n), dtype=x.dtype)
        keep = ones.tril(-1 if exclusive else 0) if reverse else ones.triu(1 if exclusive else 0)
        return (x.movedim(d, -1).reshape(-1, n) @ keep).reshape(x.movedim(d, -1).shape).movedim(-1, d)

    return run


def _cum_prod(a: Attributes) -> Function:
    exclusive, reverse = a.get("exclusive", 0), a.get("reverse", 0)

    def run(x: Tensor, axis: Tensor) -> Tensor:
        d = int(axis.reshape(())) % x.dim()
        slices = _ends(x, d, bool(reverse), bool(exclusive), 1.0)
        out = [slices[0]]
        for s in slices[1:]:
            out.append(out[-1] * s)
        return torch.stack(out[::-1] if reverse else out, d)

    return run


_X = (1, 3, 4)
CONVERTERS = {
    "ReduceLogSum": _over(lambda x: x.sum(-1).log()),
    "ReduceLogSumExp": _over(_log_sum_exp),
    "ReduceProd": _over(_product),
    "CumSum": _cum_sum,
    "CumProd": _cum_prod,
}
_AXIS = np.array(1, dtype=np.int64)
NODES = [
    *(
        Node("ReduceLogSum", _X, (np.array(axes),), {"keepdims": k}, 18, (0.1, 2.0))
        for axes, k in (([1], 1), ([0, 2], 0))
    ),
    *(Node("ReduceLogSumExp", _X, (np.array(axes),), {"keepdims": k}, 18) for axes, k in (([1], 1), ([-1, 1], 0))),
    *(Node("ReduceProd", _X, (np.array(axes),), {"keepdims": k}, 18) for axes, k in (([1], 1), ([0, 2], 0))),
    *(Node("CumSum", _X, (_AXIS,), {"exclusive": e, "reverse": r}, 14) for e in (0, 1) for r in (0, 1)),
    *(Node("CumProd", _X, (_AXIS,), {"exclusive": e, "reverse": r}, 26) for e in (0, 1) for r in (0, 1)),
]
