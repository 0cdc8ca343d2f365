"""Which tensors of an ONNX file the nodes of a graph are."""

from __future__ import annotations

from typing import Any, Protocol

from verifier.core.errors import UnsupportedError
from verifier.graph import traverse
from verifier.graph.graph import Graph


class OnnxNode(Protocol):
    """What is looked at of a node of an ONNX file."""

    op_type: str
    input: Any
    output: Any


def tensors(graph: Graph, nodes: list[OnnxNode], path: str) -> dict[int, str]:
    """For every node that a ReLU reads the ONNX tensor that the ONNX ReLU reads.

    Raises:
        UnsupportedError: the network has a nonlinearity that proof files have no form for.
    """
    made = {output: node for node in nodes for output in node.output}
    out: dict[int, str] = {}
    for node, op in traverse.nonlinear(graph.nodes):
        if op.kind != "Relu":
            raise UnsupportedError(f"{path}: a proof file has no form for {op.kind} (at '{node.name}')")
        source = made.get(node.name)
        index = node.inputs[0]
        if source is not None and source.op_type == "Relu":
            out.setdefault(index, source.input[0])
        elif graph.nodes[index].name in made:
            out.setdefault(index, graph.nodes[index].name)
        else:
            raise UnsupportedError(f"{path}: what '{node.name}' reads is no tensor of the file")
    return out
