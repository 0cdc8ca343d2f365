"""If, Loop and Scan whose course is known before the input is: their bodies in place, once per turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from verifier.core.errors import UnsupportedError
from verifier.frontend.functions import MOST_NODES, fresh_mark, rename_graph
from verifier.frontend.normalise import tidy

if TYPE_CHECKING:
    import onnx

    from verifier.frontend.onnx_file import OnnxFile

_SPLIT_AXES = 13  # the opset from which Unsqueeze has its axes as an input


def has_control_flow(graph: onnx.GraphProto) -> bool:
    return any(node.op_type in ("If", "Loop", "Scan") and not node.domain for node in graph.node)


def unroll(file: OnnxFile) -> bool:
    """Replace what can be unrolled, in place; whether something was. Constants must be stored already.

    Raises:
        UnsupportedError: the unrolled model would be too large.
    """
    kinds = {"If": _branch, "Loop": _loop, "Scan": _scan}
    graph = file.model.graph
    work, nodes, changed = _Work(file), [], False
    for node in graph.node:
        rule = None if node.domain else kinds.get(node.op_type)
        made = None if rule is None else rule(work, node)
        changed = changed or made is not None
        nodes += [node] if made is None else made
        if len(nodes) > MOST_NODES:
            raise UnsupportedError(f"{file.path}: has more than {MOST_NODES} nodes with its loops unrolled")
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(work.stored)
        tidy(file)
    return changed


class _Work:
    """What is known of a model: its constants, the shapes of its values; and tensors to be stored."""

    def __init__(self, file: OnnxFile) -> None:
        from onnx import numpy_helper

        from verifier.frontend.onnx2torch_loader import infer_shapes

        self.file, self.opset, self.stored = file, file.opset, []
        self.mark = fresh_mark(file.model.graph)
        graph = file.model.graph
        self.constants: dict[str, Any] = {t.name: t for t in graph.initializer}
        for node in graph.node:
            value = next((a for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
            if value is not None:
                self.constants[node.output[0]] = value.t
        self.to_array = numpy_helper.to_array
        self.from_array = numpy_helper.from_array
        typed = infer_shapes(file.model).graph
        self.shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
            for v in (*typed.input, *typed.value_info)
            if v.type.tensor_type.HasField("shape")
        }
        self.shapes.update({t.name: list(t.dims) for t in graph.initializer})

    def prefix(self, node: onnx.NodeProto) -> str:
        """Of new names."""
        return f"{node.output[0]}{self.mark}"

    def value(self, name: str) -> np.ndarray | None:
        """A constant."""
        return self.to_array(self.constants[name]) if name in self.constants else None

    def store(self, name: str, value: np.ndarray) -> str:
        self.stored.append(self.from_array(value, name))
        return name

    def body(self, graph: onnx.GraphProto, prefix: str, inputs: Sequence[str]) -> tuple[list[Any], list[str]]:
        """The nodes of a body with its inputs bound, and the names of its outputs; stored tensors go to the model."""
        from onnx import GraphProto, helper

        copy = GraphProto()
        copy.CopyFrom(graph)
        del copy.sparse_initializer[:]
        if len(graph.sparse_initializer):
            raise UnsupportedError(f"{self.file.path}: a loop whose body has sparse constants")
        rename_graph(copy, {}, prefix)
        self.stored.extend(copy.initializer)
        bound = [helper.make_node("Identity", [n], [v.name]) for n, v in zip(inputs, copy.input, strict=True)]
        return [*bound, *copy.node], [v.name for v in copy.output]

    def stacked(self, parts: Sequence[str], axis: int, output: str) -> list[Any]:
        """One new dim for the turns."""
        from onnx import helper

        nodes, wide = [], []
        for k, part in enumerate(parts):
            name = f"{output}{self.mark}turn{k}"
            if self.opset >= _SPLIT_AXES:
                axes = self.store(f"{name}/axes", np.array([axis], dtype=np.int64))
                nodes.append(helper.make_node("Unsqueeze", [part, axes], [name]))
            else:
                nodes.append(helper.make_node("Unsqueeze", [part], [name], axes=[axis]))
            wide.append(name)
        return [*nodes, helper.make_node("Concat", wide, [output], axis=axis)]


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)


def _copies(sources: Sequence[str], targets: Sequence[str]) -> list[Any]:
    from onnx import helper

    pairs = zip(sources, targets, strict=False)
    return [helper.make_node("Identity", [source], [target]) for source, target in pairs if target]


def _branch(work: _Work, node: onnx.NodeProto) -> list[Any] | None:
    condition = work.value(node.input[0])
    if condition is None:
        return None
    chosen = _attribute(node, "then_branch" if bool(condition.reshape(())) else "else_branch")
    nodes, outputs = work.body(chosen, f"{work.prefix(node)}", ())
    return nodes + _copies(outputs, node.output)


def _always(body: onnx.GraphProto) -> bool:
    """Whether a loop's body leaves its condition as it is, or sets it to true."""
    from onnx import numpy_helper

    name, start = body.output[0].name, body.input[1].name
    while True:
        if name == start:
            return True
        stored = next((t for t in body.initializer if t.name == name), None)
        maker = next((n for n in body.node if name in n.output), None)
        if stored is None and maker is not None and maker.op_type == "Constant":
            stored = _attribute(maker, "value")
        if stored is not None:
            return bool(numpy_helper.to_array(stored).reshape(()))
        if maker is None or maker.op_type not in ("Identity", "Cast"):
            return False
        name = maker.input[0]


def _loop(work: _Work, node: onnx.NodeProto) -> list[Any] | None:
    """A loop with a constant number of turns."""
    turns = work.value(node.input[0]) if node.input[0] else None
    first = work.value(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array(True)
    body = _attribute(node, "body")
    if turns is None or first is None or not _always(body):
        return None
    count = max(int(turns.reshape(())), 0) if bool(first.reshape(())) else 0
    carried = list(node.input[2:])
    kept = len(carried)
    scans: list[list[str]] = [[] for _ in body.output[1 + kept :]]
    if scans and not count:
        return None
    _check_size(work, count * len(body.node))
    nodes: list[Any] = []
    true = work.store(f"{work.prefix(node)}true", np.array(True))
    for k in range(count):
        number = work.store(f"{work.prefix(node)}turn{k}", np.array(k, dtype=np.int64))
        made, outputs = work.body(body, f"{work.prefix(node)}{k}/", [number, true, *carried])
        nodes += made
        carried = outputs[1 : 1 + kept]
        for scan, name in zip(scans, outputs[1 + kept :], strict=True):
            scan.append(name)
    nodes += _copies(carried, node.output[:kept])
    for scan, output in zip(scans, node.output[kept:], strict=False):
        nodes += work.stacked(scan, 0, output) if output else []
    return nodes


def _scan(work: _Work, node: onnx.NodeProto) -> list[Any] | None:
    """As many turns as the scanned inputs are long."""
    from onnx import helper

    if work.opset < 9:
        return None
    body, scanned = _attribute(node, "body"), int(_attribute(node, "num_scan_inputs"))
    kept = len(node.input) - scanned
    axes = _attribute(node, "scan_input_axes") or [0] * scanned
    backwards = _attribute(node, "scan_input_directions") or [0] * scanned
    shapes = [work.shapes.get(name) for name in node.input[kept:]]
    if any(shape is None or not shape for shape in shapes):
        return None
    places = [axis % len(shape) for axis, shape in zip(axes, shapes, strict=True) if shape is not None]
    counts = {shape[axis] for shape, axis in zip(shapes, places, strict=True) if shape is not None}
    if len(counts) != 1 or min(counts) < 1:
        return None
    (count,) = counts
    _check_size(work, count * len(body.node))
    nodes: list[Any] = []
    carried, scans = list(node.input[:kept]), [[] for _ in body.output[kept:]]
    for k in range(count):
        slices = []
        for i, name in enumerate(node.input[kept:]):
            place = count - 1 - k if backwards[i] else k
            index = work.store(f"{work.prefix(node)}{k}/place{i}", np.array(place, dtype=np.int64))
            slices.append(f"{work.prefix(node)}{k}/slice{i}")
            nodes.append(helper.make_node("Gather", [name, index], [slices[-1]], axis=places[i]))
        made, outputs = work.body(body, f"{work.prefix(node)}{k}/", [*carried, *slices])
        nodes += made
        carried = outputs[:kept]
        for scan, name in zip(scans, outputs[kept:], strict=True):
            scan.append(name)
    nodes += _copies(carried, node.output[:kept])
    ends = _attribute(node, "scan_output_axes") or [0] * len(scans)
    turned = _attribute(node, "scan_output_directions") or [0] * len(scans)
    for scan, axis, back, output in zip(scans, ends, turned, node.output[kept:], strict=False):
        nodes += work.stacked(scan[::-1] if back else scan, axis, output) if output else []
    return nodes


def _check_size(work: _Work, nodes: int) -> None:
    if nodes > MOST_NODES:
        raise UnsupportedError(f"{work.file.path}: has more than {MOST_NODES} nodes with its loops unrolled")
