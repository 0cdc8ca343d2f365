"""Turns symmetric zero padding before a convolution into the convolution's own padding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from verifier.frontend.passes.rewriter import Rewriter, rewrite
from verifier.graph.graph import Graph, Node
from verifier.ops.conv import Conv
from verifier.ops.shape import Gather


def fold_padding(graph: Graph) -> Graph:
    """Conv(pad(x)) with the same padding on both sides of every spatial dim."""

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        if not isinstance(node.op, Conv) or node.op.transposed:
            return None
        below = r.nodes[inputs[0]]
        if not isinstance(below.op, Gather):
            return None
        source = r.nodes[below.inputs[0]]
        pads = _symmetric_padding(r, below.op, source.shape, below.shape, node.op.dims)
        if pads is None:
            return None
        wider = replace(node.op, padding=tuple(p + q for p, q in zip(node.op.padding, pads, strict=True)))
        return r.emit(wider, [source.index], node.shape, node.name)

    return rewrite(graph, visit)


def _symmetric_padding(
    r: Rewriter, op: Gather, small: tuple[int, ...], large: tuple[int, ...], dims: int
) -> list[int] | None:
    lead = len(small) - dims
    if len(small) != len(large) or small[:lead] != large[:lead]:
        return None
    extra = [b - a for a, b in zip(small[lead:], large[lead:], strict=True)]
    if any(e < 0 or e % 2 for e in extra):
        return None
    pads = [e // 2 for e in extra]
    positions = torch.arange(1, math.prod(small) + 1).reshape(small)
    padded = F.pad(positions, [p for e in reversed(pads) for p in (e, e)]) - 1
    return pads if torch.equal(padded.reshape(-1), r.value(op.index).reshape(-1)) else None
