"""Nodes of rare kinds, each on its own, compared with onnxruntime on numbers of all kinds.

Parity compares whole networks at points of the property's box, where a node may happen to meet only harmless values.
Common kinds (affine layers, usual activations, slices, ...) are covered by the tests; every other node is taken out of
its network here, translated as a network of its own and run on random numbers, ties, integers, half-integers and zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from verifier.core.errors import InputError, UnsupportedError, UnsupportedOpError
from verifier.frontend.normalise import model_of, other_outputs, run_once, runs_in_memory, varying_values
from verifier.frontend.onnx_file import OnnxFile
from verifier.frontend.runner import OnnxRunner
from verifier.graph.graph import Graph
from verifier.parallel.single import Resident

if TYPE_CHECKING:
    import onnx

# Operators that the tests compare with onnxruntime; a use of the attributes named here is compared in every network.
COMMON: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        [
            *("Abs", "Add", "BatchNormalization", "Clip", "Constant", "Cos", "Div", "Elu", "Erf", "Exp", "Flatten"),
            *("Floor", "Gather", "Gemm", "Greater", "GreaterOrEqual", "Identity", "LeakyRelu", "Less", "LessOrEqual"),
            *("Log", "LogSoftmax", "MatMul", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Shape"),
            *("Sigmoid", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh"),
            *("Transpose", "Unsqueeze", "Where"),
        ],
        frozenset(),
    ),
    "Reshape": frozenset(["allowzero"]),
    "Conv": frozenset(["auto_pad"]),
    "MaxPool": frozenset(["auto_pad"]),
    "AveragePool": frozenset(["auto_pad", "ceil_mode", "dilations"]),
    "GlobalAveragePool": frozenset(),
    "ReduceSum": frozenset(["noop_with_empty_axes"]),
    "ReduceMean": frozenset(["noop_with_empty_axes"]),
    "Concat": frozenset(),
    "Cast": frozenset(),
    "Pad": frozenset(["mode"]),
}
# Largest error relative to the largest number of the answer, as for whole networks.
TOLERANCE = 1e-4
_NOISE = 64.0  # float32 in another order of operations against our own float32 error
_LARGE = 1 << 20
_OWN = "crosscheck/"  # begins the names of what is put around a node
_OLDEST_OPSET = 7
_KIND = {np.dtype(np.float32): 1, np.dtype(np.float64): 11}  # TensorProto's numbers

Translate = Callable[[OnnxFile], Graph]


def check_nodes(file: OnnxFile, translate: Translate, every: bool = False) -> None:
    """Compare every uncommon node with onnxruntime.

    Args:
        file: normalised, its computed constants folded.
        translate: makes the graph of a model.
        every: other packages took part in the translation: common nodes are compared too, and a network that cannot be
            compared is refused.

    Raises:
        UnsupportedOpError: a node gives other values, or cannot be compared.
    """
    if file.opset < _OLDEST_OPSET or not runs_in_memory(file):
        if every:
            raise UnsupportedOpError(
                f"{file.path}: has ops of other packages, whose nodes are compared with onnxruntime, which needs opset "
                f"{_OLDEST_OPSET} or later and a model of less than 2 GiB"
            )
        return
    varying, read = varying_values(file.model.graph), _read(file)
    nodes = [n for n in file.model.graph.node if varying & read & set(n.output) and (every or uncommon(n))]
    if not nodes:
        return
    for node, values in zip(nodes, _observed(file, nodes), strict=True):
        file.deadline.check("comparing nodes with onnxruntime")
        label = f"{file.path}: {node.op_type} (opset {file.opset}) at '{node.output[0]}'"
        alone = _alone(file, node, values, varying, read)
        if alone is None:
            continue
        try:
            graph = translate(alone)
        except (UnsupportedError, InputError) as error:
            raise UnsupportedOpError(f"{label} cannot be compared with onnxruntime: {error}") from error
        if not _agree(alone, graph):
            raise UnsupportedOpError(
                f"{label} would be computed otherwise than by onnxruntime; this use of it is not supported"
            )


def _read(file: OnnxFile) -> set[str]:
    """Values that the output needs."""
    found = {file.output_name}
    for node in reversed(file.model.graph.node):
        if found & set(node.output):
            found.update(node.input)
    return found


def uncommon(node: onnx.NodeProto) -> bool:
    """Whether a node's translation is not tested for all its attributes."""
    if node.domain or node.op_type not in COMMON:
        return True
    special = {a.name: a for a in node.attribute if a.name in COMMON[node.op_type]}
    usual = {"auto_pad": b"NOTSET", "mode": b"constant"}
    return any(
        a.s != usual[name] if name in usual else a.i != 0 or any(n != 1 for n in a.ints) for name, a in special.items()
    )


def _observed(file: OnnxFile, nodes: Sequence[onnx.NodeProto]) -> Iterator[dict[str, np.ndarray]]:
    """What each node reads when the network runs."""
    import onnx

    stored = {t.name for t in file.model.graph.initializer}
    wanted = list(dict.fromkeys(i for n in nodes for i in n.input if i and i not in stored and i != file.input_name))
    x = np.random.default_rng(0).random(file.input_shape).astype(file.input_dtype)
    found = {file.input_name: x}
    if wanted:
        with other_outputs(file.model.graph, [onnx.ValueInfoProto(name=i) for i in wanted]):
            found.update(zip(wanted, run_once(file, file.model, wanted, {file.input_name: x}), strict=True))
    for node in nodes:
        yield {i: found[i] for i in node.input if i in found}


def _alone(
    file: OnnxFile, node: onnx.NodeProto, values: dict[str, np.ndarray], varying: set[str], read: set[str]
) -> OnnxFile | None:
    """The node as a network: one row of numbers in, its inputs cut out of it, its outputs joined.

    None when it has inputs or outputs that are no real numbers or truth values.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    moving = [i for i in dict.fromkeys(node.input) if i in varying]
    if not moving or any(values[i].dtype not in (np.float32, np.float64, np.bool_) for i in moving):
        return None
    # Conversions to a wider type lose nothing: the network's input has the narrowest type among the node's.
    types = {values[i].dtype for i in moving} - {np.dtype(np.bool_)}
    dtype = np.dtype(np.float64) if types == {np.dtype(np.float64)} else np.dtype(np.float32)
    kind = _KIND[dtype]
    constants = {i: numpy_helper.from_array(v, i) for i, v in values.items() if i not in moving}
    tensors = [t for t in file.model.graph.initializer if t.name in node.input] + list(constants.values())
    nodes, start = [], 0

    def add(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op, list(inputs), [output], name=f"{_OWN}{output}", **attributes))

    def constant(name: str, value: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(value, name))
        return name

    for k, name in enumerate(moving):
        size, shape = values[name].size, values[name].shape
        where = constant(f"{_OWN}where{k}", np.arange(start, start + size, dtype=np.int64))
        start += size
        truth = values[name].dtype == np.bool_
        add("Gather", [_OWN, where], f"{_OWN}cut{k}", axis=1)
        as_shape = constant(f"{_OWN}shape{k}", np.array(shape, dtype=np.int64))
        other = values[name].dtype != dtype
        add("Reshape", [f"{_OWN}cut{k}", as_shape], f"{_OWN}shaped{k}" if other else name)
        if other and not truth:
            add("Cast", [f"{_OWN}shaped{k}"], name, to=_KIND[values[name].dtype])
        if truth:
            add("Greater", [f"{_OWN}shaped{k}", constant(f"{_OWN}zero{k}", np.zeros((), dtype))], name)
    nodes.append(node)
    made = _types(file, node, tensors, {i: values[i] for i in moving})
    parts = []
    wide = TensorProto.DOUBLE if any(v.dtype == np.float64 for i, v in made.items() if i in read) else kind
    for k, (name, found) in enumerate(made.items()):
        if name not in read or not _real(found.dtype) or not found.size:
            continue
        add("Cast", [name], f"{_OWN}number{k}", to=wide)
        add(
            "Reshape",
            [f"{_OWN}number{k}", constant(f"{_OWN}flat{k}", np.array([1, -1], dtype=np.int64))],
            f"{_OWN}part{k}",
        )
        parts.append(f"{_OWN}part{k}")
    if not parts or not start:
        return None
    add("Concat", parts, f"{_OWN}out", axis=1)
    graph = helper.make_graph(
        nodes,
        "alone",
        [helper.make_tensor_value_info(_OWN, kind, [1, start])],
        [onnx.ValueInfoProto(name=f"{_OWN}out")],
        tensors,
    )
    graph.output[0].type.tensor_type.elem_type = wide
    model = model_of(file, graph)
    return OnnxFile(file.path, model, _OWN, f"{_OWN}out", (1, start), dtype, file.opset, "", file.deadline)


def _real(dtype: np.dtype) -> bool:
    """Whether onnxruntime converts numbers of a type to real ones without loss, while they are small."""
    return dtype in (np.float32, np.float64, np.bool_) or dtype.kind in "iu"


def _types(
    file: OnnxFile, node: onnx.NodeProto, tensors: Sequence[onnx.TensorProto], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the node gives for its observed inputs, by the names of its outputs."""
    import onnx
    from onnx import helper

    given = [
        helper.make_tensor_value_info(i, helper.np_dtype_to_tensor_dtype(v.dtype), list(v.shape))
        for i, v in inputs.items()
    ]
    names = [name for name in node.output if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    stored = [t for t in tensors if t.name in node.input]
    graph = helper.make_graph([node], "types", given, outputs, stored)
    return dict(zip(names, run_once(file, model_of(file, graph), names, inputs), strict=True))


def _agree(alone: OnnxFile, graph: Graph) -> bool:
    """Whether the graph gives onnxruntime's values wherever those are finite and the graph itself is steady."""
    run = OnnxRunner(alone)
    store = Resident(torch.device("cpu"), 0)
    for handle, tensor in graph.parameters.items():
        store.put(handle, tensor)
    size, compared, largest = math.prod(alone.input_shape), False, 0.0
    differences: list[tuple[float, float]] = []
    for x in _points(size, 2 if size > _LARGE else 7):
        alone.deadline.check("comparing nodes with onnxruntime")
        given = x.astype(alone.input_dtype)[None]
        right = run(given, False).reshape(-1).astype(np.float64)
        point = torch.from_numpy(given).reshape(1, *graph.input_shape)
        with torch.no_grad():
            single, double = (graph.forward(point.to(t), store) for t in (torch.float32, torch.float64))  # type: ignore[arg-type]
        assert isinstance(single, Tensor) and isinstance(double, Tensor)
        low, high = (t.reshape(-1).double().numpy() for t in (single, double))
        if low.size != right.size:
            return False
        ours = high if alone.input_dtype == np.float64 or graph.rounds else low
        finite = np.isfinite(right)
        size_here = float(np.abs(right[finite]).max(initial=0.0))
        largest, scale = max(largest, size_here), TOLERANCE * size_here
        noise = np.abs(low - high)
        steady = finite & ~(noise > max(TOLERANCE, scale))  # what is not a number counts, and agrees with nothing
        if not steady.any():
            continue
        compared = True
        allowed = scale + _NOISE * float(np.median(noise[steady]))
        differences.append((float(np.abs(ours - right)[steady].max()), allowed))
    # Where all values at a point are tiny beside ordinary ones, both sides may have rounded them away. Large values at
    # another point are no reason: functions that grow fast would hide what they do elsewhere.
    floor = _NOISE * float(np.finfo(np.float32).eps) * min(largest, 1.0)
    return compared and all(difference <= max(allowed, floor) for difference, allowed in differences)


def _points(size: int, count: int) -> Iterator[np.ndarray]:
    """Numbers of ordinary size, positive and large ones, whole and half ones, zeros."""
    rng = np.random.default_rng(1)
    yield rng.normal(size=size)
    yield rng.choice([-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], size)
    if count > 2:
        yield rng.random(size)
        yield 10 * rng.normal(size=size)
        yield np.zeros(size)
        yield np.arange(size, dtype=np.float64) % 7 - 3
        yield rng.normal(size=size) ** 3
