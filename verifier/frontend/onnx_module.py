"""ONNX -> torch module through onnx2torch and our own converters."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from verifier.core.errors import InputError, PluginFailed, UnsupportedOpError
from verifier.core.plugins import note
from verifier.frontend.converters import Foreign, adopt, register
from verifier.frontend.lower import foreign_translators
from verifier.frontend.lowering import MissingRules
from verifier.frontend.onnx2torch_loader import Converter, load_privately

if TYPE_CHECKING:
    import onnx

    from verifier.frontend.onnx_file import OnnxFile


@cache
def converter() -> Converter:
    """onnx2torch with our converters added; loaded on first use."""
    loaded = load_privately()
    register(loaded)
    return loaded


@cache
def extended() -> Converter:
    """The same, with the converters of other packages as well.

    Raises:
        ConfigError: one of them, or of the translators that come with them, cannot be used.
    """
    foreign_translators()
    adopt(converter())
    return converter()


def _find(op: str, version: int, domain: str) -> None:
    """Whose converter an operator has; one of another package takes part.

    Raises:
        NotImplementedError: it has none.
    """
    try:
        found = converter().get_converter(op, version, domain)
    except NotImplementedError:
        found = extended().get_converter(op, version, domain)
    if isinstance(found, Foreign):
        note(found.plugin)


def has_no_converter(node: onnx.NodeProto) -> bool:
    """Whether no version of an operator has a converter, of ours or another package's: only its definition can help."""

    def known() -> set[str]:
        return {key.operation_type for key in converter().registry if key.domain == ""}

    if node.domain:
        return True
    if node.op_type in known():
        return False
    extended()
    return node.op_type not in known()


def unsupported_nodes(file: OnnxFile) -> list[str]:
    """One phrase for every node without a converter: op, version, name and (where stored) shape."""
    versions = {entry.domain: entry.version for entry in file.model.opset_import}
    out = []
    for node in file.model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = versions.get(node.domain, versions.get(domain, file.opset))
        try:
            _find(node.op_type, version, domain)
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
    except PluginFailed:
        raise
    except Exception as error:
        raise explain(file, error) from error


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


class _OneNumber(nn.Module):
    """A module whose input has no dim, for one of shape (1,)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x.reshape(()))


def of_one_number(module: nn.Module) -> nn.Module:
    """The same network with an input of shape (1,) instead of (): bounds need a dim to index."""
    return _OneNumber(module)


def output_names(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the ONNX tensors that a converted node returns; None for other modules."""
    mapping = module.__dict__.get("onnx_mapping")
    return tuple(mapping.outputs) if mapping is not None else None
