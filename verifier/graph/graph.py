"""The network: an immutable, topologically ordered list of nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from verifier.core.handles import Handle, WeightStore
from verifier.graph import traverse
from verifier.graph.node import Input, Node
from verifier.graph.op import AffineOp, Shape

__all__ = ["Graph", "Input", "Node", "default_dtype", "parameter_bytes"]


@dataclass(frozen=True)
class Graph:
    """A network with one input (node 0) and one output.

    Attributes:
        nodes: topological order.
        output: index of the output node.
        parameters: initial tensors by handle, on the CPU; moved into a weight store before use.
    """

    nodes: tuple[Node, ...]
    output: int
    parameters: Mapping[Handle, Tensor] = field(default_factory=dict, repr=False)

    @property
    def input_shape(self) -> Shape:
        return self.nodes[0].shape

    @property
    def output_shape(self) -> Shape:
        return self.nodes[self.output].shape

    @property
    def whole(self) -> Graph:
        """The network itself, which a rank's part of it knows (``parallel/tp.py``)."""
        return self

    @cached_property
    def multiply_adds(self) -> float:
        """Of one forward pass of one sample, roughly: every weight counts once per position of the output."""
        total = 0.0
        for node in self.nodes:
            total += node.size
            for handle in node.op.handles:
                if len(handle.shape) >= 2:
                    positions = max(1.0, node.size / max(handle.shape[0], 1)) if len(handle.shape) > 2 else 1.0
                    total += math.prod(handle.shape) * positions
        return total

    @cached_property
    def rounds(self) -> bool:
        """Whether the network rounds numbers to float32 on its way, so that only float64 shows what it does."""
        return any(node.op.rounds for node in self.nodes)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For every node the indices of the nodes that read it."""
        return traverse.consumers(self.nodes)

    @cached_property
    def streamable(self) -> tuple[Handle, ...]:
        """Matrices that every op which reads them can use in column blocks."""
        able = dict.fromkeys(h for node in self.nodes for h in node.op.streamable)
        whole = {h for node in self.nodes for h in node.op.handles if h not in node.op.streamable}
        return tuple(h for h in able if h not in whole)

    @cached_property
    def earlier_handles(self) -> tuple[tuple[Handle, ...], ...]:
        """For every node the parameters of the nearest node before it that has some."""
        return traverse.handles_before(self.nodes)

    @cached_property
    def later_handles(self) -> tuple[tuple[Handle, ...], ...]:
        """For every node the parameters of the nearest node after it that has some."""
        return traverse.handles_before(reversed(self.nodes))[::-1]

    @cached_property
    def last_read(self) -> tuple[tuple[int, ...], ...]:
        """For every node the indices of its operands that no later node reads."""
        return traverse.last_read(self.nodes)

    def in_shapes(self, node: Node) -> tuple[Shape, ...]:
        return tuple(self.nodes[i].shape for i in node.inputs)

    def forward(self, x: Tensor, store: WeightStore, keep: Sequence[int] | None = None) -> Tensor | dict[int, Tensor]:
        """Evaluate the network.

        Args:
            x: (N, *input_shape), float32 or float64 (the dtype decides the arithmetic).
            store: where the parameters are.
            keep: node indices whose values are wanted; default only the output.

        Returns:
            (N, *output_shape), or a dict of values by node index when ``keep`` is given.
        """
        values: dict[int, Tensor] = {0: x}
        wanted = set(keep) if keep is not None else {self.output}
        out: dict[int, Tensor] = {0: x} if 0 in wanted else {}
        for node in traverse.forward(self.nodes):
            values[node.index] = _evaluate(self, node, [values[i] for i in node.inputs], store, x.dtype)
            if node.index in wanted:
                out[node.index] = values[node.index]
            for i in self.last_read[node.index]:
                values.pop(i, None)
        return out if keep is not None else out[self.output]

    @staticmethod
    def flat(t: Tensor) -> Tensor:
        """(N, *shape) to (N, n)."""
        return t.reshape(t.shape[0], -1) if t.dim() != 1 else t.reshape(-1, 1)


def _evaluate(graph: Graph, node: Node, xs: list[Tensor], store: WeightStore, dtype: torch.dtype) -> Tensor:
    """One node; autograd keeps no copy of a transient parameter."""
    op = node.op
    transient = store.transient and bool(op.handles)
    if transient and isinstance(op, AffineOp) and torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        return _Refetched.apply(op, store, graph.in_shapes(node), *xs)  # type: ignore[no-any-return]
    with store.fetch(op.handles, dtype) as p:
        if transient:
            store.prefetch(graph.later_handles[node.index])
        return op.forward(xs, p)


class _Refetched(torch.autograd.Function):
    """An affine op whose parameters are fetched once for the value and once more for the gradient."""

    @staticmethod
    def forward(ctx: Any, op: AffineOp, store: WeightStore, shapes: tuple[Shape, ...], *xs: Tensor) -> Tensor:
        ctx.op, ctx.store, ctx.shapes = op, store, shapes
        with store.fetch(op.handles, xs[0].dtype) as p:
            return op.forward(xs, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        with ctx.store.fetch(ctx.op.handles, gradient.dtype) as p:
            return (None, None, None, *ctx.op.transpose(gradient, p, ctx.shapes))


def parameter_bytes(graph: Graph) -> int:
    """Bytes of all parameters as stored."""
    return sum(t.numel() * t.element_size() for t in graph.parameters.values())


def default_dtype() -> torch.dtype:
    """The dtype of the search."""
    return torch.float32
