"""Reads an ONNX file safely: every defect of the file is found here and reported in one sentence.

Checked before memory is allocated: the size of the file (also decompressed), the size of every stored tensor against
its dims, and that external data lies inside the model's folder and is long enough.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

MAX_PROTOBUF = (1 << 31) - 1
MAX_TENSOR_BYTES = 1 << 35
_REMARKS = ("doc_string", "producer_name", "producer_version")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class OnnxFile:
    """A parsed model with its single input and output.

    Attributes:
        path: the file that was read (perhaps with ``.gz``).
        model: parsed, external data loaded, initialisers removed from the inputs, the input's dims concrete.
        input_name, output_name: tensor names.
        input_shape: concrete dims; unknown leading batch dims are 1.
        input_dtype: numpy dtype of the input, float32 or float64.
        opset: version of the default operator set.
        sha256: of the bytes on disk.
        deadline: for translating it; looked at between two of many steps.
    """

    path: Path
    model: onnx.ModelProto
    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    input_dtype: np.dtype
    opset: int
    sha256: str
    deadline: Deadline = field(default_factory=Deadline, compare=False)


def resolve(path: str | Path) -> Path:
    """The file itself, or the same name with ``.gz`` when only that exists."""
    given = Path(path)
    if given.is_dir():
        raise InputError(f"{given}: is a folder, give the path of an ONNX file")
    if given.exists():
        return given
    packed = given.with_name(given.name + ".gz")
    if packed.is_file():
        return packed
    raise InputError(f"{given}: no such file; check the path of the network")


def read_bytes(path: Path, limit: int = MAX_PROTOBUF) -> tuple[bytes, str]:
    """Contents, unpacked when gzipped, and the SHA-256 of the bytes on disk; at most ``limit`` bytes unpacked."""
    try:
        if path.stat().st_size > limit:
            raise InputError(f"{path}: larger than {limit} bytes, the limit of an ONNX file; use external data")
        stored = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    digest = hashlib.sha256(stored).hexdigest()
    if stored[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as stream:
                stored = stream.read(limit + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: damaged gzip file ({error}); fetch it again") from error
        if len(stored) > limit:
            raise InputError(f"{path}: unpacks to more than {limit} bytes, the limit of an ONNX file")
    return stored, digest


def _checked(path: str | Path, deadline: Deadline) -> tuple[Path, onnx.ModelProto, int, str]:
    """File, model, opset and SHA-256; everything that is stored was checked."""
    file = resolve(path)
    data, digest = read_bytes(file)
    deadline.check("loading")
    model = _parse(data, file)
    del data
    opset = _opset(model, file)
    for tensor in tensors(model.graph):
        deadline.check("loading")
        _check_tensor(tensor, file)
    for tensor in model.graph.initializer:
        deadline.check("loading")
        _check_numbers(tensor, file)
    _drop_initializer_inputs(model.graph)
    return file, model, opset, digest


@dataclass(frozen=True)
class Ports:
    """A parsed model with all its inputs and outputs.

    Attributes:
        inputs, outputs: tensor names.
        shapes, dtypes: of the inputs.
    """

    path: Path
    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    opset: int
    sha256: str
    deadline: Deadline


def read_ports(path: str | Path, shapes: Sequence[Sequence[int]] = (), deadline: Deadline | None = None) -> Ports:
    """Read and check a model with any number of inputs and outputs; errors as of :func:`read`.

    Args:
        shapes: wanted for the inputs; what the file leaves open is filled in from them where the ranks are equal.
    """
    deadline = deadline or Deadline()
    file, model, opset, digest = _checked(path, deadline)
    found: list[tuple[int, ...]] = []
    for k, source in enumerate(model.graph.input):
        if k < len(shapes):
            _fill_in(source, shapes[k])
        found.append(_input_shape(source, file))
        _set_shape(source, found[-1])
    dtypes = tuple(_input_dtype(source, file) for source in model.graph.input)
    for target in model.graph.output:
        target.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inputs, outputs = tuple(v.name for v in model.graph.input), tuple(v.name for v in model.graph.output)
    return Ports(file, model, inputs, outputs, tuple(found), dtypes, opset, digest, deadline)


def _fill_in(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    """Sizes for dims that the file leaves open."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) == len(shape):
        for dim, size in zip(dims, shape, strict=True):
            if not dim.HasField("dim_value") or dim.dim_value <= 0:
                dim.dim_value = size


def read(path: str | Path, deadline: Deadline | None = None) -> OnnxFile:
    """Read and check a model.

    Raises:
        DeadlineExceeded: between two of many steps.
        InputError: missing, truncated or malformed file; weights that are no numbers or not of the announced size.
        UnsupportedError: more than one input or output, or an input that is not floating point.
    """
    deadline = deadline or Deadline()
    file, model, opset, digest = _checked(path, deadline)
    source = _single(model.graph.input, "input", file)
    target = _single(model.graph.output, "output", file)
    shape = _input_shape(source, file)
    dtype = _input_dtype(source, file)
    _set_shape(source, shape)
    target.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return OnnxFile(file, model, source.name, target.name, shape, dtype, opset, digest, deadline)


def _parse(data: bytes, path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if data.startswith(_LFS):
        raise InputError(f"{path}: is a Git LFS pointer, not the network; fetch it with 'git lfs pull'")
    if not data:
        raise InputError(f"{path}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not an ONNX file, or truncated; fetch or export it again") from error
    _check_text(model, path)
    if model.ir_version <= 0 or not model.HasField("graph") or not model.graph.output:
        raise InputError(f"{path}: not a complete ONNX model (version, graph or outputs are missing)")
    if not model.graph.node:
        raise InputError(f"{path}: the ONNX graph has no nodes")
    return model


def _check_text(message: Message, path: Path) -> None:
    """Every text in a message is UTF-8; protobuf leaves bytes where it is not. Such remarks are dropped."""
    texts, parts = _fields(type(message))
    for name in texts:
        value = getattr(message, name)
        bad = [text for text in ((value,) if isinstance(value, str | bytes) else value) if not isinstance(text, str)]
        if bad and name in _REMARKS:
            message.ClearField(name)
        elif bad:
            raise InputError(
                f"{path}: {message.DESCRIPTOR.name}.{name} holds {bad[0][:20]!r}, which is no UTF-8 text; the file is "
                "damaged, fetch or export it again"
            )
    for name, repeated in parts:
        if repeated:
            for part in getattr(message, name):
                _check_text(part, path)
        elif message.HasField(name):
            _check_text(getattr(message, name), path)


@cache
def _fields(kind: type[Message]) -> tuple[tuple[str, ...], tuple[tuple[str, bool], ...]]:
    """Names of a message's fields that are text, and of those that are messages, with whether they repeat."""
    texts, parts = [], []
    for entry in kind.DESCRIPTOR.fields:
        if entry.type == entry.TYPE_STRING:
            texts.append(entry.name)
        elif entry.message_type is not None:
            parts.append((entry.name, hasattr(getattr(kind(), entry.name), "append")))
    return tuple(texts), tuple(parts)


def _opset(model: onnx.ModelProto, path: Path) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for domain in ("", "ai.onnx"):
        if domain in versions:
            return int(versions[domain])
    if not versions:
        raise InputError(f"{path}: the model does not say which operator set it uses (opset_import is missing)")
    raise UnsupportedError(f"{path}: uses only the operator sets {sorted(versions)}, not the standard one")


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a graph: initialisers, node attributes, subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for inner in attribute.graphs:
                yield from tensors(inner)


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    """Size against dims; external data is located, checked and read into the tensor."""
    from onnx import TensorProto, helper

    name = tensor.name or "constant"
    if any(d < 0 for d in tensor.dims):
        raise InputError(f"{path}: tensor '{name}' has a negative dimension in {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return
    try:
        item = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: tensor '{name}' has the unknown element type {tensor.data_type}") from error
    packed = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1} & {tensor.data_type}
    expected = (count + 1) // 2 if packed else count * item
    if expected > MAX_TENSOR_BYTES:
        raise InputError(f"{path}: tensor '{name}' announces {expected} bytes; the file is damaged or too large")
    if tensor.data_location == TensorProto.EXTERNAL:
        _read_external(tensor, name, expected, path)
        return
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != expected:
            found = len(tensor.raw_data)
            raise InputError(
                f"{path}: tensor '{name}' of shape {list(tensor.dims)} needs {expected} bytes but holds {found}"
            )
        return
    field = helper.tensor_dtype_to_field(tensor.data_type)
    stored = len(getattr(tensor, field))
    complex_types = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
    needed = 2 * count if tensor.data_type in complex_types else expected if packed else count
    if stored != needed:
        raise InputError(
            f"{path}: tensor '{name}' of shape {list(tensor.dims)} needs {needed} numbers but holds {stored}"
        )


def _read_external(tensor: onnx.TensorProto, name: str, expected: int, path: Path) -> None:
    from onnx import TensorProto

    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.resolve().parent
    target = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder) or target == folder:
        raise InputError(
            f"{path}: tensor '{name}' keeps its data in '{location}', which is outside the model's folder; "
            "put the data next to the model"
        )
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(expected)))
    except ValueError as error:
        raise InputError(f"{path}: tensor '{name}' has a malformed offset or length of its external data") from error
    if not target.is_file():
        raise InputError(f"{path}: tensor '{name}' keeps its data in '{location}', which does not exist")
    if offset < 0 or length != expected or target.stat().st_size < offset + length:
        raise InputError(
            f"{path}: tensor '{name}' needs {expected} bytes at offset {offset} of '{location}', which are not there"
        )
    with target.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _check_numbers(tensor: onnx.TensorProto, path: Path) -> None:
    from onnx import TensorProto, numpy_helper

    kinds = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if tensor.data_type not in kinds:
        return
    values = numpy_helper.to_array(tensor)
    if np.isnan(values.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else values).any():
        raise InputError(f"{path}: initializer '{tensor.name}' contains NaN")


def _drop_initializer_inputs(graph: onnx.GraphProto) -> None:
    names = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name not in names]
    if len(kept) != len(graph.input):
        del graph.input[:]
        graph.input.extend(kept)


def _single(values: object, what: str, path: Path) -> onnx.ValueInfoProto:
    found = list(values)  # type: ignore[call-overload]
    if len(found) != 1:
        names = ", ".join(f"'{value.name}'" for value in found) or "none"
        raise UnsupportedError(f"{path}: the network must have exactly one {what}, it has {len(found)}: {names}")
    return found[0]


def _input_shape(value: onnx.ValueInfoProto, path: Path) -> tuple[int, ...]:
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        raise UnsupportedError(f"{path}: input '{value.name}' has no shape; export the model with a fixed input shape")
    dims = [d.dim_value if d.HasField("dim_value") else 0 for d in value.type.tensor_type.shape.dim]
    leading = next((i for i, d in enumerate(dims) if d > 0), 1)
    for i, d in enumerate(dims):
        if d <= 0 and i >= max(leading, 1):
            raise UnsupportedError(
                f"{path}: dimension {i} of input '{value.name}' is not fixed; export the model with a fixed shape"
            )
    shape = tuple(max(d, 1) for d in dims)
    if math.prod(shape) * 8 > MAX_TENSOR_BYTES:
        raise InputError(f"{path}: input '{value.name}' of shape {list(shape)} is too large")
    return shape


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    tensor_type = value.type.tensor_type
    del tensor_type.shape.dim[:]
    for d in shape:
        tensor_type.shape.dim.add().dim_value = d


def _input_dtype(value: onnx.ValueInfoProto, path: Path) -> np.dtype:
    from onnx import TensorProto

    kind = value.type.tensor_type.elem_type
    if kind == TensorProto.FLOAT:
        return np.dtype(np.float32)
    if kind == TensorProto.DOUBLE:
        return np.dtype(np.float64)
    names = dict(zip(TensorProto.DataType.values(), TensorProto.DataType.keys(), strict=True))
    raise UnsupportedError(
        f"{path}: input '{value.name}' has element type {names.get(kind, kind)}; only float32 and float64 are supported"
    )
