"""Computes equal subexpressions once and drops nodes that nothing reads."""

from __future__ import annotations

from dataclasses import replace

from verifier.frontend.passes.rewriter import Rewriter, rewrite
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import Op


def share_equal(graph: Graph) -> Graph:
    """Nodes with the same op, parameters and inputs become one (the first, unless the second is the output)."""
    seen: dict[tuple[Op, tuple[int, ...]], int] = {}

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        if isinstance(node.op, Input) or node.index == graph.output:
            return None
        key = (node.op, inputs)
        if key in seen:
            return seen[key]
        seen[key] = r.copy(node, inputs)
        return seen[key]

    return rewrite(graph, visit)


def drop_unused(graph: Graph) -> Graph:
    """Keep the nodes that the output depends on, and their parameters; the input always stays."""
    wanted = {0, graph.output}
    for node in reversed(graph.nodes):
        if node.index in wanted:
            wanted.update(node.inputs)
    place = {old: new for new, old in enumerate(sorted(wanted))}
    nodes = tuple(
        replace(graph.nodes[old], index=new, inputs=tuple(place[i] for i in graph.nodes[old].inputs))
        for old, new in place.items()
    )
    used = {h for node in nodes for h in node.op.handles}
    return Graph(nodes, place[graph.output], {h: t for h, t in graph.parameters.items() if h in used})
