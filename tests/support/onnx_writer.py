"""ONNX files of the random networks, written node by node (no exporter, so that opset and form are ours to choose)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.support.networks import Dag


def write_onnx(network: Dag, path: Path, opset: int = 13, batch: int | str = 1) -> None:
    """Save ``network`` with input ``X`` and output ``Y``; ``batch`` may be a symbolic name."""
    shapes = network.shapes
    nodes: list[onnx.NodeProto] = []
    initializers: dict[str, onnx.TensorProto] = {}
    names = ["X", *(f"v{i}" for i in range(1, len(shapes) - 1)), "Y"]
    for i, step in enumerate(network.steps, start=1):
        inputs = [names[j] for j in step.inputs]
        if step.kind == "relu":
            nodes.append(helper.make_node("Relu", inputs, [names[i]], f"relu{i}"))
        elif step.kind == "add":
            nodes.append(helper.make_node("Add", inputs, [names[i]], f"add{i}"))
        else:
            module = network.parts[step.module]
            kind, attributes, tensors = _translate(module)
            for key, array in tensors.items():
                name = f"{step.module}.{key}"
                initializers[name] = numpy_helper.from_array(array, name)
            weights = [f"{step.module}.{key}" for key in tensors]
            nodes.append(helper.make_node(kind, inputs + weights, [names[i]], f"{kind.lower()}{i}", **attributes))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [batch, *shapes[0]])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [batch, *shapes[-1]])],
        list(initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _translate(module: nn.Module) -> tuple[str, dict[str, object], dict[str, np.ndarray]]:
    """ONNX operator, attributes and parameters of one affine module."""
    if isinstance(module, nn.Linear):
        return "Gemm", {"transB": 1}, _arrays(module, "weight", "bias")
    if isinstance(module, nn.Conv2d):
        pads = [int(p) for p in module.padding]
        attributes: dict[str, object] = {
            "kernel_shape": list(module.kernel_size),
            "strides": list(module.stride),
            "dilations": list(module.dilation),
            "pads": pads + pads,
            "group": module.groups,
        }
        return "Conv", attributes, _arrays(module, "weight", "bias")
    if isinstance(module, nn.BatchNorm2d):
        return (
            "BatchNormalization",
            {"epsilon": module.eps},
            _arrays(module, "weight", "bias", "running_mean", "running_var"),
        )
    if isinstance(module, nn.AvgPool2d):
        size, stride, pad = (int(v) for v in (module.kernel_size, module.stride, module.padding))
        attributes = {
            "kernel_shape": [size] * 2,
            "strides": [stride] * 2,
            "pads": [pad] * 4,
            "count_include_pad": int(module.count_include_pad),
        }
        return "AveragePool", attributes, {}
    if isinstance(module, nn.Flatten):
        return "Flatten", {"axis": 1}, {}
    raise TypeError(f"no ONNX form for {type(module).__name__}")


def _arrays(module: nn.Module, *names: str) -> dict[str, np.ndarray]:
    return {name: getattr(module, name).detach().float().numpy() for name in names}
