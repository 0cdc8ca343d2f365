"""What the passes share: traversing a graph in order while building the new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from verifier.core.handles import Handle
from verifier.frontend.builder import compact
from verifier.graph.graph import Graph, Node
from verifier.graph.op import Op


class Rewriter:
    """The new graph under construction.

    Attributes:
        graph: the old graph.
        nodes: new nodes so far.
        place: new index of every old node visited.
        parameters: all parameters, old ones included; unused ones go with ``drop_unused``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []
        self.place: dict[int, int] = {}
        self.parameters: dict[Handle, Tensor] = dict(graph.parameters)
        self._names = {h.name for h in self.parameters}
        self._origin: dict[int, int] = {}

    def emit(self, op: Op, inputs: Sequence[int], shape: Sequence[int], name: str) -> int:
        self.nodes.append(Node(len(self.nodes), name, op, tuple(inputs), tuple(shape)))
        return len(self.nodes) - 1

    def copy(self, node: Node, inputs: Sequence[int]) -> int:
        self.nodes.append(replace(node, index=len(self.nodes), inputs=tuple(inputs)))
        return len(self.nodes) - 1

    def param(self, tensor: Tensor, name: str) -> Handle:
        """Store a new parameter under a name of its own."""
        unique, k = name, 1
        while unique in self._names:
            k += 1
            unique = f"{name}#{k}"
        self._names.add(unique)
        stored = compact(tensor)
        handle = Handle(unique, tuple(stored.shape), stored.dtype)
        self.parameters[handle] = stored
        return handle

    def value(self, handle: Handle | None, default: float = 0.0) -> Tensor:
        """A parameter in float64 (integers unchanged)."""
        if handle is None:
            return torch.tensor(default, dtype=torch.float64)
        t = self.parameters[handle]
        return t.to(torch.float64) if t.is_floating_point() else t

    def only_reader(self, node: Node, position: int = 0) -> bool:
        """Whether ``node`` (old) is the only one that reads its operand, and the operand is not the output."""
        operand = node.inputs[position]
        return self.graph.consumers[operand] == (node.index,) and operand != self.graph.output


Visit = Callable[[Rewriter, Node, "tuple[int, ...]"], "int | None"]


def rewrite(graph: Graph, visit: Visit) -> Graph:
    """Build a new graph; ``visit`` returns the new index of a node's value, or None to copy the node."""
    r = Rewriter(graph)
    for node in graph.nodes:
        inputs = tuple(r.place[i] for i in node.inputs)
        made = visit(r, node, inputs)
        r.place[node.index] = r.copy(node, inputs) if made is None else made
    return Graph(tuple(r.nodes), r.place[graph.output], r.parameters)
