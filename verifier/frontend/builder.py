"""A graph under construction: nodes, weights (stored once per content), and what could not be translated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from verifier.core.handles import Handle
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import Op, Shape


def compact(t: Tensor) -> Tensor:
    """float64 numbers as float32 when that is exact for all of them; integers unchanged.

    Strides are those of a new tensor: of dims of size 1 any would count as contiguous, but kernels are chosen by them,
    and ranks that receive the numbers alone are to call the same ones.
    """
    if not t.is_floating_point():
        return t.contiguous().flatten().view(t.shape)
    wide = t.to(torch.float64)
    small = wide.to(torch.float32)
    return (small if torch.equal(small.to(torch.float64), wide) else wide).contiguous().flatten().view(t.shape)


@dataclass
class Builder:
    """Collects nodes in topological order; node 0 is the input."""

    nodes: list[Node] = field(default_factory=list)
    parameters: dict[Handle, Tensor] = field(default_factory=dict)
    _by_content: dict[tuple[object, ...], Handle] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)
    _settled: set[int] = field(default_factory=lambda: {0})
    _taken_parameters: set[str] = field(default_factory=set)

    @staticmethod
    def start(input_shape: Shape, name: str) -> Builder:
        out = Builder()
        out.nodes.append(Node(0, name, Input(), (), input_shape))
        out._taken[name] = 0
        return out

    def shape(self, node: int) -> Shape:
        return self.nodes[node].shape

    def emit(self, op: Op, inputs: Sequence[int], shape: Sequence[int], name: str) -> int:
        """Append a node; a name already in use gets a number."""
        unique, k = name, 1
        while unique in self._taken:
            k += 1
            unique = f"{name}#{k}"
        self._taken[unique] = len(self.nodes)
        self.nodes.append(Node(len(self.nodes), unique, op, tuple(inputs), tuple(shape)))
        return len(self.nodes) - 1

    def settle(self, node: int, name: str) -> None:
        """Give a node the name that its value has in the source, unless it has such a name already."""
        if node in self._settled:
            return
        self._settled.add(node)
        old = self.nodes[node].name
        holder = self._taken.get(name, node)
        if holder != node:
            if holder in self._settled:
                return
            self.nodes[holder] = replace(self.nodes[holder], name=old)
            self._taken[old] = holder
        self._taken[name] = node
        self.nodes[node] = replace(self.nodes[node], name=name)

    def param(self, tensor: Tensor, name: str) -> Handle:
        """Store a parameter; equal contents share one handle."""
        stored = compact(tensor.detach())
        digest = hashlib.blake2b(stored.reshape(-1).numpy().view("u1").data, digest_size=16).digest()
        key = (tuple(stored.shape), stored.dtype, digest)
        if key not in self._by_content:
            unique, k = name, 1
            while unique in self._taken_parameters:
                k += 1
                unique = f"{name}#{k}"
            self._taken_parameters.add(unique)
            handle = Handle(unique, tuple(stored.shape), stored.dtype)
            self.parameters[handle] = stored
            self._by_content[key] = handle
        return self._by_content[key]

    def finish(self, output: int) -> Graph:
        return Graph(tuple(self.nodes), output, dict(self.parameters))


def broadcast(*shapes: Sequence[int]) -> Shape:
    """The common shape of operands. By numpy: torch.broadcast_shapes imports sympy, which takes most of a second."""
    return tuple(np.broadcast_shapes(*(tuple(s) for s in shapes)))
