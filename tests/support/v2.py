"""Small ONNX networks with dyadic weights, whose values are exact, and texts of VNN-LIB 2.0 about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Io = tuple[str, list[int]]


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list[Io], outputs: list[Io], **stored: np.ndarray) -> Path:
    """A float32 network in opset 13."""
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items()]
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", values[0], values[1], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def node(op: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def absolute(path: Path, factor: float = 1.0) -> Path:
    """x (1, 1) to ``factor |x|`` (1, 1), with the hidden value ``h = relu([x, -x])`` (1, 2)."""
    nodes = [node("MatMul", ["x", "w"], "z"), node("Relu", ["z"], "h"), node("MatMul", ["h", "v"], "y")]
    w, v = f32(1, -1).reshape(1, 2), f32(factor, factor).reshape(2, 1)
    return save(path, nodes, [("x", [1, 1])], [("y", [1, 1])], w=w, v=v)


def two_in_two_out(path: Path) -> Path:
    """a (1, 2) and b (2,) to s = a0 + a1 + b0 - b1 (1, 1) and p = relu(a) (1, 2)."""
    nodes = [
        node("MatMul", ["a", "one"], "sa"),
        node("Mul", ["b", "signs"], "sb"),
        node("ReduceSum", ["sb"], "tb", keepdims=1),
        node("Add", ["sa", "tb"], "s"),
        node("Relu", ["a"], "p"),
    ]
    one, signs = f32(1, 1).reshape(2, 1), f32(1, -1)
    return save(path, nodes, [("a", [1, 2]), ("b", [2])], [("s", [1, 1]), ("p", [1, 2])], one=one, signs=signs)


def scalar(path: Path) -> Path:
    """t () to 2 t + 1 ()."""
    nodes = [node("Mul", ["t", "two"], "d"), node("Add", ["d", "one"], "y")]
    return save(path, nodes, [("t", [])], [("y", [])], two=np.float32(2), one=np.float32(1))


def rows(path: Path) -> Path:
    """x (N, 2) to relu of itself (N, 2), N left open."""
    path = save(path, [node("Relu", ["x"], "y")], [("x", [1, 2])], [("y", [1, 2])])
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    return path


VERSION = "(vnnlib-version <2.0>)\n"


def network(name: str, inputs: str, outputs: str, relation: str = "", hidden: str = "") -> str:
    """A declaration; ``inputs`` and ``outputs`` as in ``X[1,2] Z[]``, ``hidden`` as in ``H[1,2]="h"``."""

    def tensors(kind: str, texts: str) -> str:
        found = ""
        for text in texts.split():
            text, _, quoted = text.partition("=")
            at = text.index("[")
            found += f"  (declare-{kind} {text[:at]} float32 {text[at:]}{' ' + quoted if quoted else ''})\n"
        return found

    body = tensors("input", inputs) + tensors("hidden", hidden) + tensors("output", outputs)
    return f"(declare-network {name} {relation}\n{body})\n"


def box(*bounds: tuple[str, float, float]) -> str:
    return "".join(f"(assert (and (>= {x} {low}) (<= {x} {high})))\n" for x, low, high in bounds)
