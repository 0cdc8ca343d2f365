"""ONNX models with several inputs and outputs, and with hidden values that are wanted, as one vector in and one out.

For translation the model is put between two vectors: every input is cut out of the first, and all wanted values are
joined to the second. What decides about counterexamples is the model itself, fed input by input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.question import Part, Port
from verifier.frontend.network import Network, translate
from verifier.frontend.normalise import new_session, normalise, runs_in_memory
from verifier.frontend.onnx_file import OnnxFile, Ports, read_ports

_OWN = "verifier/"  # begins the names of what is put around a model
_OLDEST_OPSET = 7


@dataclass
class PortRunner:
    """Runs the original model: outputs without, hidden values with these among the outputs of the model.

    The outputs of a session that also gives hidden values may differ in the last digits, so they are not taken from it.
    """

    ports: Ports
    shapes: tuple[tuple[int, ...], ...]
    hidden: tuple[str, ...]
    sessions: dict[tuple[bool, bool], Any] = field(default_factory=dict)

    def __call__(self, x: np.ndarray, optimised: bool) -> np.ndarray:
        feeds, start, flat = {}, 0, x.reshape(-1)
        for name, shape in zip(self.ports.inputs, self.shapes, strict=True):
            size = int(np.prod(shape, dtype=np.int64))
            feeds[name] = flat[start : start + size].reshape(shape)
            start += size
        values = self._run(False, optimised, list(self.ports.outputs), feeds)
        if self.hidden:
            values = self._run(True, optimised, list(self.hidden), feeds) + values
        wide = any(value.dtype != np.float32 for value in values)
        return np.concatenate([value.reshape(-1).astype(np.float64 if wide else np.float32) for value in values])

    def _run(self, inside: bool, optimised: bool, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        import onnx

        path = self.ports.path
        try:
            if (inside, optimised) not in self.sessions:
                model = onnx.ModelProto()
                model.CopyFrom(self.ports.model)
                if inside:
                    del model.graph.output[:]
                    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
                self.sessions[inside, optimised] = new_session(model.SerializeToString(), optimised)
            return [np.asarray(value) for value in self.sessions[inside, optimised].run(names, feeds)]
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            raise InputError(f"{path}: onnxruntime cannot run the network: {text}") from error


@dataclass(frozen=True)
class Original:
    """A file of a question as it is, run input by input; it need not be one that can be translated."""

    runner: PortRunner
    dtype: np.dtype

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        """(n, n_in) to (n, n_out): hidden values, then outputs."""
        return np.stack([self.runner(point.astype(self.dtype), optimised) for point in x])


def open_ported(path: str | Path, part: Part, deadline: Deadline | None = None) -> Original:
    """A file as the reference for a part of a question.

    Raises:
        InputError: it is malformed, or its inputs and outputs are not those of the part.
        UnsupportedError: its inputs are of several types, or of one that is not supported.
    """
    ports = read_ports(path, [port.shape for port in part.inputs], deadline)
    check_ports(ports, part)
    for name, shape, port in zip(ports.inputs, ports.shapes, part.inputs, strict=True):
        check_shape(f"{ports.path}: input '{name}'", shape, port)
    made = {name for node in ports.model.graph.node for name in node.output}
    for port in part.hidden:
        if port.node not in made:
            raise InputError(f"{ports.path}: no node gives '{port.node}', which the property declares as {port.name}")
    runner = PortRunner(ports, ports.shapes, tuple(port.node for port in part.hidden))
    dtype = np.dtype(ports.dtypes[0])
    _check_values(runner, part, np.zeros(sum(port.size for port in part.inputs), dtype))
    return Original(runner, dtype)


def load_ported(path: str | Path, part: Part, deadline: Deadline | None = None) -> Network:
    """A file as the network of a question; its ``evaluate`` runs the file itself.

    Raises:
        InputError, UnsupportedError: as of :func:`open_ported`, or it uses something without a rule.
    """
    original = open_ported(path, part, deadline)
    ports, dtype = original.runner.ports, original.dtype
    size = sum(port.size for port in part.inputs)
    file = _between_vectors(ports, [*original.runner.hidden, *ports.outputs], size, dtype)
    normalise(file)
    graph, shape = translate(file)
    return Network(
        graph, ports.path.name, graph.input_shape, shape, dtype, ports.opset, original.runner, ports.path, ports.sha256
    )


def check_ports(ports: Ports, part: Part) -> None:
    """Numbers of inputs and outputs, and types of inputs.

    Raises:
        InputError: the property declares others.
    """
    if len(ports.inputs) != len(part.inputs):
        raise InputError(
            f"{ports.path}: the network has {len(ports.inputs)} inputs ({', '.join(ports.inputs)}) but the property "
            f"declares {len(part.inputs)} for '{part.name}'; list all, in their order"
        )
    for name, dtype, port in zip(ports.inputs, ports.dtypes, part.inputs, strict=True):
        check_type(f"{ports.path}: input '{name}'", dtype, port)
    if len(ports.outputs) != len(part.outputs):
        raise InputError(
            f"{ports.path}: the network has {len(ports.outputs)} outputs ({', '.join(ports.outputs)}) but the property "
            f"declares {len(part.outputs)} for '{part.name}'; list all, in their order"
        )
    if len(set(ports.dtypes)) > 1:
        raise UnsupportedError(f"{ports.path}: inputs of several element types are not supported together")


def _check_values(runner: PortRunner, part: Part, x: np.ndarray) -> None:
    """Number, types and shapes of the outputs, by one run."""
    ports = runner.ports
    start, feeds = 0, {}
    for name, shape in zip(ports.inputs, runner.shapes, strict=True):
        size = int(np.prod(shape, dtype=np.int64))
        feeds[name] = x[start : start + size].reshape(shape)
        start += size
    sides = ((False, ports.outputs, part.outputs), (True, runner.hidden, part.hidden))
    for inside, names, declared in sides:
        if not names:
            continue
        for name, value, port in zip(names, runner._run(inside, False, list(names), feeds), declared, strict=True):
            what = f"{ports.path}: {'hidden value' if inside else 'output'} '{name}'"
            check_type(what, value.dtype, port)
            check_shape(what, value.shape, port)


def check_type(what: str, dtype: np.dtype, port: Port) -> None:
    """
    Raises:
        InputError: the declared element type is another one.
    """
    fits = dtype.kind == "f" if port.dtype == "real" else dtype.name == port.dtype
    if not fits:
        raise InputError(f"{what} has the element type {dtype.name} but the property declares {port.name} {port.dtype}")


def check_shape(what: str, shape: Sequence[int], port: Port) -> None:
    """Shapes are equal but for dims of size 1, which do not change where an element is.

    Raises:
        InputError: they are not.
    """
    if [n for n in shape if n != 1] != [n for n in port.shape if n != 1]:
        raise InputError(
            f"{what} has the shape {list(shape)} but the property declares {port.name} with {list(port.shape)}"
        )


def _between_vectors(ports: Ports, wanted: Sequence[str], size: int, dtype: np.dtype) -> OnnxFile:
    """The model between a vector of all inputs and one of all wanted values."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if ports.opset < _OLDEST_OPSET:
        raise UnsupportedError(
            f"{ports.path}: several inputs or outputs need opset {_OLDEST_OPSET} or later, not {ports.opset}"
        )
    kind = TensorProto.DOUBLE if dtype == np.float64 else TensorProto.FLOAT
    model = onnx.ModelProto()
    model.CopyFrom(ports.model)
    graph, before, after = model.graph, [], []

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(value.astype(np.int64), name))
        return name

    start = 0
    for k, (name, shape) in enumerate(zip(ports.inputs, ports.shapes, strict=True)):
        count = int(np.prod(shape, dtype=np.int64))
        index = constant(f"{_OWN}index{k}", np.arange(start, start + count))
        start += count
        before.append(helper.make_node("Gather", [f"{_OWN}in", index], [f"{_OWN}cut{k}"], axis=1))
        before.append(
            helper.make_node("Reshape", [f"{_OWN}cut{k}", constant(f"{_OWN}shape{k}", np.array(shape))], [name])
        )
    flat = constant(f"{_OWN}flat", np.array([1, -1]))
    parts = []
    for k, name in enumerate(wanted):
        after.append(helper.make_node("Reshape", [name, flat], [f"{_OWN}row{k}"]))
        parts.append(f"{_OWN}row{k}")
    after.append(helper.make_node("Concat", parts, [f"{_OWN}out"], axis=1))
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(f"{_OWN}in", kind, [1, size]))
    graph.output.append(helper.make_tensor_value_info(f"{_OWN}out", kind, None))
    file = OnnxFile(
        ports.path, model, f"{_OWN}in", f"{_OWN}out", (1, size), dtype, ports.opset, ports.sha256, ports.deadline
    )
    if not runs_in_memory(file):
        raise UnsupportedError(f"{ports.path}: several inputs or outputs need a model of less than 2 GiB")
    return file
