"""The network: an immutable, topologically ordered list of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from verifier.core.handles import Handle, WeightStore
from verifier.graph.op import Interval, Op, Params, Shape


@dataclass(frozen=True)
class Input(Op):
    """The network input; node 0 of every graph."""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        raise TypeError("the input node is not evaluated")

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        raise TypeError("the input node is not evaluated")


@dataclass(frozen=True)
class Node:
    """One op application.

    Attributes:
        index: position in ``Graph.nodes``; inputs have smaller indices.
        name: the ONNX tensor's name or the torch module path the value had in the source network.
        op: what it computes.
        inputs: indices of the operands.
        shape: shape of the value for one sample.
    """

    index: int
    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: Shape

    @property
    def size(self) -> int:
        out = 1
        for s in self.shape:
            out *= s
        return out


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

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For every node the indices of the nodes that read it."""
        out: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for i in dict.fromkeys(node.inputs):
                out[i].append(node.index)
        return tuple(map(tuple, out))

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
        last = self._last_use
        wanted = set(keep) if keep is not None else {self.output}
        out: dict[int, Tensor] = {0: x} if 0 in wanted else {}
        for node in self.nodes[1:]:
            with store.fetch(node.op.handles, x.dtype) as p:
                values[node.index] = node.op.forward([values[i] for i in node.inputs], p)
            if node.index in wanted:
                out[node.index] = values[node.index]
            for i in node.inputs:
                if last[i] == node.index:
                    values.pop(i, None)
        return out if keep is not None else out[self.output]

    @cached_property
    def _last_use(self) -> tuple[int, ...]:
        last = list(range(len(self.nodes)))
        for node in self.nodes:
            for i in node.inputs:
                last[i] = node.index
        return tuple(last)

    @staticmethod
    def flat(t: Tensor) -> Tensor:
        """(N, *shape) to (N, n)."""
        return t.reshape(t.shape[0], -1) if t.dim() != 1 else t.reshape(-1, 1)


def parameter_bytes(graph: Graph) -> int:
    """Bytes of all parameters as stored."""
    return sum(t.numel() * t.element_size() for t in graph.parameters.values())


def default_dtype() -> torch.dtype:
    """The dtype of the search."""
    return torch.float32
