"""ONNX -> torch module through onnx2torch, loaded privately and without torchvision.

Two of onnx2torch's converters (NonMaxSuppression, RoiAlign) import torchvision, which costs seconds. Neither op can be
verified, so the package is loaded with these two left out. The load is private: its modules are taken out of
``sys.modules`` again, so that another program in this process that imports onnx2torch gets its own, complete copy, and
our converters appear in no registry but ours.
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from verifier.core.errors import InputError, UnsupportedOpError
from verifier.frontend.lower import MissingRules

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from verifier.frontend.onnx_file import OnnxFile

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


@cache
def converter() -> Converter:
    """onnx2torch with our converters added; loaded on first use, invisible to the rest of the process."""
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
    loaded = Converter(
        main.convert,
        registry.add_converter,
        registry.get_converter,
        common.OperationConverterResult,
        common.OnnxMapping,
        common.onnx_mapping_from_node,
        common.get_const_value,
        registry._CONVERTER_REGISTRY,
    )
    from verifier.frontend.converters import register

    register(loaded)
    return loaded


def unsupported_nodes(file: OnnxFile) -> list[str]:
    """One phrase for every node without a converter: op, version, name and (where stored) shape."""
    tool = converter()
    versions = {entry.domain: entry.version for entry in file.model.opset_import}
    out = []
    for node in file.model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = versions.get(node.domain, versions.get(domain, file.opset))
        try:
            tool.get_converter(node.op_type, version, domain)
        except NotImplementedError:
            label = node.output[0] if node.output else node.name
            kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            out.append(f"{kind} (opset {version}) at '{label}'")
    return out


def to_module(file: OnnxFile) -> nn.Module:
    """Build the torch module; every submodule carries ``onnx_mapping`` with the names of its outputs.

    Raises:
        MissingRules: all nodes without a converter.
        UnsupportedOpError: a converter does not cover this use of its op.
        InputError: the model is inconsistent.
    """
    missing = unsupported_nodes(file)
    if missing:
        raise MissingRules(str(file.path), missing)
    try:
        return converter().convert(_single_output(file), attach_onnx_mapping=True)
    except NotImplementedError as error:
        raise UnsupportedOpError(f"{file.path}: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise explain(file, error) from error


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


def _single_output(file: OnnxFile) -> onnx.ModelProto:
    """The model, with an Identity at the end when its output is the input, stored, or one of several of a node."""
    import onnx

    maker = next((n for n in file.model.graph.node if file.output_name in n.output), None)
    if maker is not None and len(maker.output) == 1:
        return file.model
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    inner = f"{file.output_name}/before"
    model.graph.node.append(onnx.helper.make_node("Identity", [file.output_name], [inner], name=inner))
    model.graph.output[0].name = inner
    return model


def explain(file: OnnxFile, error: Exception) -> InputError:
    """What ONNX's own checker says about the model, or else what failed."""
    import onnx

    text = ""
    try:
        onnx.checker.check_model(file.model, full_check=True)
    except Exception as found:
        text = " ".join(str(found).split())
    if "Field 'shape' of 'type' is required" in text:  # of the output, which has none any more
        text = ""
    return InputError(f"{file.path}: the model is inconsistent: {(text or f'{type(error).__name__}: {error}')[:300]}")


def output_names(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the ONNX tensors that a converted node returns; None for other modules."""
    mapping = module.__dict__.get("onnx_mapping")
    return tuple(mapping.outputs) if mapping is not None else None
