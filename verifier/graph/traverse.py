"""The ways through a graph: forward, backward with sums where branches meet, upstream, and who reads what.

What is done at a node is the caller's business; in which order nodes come, and which are left out, is decided here.
``nodes`` are always those of a graph, in topological order: node 0 is the input, and operands have smaller indices.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from verifier.core.handles import Handle
from verifier.graph.node import Node
from verifier.graph.op import NonlinearOp

T = TypeVar("T")


def forward(
    nodes: Sequence[Node], after: int = 0, last: int | None = None, among: Container[int] | None = None
) -> Iterator[Node]:
    """Nodes with after < index <= last in order.

    Args:
        last: default the last node.
        among: indices; others are left out. None: all.
    """
    for node in nodes[after + 1 : None if last is None else last + 1]:
        if among is None or node.index in among:
            yield node


def nonlinear(nodes: Sequence[Node], first: int = 0, last: int | None = None) -> Iterator[tuple[Node, NonlinearOp]]:
    """Nodes with first <= index <= last and a nonlinear op, in order, with that op."""
    for node in nodes[first : None if last is None else last + 1]:
        if isinstance(node.op, NonlinearOp):
            yield node, node.op


class Backward(Generic[T]):
    """Values on their way back from nodes to their operands; where branches meet they are summed.

    Iterating gives every node but the input that has a value, the last one first, and takes the value out. Meanwhile
    the caller pushes to earlier nodes what comes out of it.

    Args:
        start: values by node index.
    """

    def __init__(self, nodes: Sequence[Node], start: Mapping[int, T]) -> None:
        self._nodes = nodes
        self._pending = dict(start)

    def __iter__(self) -> Iterator[tuple[Node, T]]:
        for index in range(max(self._pending, default=0), 0, -1):
            if index in self._pending:
                yield self._nodes[index], self._pending.pop(index)

    def push(self, index: int, value: T, plus: Callable[[T, T], T]) -> None:
        """Hand a value to a node; ``plus`` adds it to what the node has already."""
        pending = self._pending
        pending[index] = plus(pending[index], value) if index in pending else value

    def at_input(self) -> T | None:
        """Take out what has arrived at the input; None: nothing has."""
        return self._pending.pop(0, None)


def upstream(nodes: Sequence[Node], starts: Iterable[int], ends: Callable[[Node], bool] | None = None) -> set[int]:
    """Indices of all nodes that some depend on, those themselves included.

    Args:
        ends: nodes beyond which nobody looks; they are included.
    """
    stack = list(starts)
    seen = set(stack)
    while stack:
        node = nodes[stack.pop()]
        if ends is not None and ends(node):
            continue
        for i in node.inputs:
            if i not in seen:
                seen.add(i)
                stack.append(i)
    return seen


def consumers(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    """For every node the indices of the nodes that read it."""
    out: list[list[int]] = [[] for _ in nodes]
    for node in nodes:
        for i in dict.fromkeys(node.inputs):
            out[i].append(node.index)
    return tuple(map(tuple, out))


def last_read(nodes: Sequence[Node]) -> tuple[tuple[int, ...], ...]:
    """For every node the indices of its operands that no later node reads."""
    last = list(range(len(nodes)))
    for node in nodes:
        for i in node.inputs:
            last[i] = node.index
    return tuple(tuple(i for i in dict.fromkeys(node.inputs) if last[i] == node.index) for node in nodes)


def handles_before(nodes: Iterable[Node]) -> tuple[tuple[Handle, ...], ...]:
    """For every node the parameters of the nearest one before it that has some; nodes in whichever order they come."""
    out: list[tuple[Handle, ...]] = []
    last: tuple[Handle, ...] = ()
    for node in nodes:
        out.append(last)
        last = node.op.handles or last
    return tuple(out)
