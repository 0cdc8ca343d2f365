"""Scatter*, GatherElements, Compress, ReverseSequence and Col2Im: places are constants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from verifier.frontend.converters import Attributes, Function, ints, pick
from verifier.ops.shape import inverse_index
from verifier.testing import Node

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda old, new: new,
    "mul": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _written(x: Tensor, places: Tensor, updates: Tensor, how: str) -> Tensor:
    """``x`` with updates written to flat places, or combined with what is there.

    Args:
        places: constant, as many as updates; an element may be written more than once unless ``how`` is ``none``.
    """
    flat, table = updates.reshape(-1), inverse_index(places, x.numel())
    y = x.reshape(-1)
    if how == "add":
        wide = torch.cat([flat, flat.new_zeros(1)])
        index = torch.where(table < 0, len(flat), table)
        return (y + wide.index_select(0, index.reshape(-1)).reshape(index.shape).sum(1)).reshape(x.shape)
    for k in range(table.shape[1]):
        new = flat.index_select(0, table[:, k].clamp(min=0))
        y = torch.where(table[:, k] >= 0, _COMBINE[how](y, new), y)
    return y.reshape(x.shape)


def _reduction(a: Attributes) -> str:
    how = a.get("reduction", "none")
    if how not in (*_COMBINE, "add"):
        raise NotImplementedError(f"{how} as the reduction of a scatter")
    return how


def _scatter_elements(a: Attributes) -> Function:
    axis, how = a.get("axis", 0), _reduction(a)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        every = torch.arange(x.numel()).reshape(x.shape)
        block = every[tuple(slice(n) for d, n in enumerate(indices.shape))] if x.dim() else every
        d = axis % x.dim()
        own = block.index_select(d, torch.zeros(1, dtype=torch.int64)) if indices.shape[d] else block
        step = math.prod(x.shape[d + 1 :])
        places = own + torch.remainder(indices, x.shape[d]) * step
        return _written(x, places, updates, how)

    return run


def _scatter_nd(a: Attributes) -> Function:
    how = _reduction(a)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        k = indices.shape[-1]
        every = torch.arange(x.numel()).reshape(x.shape)
        rows = torch.remainder(indices.reshape(-1, k), torch.tensor(x.shape[:k]))
        return _written(x, every[tuple(rows.unbind(-1))], updates, how)

    return run


def _gather_elements(a: Attributes) -> Function:
    axis = a.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, torch.remainder(indices, x.shape[axis]).to(torch.int64))


def _compress(a: Attributes) -> Function:
    axis = a.get("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        chosen = condition.reshape(-1).nonzero()[:, 0].tolist()
        return pick(x.reshape(-1), 0, chosen) if axis is None else pick(x, axis % x.dim(), chosen)

    return run


def _reverse_sequence(a: Attributes) -> Function:
    time, batch = a.get("time_axis", 0), a.get("batch_axis", 1)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        parts = []
        for k, n in enumerate(ints(lengths)):
            order = [*range(n - 1, -1, -1), *range(n, x.shape[time])]
            parts.append(pick(x.narrow(batch, k, 1), time, order))
        return torch.cat(parts, batch)

    return run


def _col2im(a: Attributes) -> Function:
    """Every number of the image is the sum of those of the blocks that cover it."""

    def run(x: Tensor, image: Tensor, block: Tensor) -> Tensor:
        space, kernel = ints(image), ints(block)
        rank, taps = len(space), math.prod(kernel)
        stride, dilation = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
        pads = a.get("pads", [0] * 2 * rank)
        counts = [
            (space[d] + pads[d] + pads[rank + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in range(rank)
        ]
        places = []
        for tap in itertools.product(*map(range, kernel)):
            for corner in itertools.product(*map(range, counts)):
                at = [c * stride[d] + tap[d] * dilation[d] - pads[d] for d, c in enumerate(corner)]
                inside = all(0 <= p < n for p, n in zip(at, space, strict=True))
                places.append(int(np.ravel_multi_index(at, space)) if inside else -1)
        n, channels = x.shape[0], x.shape[1] // taps
        flat = x.reshape(n * channels, len(places))
        table = inverse_index(torch.tensor(places), math.prod(space))
        wide = torch.cat([flat, flat.new_zeros((len(flat), 1))], 1)
        index = torch.where(table < 0, len(places), table)
        summed = wide.index_select(1, index.reshape(-1)).reshape(len(flat), *index.shape).sum(-1)
        return summed.reshape(n, channels, *space)

    return run


CONVERTERS = {
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "GatherElements": _gather_elements,
    "Compress": _compress,
    "ReverseSequence": _reverse_sequence,
    "Col2Im": _col2im,
}
_UPDATES = np.random.default_rng(5).standard_normal((2, 3)).astype(np.float32)
_PLACES = np.array([[1, -1, 0], [1, 2, 0]])
NODES = [
    Node("Scatter", (3, 4), (np.array([[1, 0, 2], [0, 2, 1]]), _UPDATES), {"axis": 0}, 10),
    Node("ScatterElements", (3, 4), (np.array([[1, 0, 2], [0, -1, 1]]), _UPDATES), {"axis": 0}, 13),
    *(
        Node("ScatterElements", (3, 4), (_PLACES, _UPDATES), {"axis": 1, "reduction": how}, 18)
        for how in ("add", "mul", "max", "min")
    ),
    *(
        Node("ScatterND", (4, 3), (np.array([[1], [-1]]), _UPDATES), {"reduction": how}, 18)
        for how in ("none", "add", "mul", "max", "min")
    ),
    Node("ScatterND", (3, 2, 3), (np.array([[1, 0], [1, 0]]), _UPDATES), {"reduction": "add"}, 18),
    Node("GatherElements", (3, 4), (np.array([[-1, 0, 2, 1]]),), {"axis": 0}, 13),
    Node("Compress", (3, 4), (np.array([True, False, True]),), {"axis": 0}, 11),
    Node("Compress", (3, 4), (np.array([False, True, True]),), {}, 11),
    Node("ReverseSequence", (4, 3), (np.array([4, 2, 1]),), {"time_axis": 0, "batch_axis": 1}, 10),
    Node("Col2Im", (1, 4, 9), (np.array([4, 4]), np.array([2, 2])), {}, 18),
    Node("Col2Im", (1, 8, 4), (np.array([4, 5]), np.array([2, 2])), {"strides": [3, 4], "pads": [0, 1, 1, 0]}, 18),
]
