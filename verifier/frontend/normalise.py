"""Normalises an ONNX model before its conversion, so that the converter cannot misread it.

Node names become unique and distinct from value names, omitted outputs disappear or get names, the standard operator
set has one name, default attributes are written out as the float32 values that they are, and constants that the model
computes are computed by onnxruntime, in the types that the model prescribes. None of this changes the function that the
model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.telemetry import warn_if_late
from verifier.frontend.onnx_file import OnnxFile, read

if TYPE_CHECKING:
    import onnx

MAX_CONSTANT_BYTES = 1 << 33
LARGEST_MESSAGE = (1 << 31) - (1 << 24)
STANDARD = ("", "ai.onnx")
# Their results differ from call to call; they are left to be refused.
_RANDOM = ("Random", "Multinomial", "Bernoulli")


def load(path: str | Path, deadline: Deadline | None = None) -> OnnxFile:
    """Read, check and normalise a model; errors as of :func:`onnx_file.read` and :func:`normalise`."""
    found = read(path, deadline)
    normalise(found)
    return found


def normalise(file: OnnxFile) -> None:
    """Names, left-out outputs and operator sets of a model, in place.

    Raises:
        InputError: two versions of the standard operator set.
        UnsupportedError: the input has a name that the converter uses itself.
    """
    model = file.model
    if file.input_name.startswith("onnx_initializer_") or file.input_name.endswith("_split_output"):
        raise UnsupportedError(f"{file.path}: the input cannot be named '{file.input_name}'; rename it")
    versions = {entry.version for entry in model.opset_import if entry.domain in STANDARD}
    if len(versions) > 1:
        raise InputError(f"{file.path}: imports two versions of the standard operator set, {sorted(versions)}")
    for entry in model.opset_import:
        entry.domain = "" if entry.domain in STANDARD else entry.domain
    sort(model.graph)
    tidy(file)


def tidy(file: OnnxFile) -> None:
    """Names, left-out outputs and default attributes of the nodes of a model, in place."""
    graph = file.model.graph
    taken = _names(graph)
    for number, node in enumerate(graph.node):
        node.domain = "" if node.domain in STANDARD else node.domain
        node.name = _fresh(f"node{number}", taken)
        while node.op_type != "Split" and node.output and not node.output[-1]:
            del node.output[-1]
        if not node.domain:
            _state_defaults(node, file.opset)
        for i, name in enumerate(node.output):
            node.output[i] = name or _fresh(f"{node.name}_unused{i}", taken)


def sort(graph: onnx.GraphProto) -> None:
    """Nodes after those that they read, in place; the order stays where it is right. Cycles are left as they are."""
    made = {name for node in graph.node for name in node.output if name}
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    waiting, order = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if all(name in known or name not in made for name in _reads(node)):
                order.append(node)
                known.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            return
        waiting = later
    if any(a is not b for a, b in zip(order, graph.node, strict=True)):
        copies = [_copy(node) for node in order]
        del graph.node[:]
        graph.node.extend(copies)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node and the graphs in its attributes read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (value.name for value in graph.output)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    out = type(node)()
    out.CopyFrom(node)
    return out


def _state_defaults(node: onnx.NodeProto, opset: int) -> None:
    """Write down what a node's missing float attributes are. They are float32, where a converter's default is not."""
    from onnx import AttributeProto, defs

    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        return
    given = {a.name for a in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type == AttributeProto.FLOAT:
            node.attribute.append(attribute.default_value)


def _names(graph: onnx.GraphProto) -> set[str]:
    """Names of all values; names of nodes must be others."""
    out = {t.name for t in graph.initializer} | {v.name for v in (*graph.input, *graph.output)}
    for node in graph.node:
        out.update(node.input, node.output)
    return out


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def dependent_values(graph: onnx.GraphProto) -> set[str]:
    """Values that depend on the graph's input, be it on its shape alone."""
    found = {v.name for v in graph.input}
    for node in graph.node:
        subgraph = any(a.HasField("g") or a.graphs for a in node.attribute)
        if subgraph or found & set(node.input) or node.op_type.startswith(_RANDOM):
            found.update(node.output)
    return found


# Their shapes depend on what they read, or on inputs after the first.
_FLUID = (
    "NonZero",
    "Compress",
    "Unique",
    "NonMaxSuppression",
    "ConstantOfShape",
    "Range",
    "Loop",
    "Scan",
    "If",
    "Sequence",
)
_SHAPED_BY_OTHERS = (
    *("Slice", "Reshape", "Expand", "Tile", "Pad", "Resize", "Upsample", "TopK", "OneHot", "Split", "Squeeze"),
    *("Unsqueeze", "Reduce", "CenterCropPad", "Col2Im", "AffineGrid", "MaxUnpool", "DFT", "STFT"),
)


def varying_values(graph: onnx.GraphProto) -> set[str]:
    """Values that depend on the values of the input, not on its shape alone."""
    varying = {v.name for v in graph.input}
    fluid: set[str] = set()  # shapes too
    for node in graph.node:
        read = varying & set(
            node.input[:1] if node.op_type == "CastLike" else node.input
        )  # of the second only the type
        if node.op_type in ("Shape", "Size"):
            if fluid & set(node.input):
                varying.update(node.output)
            continue
        subgraph = any(a.HasField("g") or a.graphs for a in node.attribute)
        if read or subgraph or node.op_type.startswith(_RANDOM):
            varying.update(node.output)
        reshaped = node.op_type.startswith(_SHAPED_BY_OTHERS) and bool(varying & set(node.input[1:]))
        unknown = bool(node.domain) or node.op_type.startswith(_FLUID)
        if subgraph or reshaped or fluid & set(node.input) or (read and unknown):
            fluid.update(node.output)
    return varying


@contextmanager
def graph_restored(graph: onnx.GraphProto) -> Iterator[None]:
    """Nodes may be changed and stored tensors appended meanwhile; afterwards all is as before."""
    nodes, stored = list(graph.node), len(graph.initializer)
    try:
        yield
    finally:
        del graph.node[:]
        graph.node.extend(nodes)
        del graph.initializer[stored:]


@contextmanager
def constants_folded(file: OnnxFile) -> Iterator[None]:
    """For as long as this lasts the model has computed constants as stored ones; see :func:`fold_constants`."""
    with graph_restored(file.model.graph):
        fold_constants(file)
        yield


def fold_constants(file: OnnxFile) -> None:
    """Store the constants that a model computes, in the types that it says, in place.

    Raises:
        InputError: onnxruntime cannot compute them.
    """
    from onnx import numpy_helper

    graph = file.model.graph
    depends = dependent_values(graph)
    varying = varying_values(graph) if runs_in_memory(file) else depends
    moving, fixed, kept = [], [], []
    for node in graph.node:
        varies = bool(varying & set(node.output))
        (moving if varies else fixed).append(node)
        if varies or node.op_type == "Constant":
            kept.append(node)
    made = {name for node in fixed if node.op_type != "Constant" for name in node.output}
    wanted = list(dict.fromkeys(i for node in moving for i in _reads(node) if i in made))
    if not wanted or file.output_name in made:
        return
    pure = [name for name in wanted if name not in depends]
    shaped = [name for name in wanted if name in depends]
    values = _computed(file, [n for n in fixed if not depends & set(n.output)], pure) if pure else []
    values += _observed(file, shaped) if shaped else []
    wanted = pure + shaped
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in zip(wanted, values, strict=True))


def drop_unread(file: OnnxFile) -> None:
    """Remove the nodes that the output does not need, in place."""
    graph = file.model.graph
    wanted, needed = {file.output_name}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            needed.append(_without_unread_outputs(node, wanted))
            wanted.update(_reads(node))
    if len(needed) < len(graph.node) or any(a is not b for a, b in zip(needed[::-1], graph.node, strict=True)):
        del graph.node[:]
        graph.node.extend(needed[::-1])


# Their first output does not depend on which others there are.
_OPTIONAL_OUTPUTS = ("Dropout", "GRU", "LSTM", "LayerNormalization", "MaxPool", "RNN")


def _without_unread_outputs(node: onnx.NodeProto, wanted: set[str]) -> onnx.NodeProto:
    """The node, or a copy without optional outputs at its end that nobody reads."""
    if node.domain or node.op_type not in _OPTIONAL_OUTPUTS or node.output[-1] in wanted:
        return node
    out = _copy(node)
    while out.output[-1] not in wanted:
        del out.output[-1]
    return out


def _computed(file: OnnxFile, nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> list[Any]:
    """Values of some nodes that need no input, one node after the other: what a node would create is checked first."""
    import onnx
    from onnx import numpy_helper

    stored = {t.name: t for t in file.model.graph.initializer}
    for node in nodes:
        values = [numpy_helper.to_array(stored[i]) if i in stored else None for i in node.input]
        if 8 * _count(node, values) > MAX_CONSTANT_BYTES:
            raise InputError(
                f"{file.path}: '{node.op_type}' would create {_count(node, values)} numbers, more than this tool takes "
                "for a constant"
            )
        used = [stored[i] for i in dict.fromkeys(node.input) if i in stored]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        graph = onnx.helper.make_graph([node], "constant", [], outputs, used)
        found = run_once(file, model_of(file, graph), list(node.output), {})
        for name, value in zip(node.output, found, strict=True):
            if not isinstance(value, np.ndarray):
                raise UnsupportedError(f"{file.path}: '{node.op_type}' gives no tensor")
            stored[name] = numpy_helper.from_array(value, name)
    return [numpy_helper.to_array(stored[name]) for name in names]


def _observed(file: OnnxFile, names: Sequence[str]) -> list[np.ndarray]:
    """Values that follow from the shape of the input: what they are for two inputs.

    Raises:
        UnsupportedError: they differ.
    """
    import onnx

    rng = np.random.default_rng(0)
    inputs = rng.random(file.input_shape), rng.normal(size=file.input_shape)
    feeds = [{file.input_name: x.astype(file.input_dtype)} for x in inputs]
    with other_outputs(file.model.graph, [onnx.ValueInfoProto(name=name) for name in names]):
        first, second = run_all(file, file.model, names, feeds)
    for name, a, b in zip(names, first, second, strict=True):
        if not np.array_equal(a, b, equal_nan=True):
            raise UnsupportedError(f"{file.path}: '{name}' depends on the values of the input through a shape")
    return first


@contextmanager
def other_outputs(graph: onnx.GraphProto, outputs: Sequence[onnx.ValueInfoProto]) -> Iterator[None]:
    """Other outputs for a while."""
    own = list(graph.output)
    try:
        del graph.output[:]
        graph.output.extend(outputs)
        yield
    finally:
        del graph.output[:]
        graph.output.extend(own)


def _count(node: onnx.NodeProto, values: Sequence[np.ndarray | None]) -> int:
    """How many numbers a node creates, for those that can create many from few."""
    first, second = (values[i] if i < len(values) else None for i in (0, 1))
    if first is None:
        return 0
    if node.op_type == "ConstantOfShape":
        return math.prod(int(n) for n in first.reshape(-1))
    if node.op_type == "Range" and len(values) == 3 and values[2] is not None and second is not None:
        step = float(values[2].reshape(-1)[0]) or 1.0
        return int(abs(float(second.reshape(-1)[0]) - float(first.reshape(-1)[0])) / abs(step))
    if second is None:
        return 0
    if node.op_type == "Expand":
        return first.size * math.prod(max(int(n), 1) for n in second.reshape(-1))
    if node.op_type == "Tile":
        return first.size * math.prod(max(int(n), 0) for n in second.reshape(-1))
    if node.op_type == "OneHot":
        return first.size * abs(int(second.reshape(-1)[0]))
    if node.op_type == "Pad":
        return math.prod(n + int(np.abs(second).sum()) for n in first.shape)
    if node.op_type == "MatMul":
        return first.size * second.shape[-1] if first.ndim and second.ndim else 0
    try:
        return math.prod(np.broadcast_shapes(first.shape, second.shape))
    except ValueError:  # not an elementwise operation
        return 0


def runs_in_memory(file: OnnxFile) -> bool:
    """Whether the model can be handed to onnxruntime without a file: protobuf cannot serialise 2 GiB."""
    return sum(len(t.raw_data) for t in file.model.graph.initializer) < LARGEST_MESSAGE


def model_of(file: OnnxFile, graph: onnx.GraphProto) -> onnx.ModelProto:
    """A graph with the versions of a file."""
    import onnx

    versions = list(file.model.opset_import)
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=file.model.ir_version)


def new_session(model: bytes | str, optimised: bool, save: Path | None = None) -> Any:
    """An onnxruntime session of one CPU thread.

    Args:
        model: serialised, or the path of its file.
        optimised: with onnxruntime's graph optimisations.
        save: where to write the graph that will run.
    """
    warn_if_late()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    # Without its fallback, which prints to stdout and tries the same again.
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def run_once(file: OnnxFile, model: onnx.ModelProto, names: Sequence[str], feeds: dict[str, Any]) -> list[Any]:
    """Values of a model without graph optimisations, by onnxruntime."""
    return run_all(file, model, names, [feeds])[0]


def run_all(
    file: OnnxFile, model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[dict[str, Any]]
) -> list[list[Any]]:
    """The same for several inputs."""
    file.deadline.check("computing constants")
    try:
        session = new_session(model.SerializeToString(), optimised=False)
        return [list(session.run(list(names), given)) for given in feeds]
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{file.path}: onnxruntime cannot compute a part of the network: {text}") from error
