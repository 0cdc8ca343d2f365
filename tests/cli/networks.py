"""Small ONNX files and properties for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def absolute(folder: Path, name: str = "abs.onnx", op: str = "Relu") -> Path:
    """y = |x_0| + |x_1| as two Gemm layers around ReLUs (or around another op)."""
    first = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=np.float32)
    last = np.ones((1, 4), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["z"], transB=1),
            helper.make_node(op, ["z"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [
            numpy_helper.from_array(first, "w1"),
            numpy_helper.from_array(np.zeros(4, dtype=np.float32), "b1"),
            numpy_helper.from_array(last, "w2"),
            numpy_helper.from_array(np.zeros(1, dtype=np.float32), "b2"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = folder / name
    onnx.save(model, path)
    return path


def above(folder: Path, threshold: float, name: str = "p.vnnlib", inputs: int = 2) -> Path:
    """Unsafe: y >= threshold for some x in [-1, 1]^n."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)] + ["(declare-const Y_0 Real)"]
    for i in range(inputs):
        lines += [f"(assert (>= X_{i} -1.0))", f"(assert (<= X_{i} 1.0))"]
    path = folder / name
    path.write_text("\n".join([*lines, f"(assert (>= Y_0 {threshold}))"]) + "\n")
    return path
