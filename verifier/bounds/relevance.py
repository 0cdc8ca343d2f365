"""Which elements can influence some rows at all.

A detector's property speaks of a few boxes of a picture, and only a window around them matters: rows of other neurons
would be bounded for nothing. Everything is decided by where ops read, not by the values of weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from verifier.bounds.engine import Engine
from verifier.graph import traverse
from verifier.graph.op import AffineOp, Params


def relevant(engine: Engine, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Elements that rows can depend on.

    Args:
        rows: node index to coefficients (..., *shape).

    Returns:
        node index to bool (*shape); nodes that are missing do not matter. Empty, which means that everything may
        matter, where features are cut over ranks.
    """
    graph, backend = engine.graph, engine.backend
    if backend.summands != 1:
        return {}
    start = {i: (a.reshape(-1, *graph.nodes[i].shape) != 0).any(0) for i, a in rows.items()}
    pending, found = traverse.Backward(graph.nodes, start), {}
    for node, mask in pending:
        found[node.index] = mask
        shapes = graph.in_shapes(node)
        parts = [torch.ones(shape, dtype=torch.bool, device=mask.device) for shape in shapes]
        if not isinstance(node.op, AffineOp):
            parts = [mask if shape == node.shape else part for shape, part in zip(shapes, parts, strict=True)]
        elif not node.op.reads_all(mask):
            with backend.weights.fetch(node.op.handles, torch.float32) as p:
                back = node.op.transpose(mask[None].float(), _ones(p), shapes)
            parts = [part[0] != 0 for part in back]
        for i, part in zip(node.inputs, parts, strict=True):
            pending.push(i, part, torch.logical_or)
    at_input = pending.at_input()
    return found if at_input is None else {**found, 0: at_input}


def _ones(p: Params) -> Params:
    """Weights that let everything through; integers are places."""
    return tuple(torch.ones_like(t) if t.is_floating_point() else t for t in p)
