"""Merges chains of ops that only move data."""

from __future__ import annotations

import math

import torch

from verifier.frontend.lower_shape import gather_op
from verifier.frontend.passes.rewriter import Rewriter, rewrite
from verifier.graph.graph import Graph, Node
from verifier.ops.shape import Gather, Permute, Reshape


def compose_moves(graph: Graph) -> Graph:
    """Reshape of Reshape, Gather of Reshape, Reshape of Gather, Gather of Gather, Permute of Permute; no-ops go."""

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        if not isinstance(node.op, Reshape | Gather | Permute):
            return None
        below = r.nodes[inputs[0]]
        is_output = node.index == graph.output
        if isinstance(node.op, Reshape):
            return _reshape(r, node, below, is_output)
        if isinstance(node.op, Permute):
            if not isinstance(below.op, Permute):
                return None
            dims = tuple(below.op.dims[d] for d in node.op.dims)
            if dims == tuple(range(len(dims))) and not is_output:
                return below.inputs[0]
            return r.emit(Permute(dims), below.inputs, node.shape, node.name)
        return _gather(r, node, node.op, below)

    return rewrite(graph, visit)


def _reshape(r: Rewriter, node: Node, below: Node, is_output: bool) -> int | None:
    while isinstance(below.op, Reshape):
        below = r.nodes[below.inputs[0]]
    if below.shape == node.shape and not is_output:
        return below.index
    if isinstance(below.op, Gather) and r.only_reader(node):
        return r.emit(Gather(below.op.index, node.shape, below.op.inverse), below.inputs, node.shape, node.name)
    return r.emit(Reshape(node.shape), [below.index], node.shape, node.name)


def _gather(r: Rewriter, node: Node, op: Gather, below: Node) -> int | None:
    index = r.value(op.index).reshape(-1)
    changed = False
    while isinstance(below.op, Reshape | Gather):
        if isinstance(below.op, Gather):
            inner = torch.cat([r.value(below.op.index).reshape(-1), torch.tensor([-1])])
            index = inner[index]
        below = r.nodes[below.inputs[0]]
        changed = True
    if not changed:
        return None
    size = math.prod(below.shape)
    if index.numel() == size and torch.equal(index, torch.arange(size)):
        return r.emit(Reshape(node.shape), [below.index], node.shape, node.name)
    return r.emit(gather_op(r, index, node.shape, size, node.name), [below.index], node.shape, node.name)
