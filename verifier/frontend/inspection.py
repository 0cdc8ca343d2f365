"""What ``verifier inspect`` shows: the nodes of an ONNX file, its size, and what is not supported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verifier.core.errors import InputError, UnsupportedError
from verifier.frontend.lowering import MissingRules


@dataclass(frozen=True)
class NodeInfo:
    """One ONNX node: its op, the name and shape of its first output (None where unknown)."""

    op: str
    name: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Inspection:
    """Summary of a network.

    Attributes:
        parameters: numbers in stored tensors (initialisers and constants).
        nodes: the ONNX nodes in file order.
        kinds: how often each ONNX op occurs.
        graph: how often each op of the verifier occurs after simplification; empty when it is not supported.
        layers: name, op and shape of the verifier's nodes; empty when it is not supported.
        unsupported: one phrase per node or reason; empty when the network can be verified.
    """

    path: str
    opset: int
    producer: str
    input_name: str
    input_shape: tuple[int, ...]
    input_dtype: str
    output_name: str
    output_shape: tuple[int, ...] | None
    parameters: int
    nodes: tuple[NodeInfo, ...]
    kinds: Mapping[str, int]
    graph: Mapping[str, int]
    layers: tuple[NodeInfo, ...]
    unsupported: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Read a network and describe it, whether or not it can be verified.

    Raises:
        InputError: the file is missing or malformed.
        UnsupportedError: more than one input or output, or an input type or shape without a meaning here.
    """
    from verifier.frontend import normalise, onnx_file
    from verifier.frontend.network import translate

    file = normalise.load(path)
    nodes, graph = _nodes(file.model), None
    unsupported: tuple[str, ...] = ()
    try:
        graph, _ = translate(file)
    except MissingRules as error:
        unsupported = error.phrases
    except (InputError, UnsupportedError) as error:
        unsupported = (str(error),)
    layers = () if graph is None else tuple(NodeInfo(n.op.kind, n.name, n.shape) for n in graph.nodes)
    return Inspection(
        path=str(file.path),
        opset=file.opset,
        producer=f"{file.model.producer_name} {file.model.producer_version}".strip(),
        input_name=file.input_name,
        input_shape=file.input_shape,
        input_dtype=str(file.input_dtype),
        output_name=file.output_name,
        output_shape=None if graph is None else graph.output_shape,
        parameters=sum(math.prod(t.dims) for t in onnx_file.tensors(file.model.graph)),
        nodes=nodes,
        kinds=dict(Counter(n.op for n in nodes).most_common()),
        graph=dict(Counter(n.op for n in layers).most_common()),
        layers=layers,
        unsupported=unsupported,
    )


def _nodes(model: Any) -> tuple[NodeInfo, ...]:
    import onnx

    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except Exception:
        typed = model
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in (*typed.graph.value_info, *typed.graph.output, *typed.graph.input):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    names = [next(iter(n.output), n.name) for n in model.graph.node]
    return tuple(NodeInfo(n.op_type, name, shapes.get(name)) for n, name in zip(model.graph.node, names, strict=True))
