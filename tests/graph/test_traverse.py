"""The ways through a graph, against what the edges say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from torch import Tensor

from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph import traverse
from verifier.graph.graph import Input, Node
from verifier.graph.op import Op, Params
from verifier.ops.relu import Relu

SEEDS = range(8)


@dataclass(frozen=True)
class Some(Op):
    """An op that is never evaluated."""

    weight: Handle | None = None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        raise NotImplementedError

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        raise NotImplementedError


def graph(seed: int, size: int = 10) -> tuple[Node, ...]:
    """Random nodes, some with the same operand twice, some that nobody reads."""
    random = np.random.default_rng(seed)
    nodes = [Node(0, "x", Input(), (), (2,))]
    for i in range(1, size):
        inputs = tuple(int(k) for k in random.integers(0, i, random.integers(1, 4)))
        op = Relu() if random.random() < 0.3 else Some(Handle(f"w{i}", (1,)) if random.random() < 0.4 else None)
        nodes.append(Node(i, f"n{i}", op, inputs, (2,)))
    return tuple(nodes)


def paths(nodes: tuple[Node, ...], index: int) -> list[tuple[int, ...]]:
    """All ways from a node to the input, an operand that is read twice counting twice."""
    if index == 0:
        return [(0,)]
    return [(index, *rest) for i in nodes[index].inputs for rest in paths(nodes, i)]


def ways(nodes: tuple[Node, ...], start: int, end: int) -> int:
    """How many ways lead from one node back to another."""
    return 1 if start == end else sum(ways(nodes, i, end) for i in nodes[start].inputs if i >= end)


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_and_nonlinear_leave_out_what_they_say(seed: int) -> None:
    nodes = graph(seed)
    assert [n.index for n in traverse.forward(nodes)] == list(range(1, len(nodes)))
    assert [n.index for n in traverse.forward(nodes, 3, 7)] == [4, 5, 6, 7]
    assert [n.index for n in traverse.forward(nodes, 3, 7, {2, 5, 7, 8})] == [5, 7]
    assert list(traverse.forward(nodes, 4, 4)) == []
    bent = [n.index for n in nodes if isinstance(n.op, Relu)]
    assert [n.index for n, _ in traverse.nonlinear(nodes)] == bent
    assert [n.index for n, op in traverse.nonlinear(nodes, 4, 8) if op is n.op] == [i for i in bent if 4 <= i <= 8]
    assert list(traverse.nonlinear(nodes, last=-1)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_backward_sums_over_all_paths(seed: int) -> None:
    """When every node hands on what it got, it got as much as there are ways that lead to it."""
    nodes = graph(seed)
    start = {len(nodes) - 1: 1, len(nodes) - 3: 2}
    pending, order, found = traverse.Backward(nodes, start), [], {}
    for node, value in pending:
        order.append(node.index)
        found[node.index] = value
        for i in node.inputs:
            pending.push(i, value, lambda a, b: a + b)
    found[0] = pending.at_input() or 0
    assert order == sorted(order, reverse=True) and 0 not in order
    counts = {k: sum(n * ways(nodes, i, k) for i, n in start.items()) for k in range(len(nodes))}
    assert found == {k: n for k, n in counts.items() if n}
    assert pending.at_input() is None and list(pending) == []


def test_backward_does_not_change_what_it_starts_from() -> None:
    nodes, start = graph(0), {5: "a", 0: "b"}
    pending = traverse.Backward(nodes, start)
    assert [(n.index, v) for n, v in pending] == [(5, "a")]
    assert pending.at_input() == "b" and start == {5: "a", 0: "b"}


@pytest.mark.parametrize("seed", SEEDS)
def test_upstream_is_what_paths_meet(seed: int) -> None:
    nodes = graph(seed)
    starts = [len(nodes) - 1, 4]
    met = {i for s in starts for way in paths(nodes, s) for i in way}
    assert traverse.upstream(nodes, starts) == met

    def ends(node: Node) -> bool:
        return isinstance(node.op, Relu)

    cut = set()
    for way in (way for s in starts for way in paths(nodes, s)):
        for i in way:
            cut.add(i)
            if ends(nodes[i]):
                break
    assert traverse.upstream(nodes, starts, ends) == cut


@pytest.mark.parametrize("seed", SEEDS)
def test_readers_and_last_reads(seed: int) -> None:
    nodes = graph(seed)
    consumers = traverse.consumers(nodes)
    assert [set(c) for c in consumers] == [{n.index for n in nodes if i in n.inputs} for i in range(len(nodes))]
    assert all(list(c) == sorted(set(c)) for c in consumers)
    for node, gone in zip(nodes, traverse.last_read(nodes), strict=True):
        assert set(gone) == {i for i in node.inputs if max(consumers[i]) == node.index}
        assert len(gone) == len(set(gone))


@pytest.mark.parametrize("seed", SEEDS)
def test_handles_before(seed: int) -> None:
    nodes = graph(seed)
    for i, found in enumerate(traverse.handles_before(nodes)):
        earlier = [n.op.handles for n in nodes[:i] if n.op.handles]
        assert found == (earlier[-1] if earlier else ())
