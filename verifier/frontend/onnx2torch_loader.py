"""onnx2torch, loaded privately and without torchvision.

Two of its converters (NonMaxSuppression, RoiAlign) import torchvision, which takes seconds. Neither op can be verified,
so the package is loaded without these two. The load is private: its modules are removed from ``sys.modules`` again, so
that another program in this process that imports onnx2torch gets its own complete copy, and our converters appear in no
registry but ours.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_PACKAGE = "onnx2torch"
_LEFT_OUT = ("onnx2torch.node_converters.nms", "onnx2torch.node_converters.roialign")
_lock = threading.Lock()
# Models with more data than the first are inferred without tensors larger than the second, which are never shapes.
_LARGE_BYTES, _LIGHT_BYTES = 1 << 26, 1 << 20


@dataclass(frozen=True)
class Converter:
    """The parts of a privately loaded onnx2torch that we use."""

    convert: Any
    add_converter: Any
    get_converter: Any
    result: Any
    mapping: Any
    mapping_from_node: Any
    constant: Any
    registry: dict[Any, Any]


def _ours(name: str) -> bool:
    return name == _PACKAGE or name.startswith(_PACKAGE + ".")


def load_privately() -> Converter:
    """A copy of onnx2torch, invisible to the rest of the process."""
    with _lock:
        others = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
        try:
            for name in _LEFT_OUT:
                empty = types.ModuleType(name)
                empty.__dict__["__all__"] = []
                sys.modules[name] = empty
            main = importlib.import_module(_PACKAGE)
            registry = importlib.import_module("onnx2torch.node_converters.registry")
            common = importlib.import_module("onnx2torch.utils.common")
            # The package writes large models to disk and back, and fails where their size cannot even be asked for.
            main.convert.__globals__["safe_shape_inference"] = infer_shapes
        finally:
            for name in [name for name in sys.modules if _ours(name)]:
                del sys.modules[name]
            sys.modules.update(others)
    return Converter(
        main.convert,
        registry.add_converter,
        registry.get_converter,
        common.OperationConverterResult,
        common.OnnxMapping,
        common.onnx_mapping_from_node,
        common.get_const_value,
        registry._CONVERTER_REGISTRY,
    )


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes of its values, whatever its size: large tensors take no part in the inference.

    Protobuf cannot serialise 2 GiB, which the inference does with what it is given.
    """
    import onnx

    total = sum(len(t.raw_data) for t in model.graph.initializer)
    if total < _LARGE_BYTES:
        return onnx.shape_inference.infer_shapes(model)
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    graph = light.graph
    graph.name = model.graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < _LIGHT_BYTES:
            graph.initializer.append(tensor)
        else:
            outside = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            outside.data_location = onnx.TensorProto.EXTERNAL
            outside.external_data.add(key="location", value="outside")
    found = onnx.shape_inference.infer_shapes(light)
    del model.graph.value_info[:]
    model.graph.value_info.extend(found.graph.value_info)
    return model
