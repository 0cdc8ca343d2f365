"""ONNX files -> a list of steps over flat float64 vectors, named by the file's own tensors.

Every tensor that depends on the input is produced by one step: an `Affine` one (a sum of linear maps and a constant)
or a `Unary` one (a function of every element). An ONNX node that needs several steps gets inner tensors whose
names end in `#` and a word. The statement that is checked is about this network in real arithmetic with its stored
constants; a coefficient that is no float64 number (1/3, a batch normalisation's factor) is known up to a relative
error, `Affine.loose`, that every bound allows for. What a node means is in `nodes.py`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from proofcheck.failures import NotCovered, Refused, require
from proofcheck.maps import LinearMap, Pick, Scale

MOST_ELEMENTS = 1 << 27  # of any tensor
_MOST_BYTES = 1 << 32  # of a file
_TYPES = {1: "<f4", 11: "<f8", 6: "<i4", 7: "<i8", 9: "|b1", 2: "|u1", 3: "|i1", 5: "<i2"}
_FIELDS = {1: "float_data", 11: "double_data", 6: "int32_data", 7: "int64_data"}


@dataclass(frozen=True)
class Affine:
    """out = sum of M x over `terms` of (x, M), plus `bias`; off by at most `loose` (sum of |M| |x| + |bias|)."""

    out: str
    terms: tuple[tuple[str, LinearMap], ...]
    bias: np.ndarray | None = None
    loose: float = 0.0

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.terms)


@dataclass(frozen=True)
class Unary:
    """out = f(x), element by element. A piecewise linear f has `slopes` before, between and after its `knots`, and the
    value `first` at the first one; smooth functions have none of these."""

    out: str
    source: str
    function: str
    knots: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    first: float = 0.0

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)


Step = Affine | Unary


@dataclass
class Network:
    """Steps in an order in which each reads what earlier ones make.

    Attributes:
        sizes: elements of every tensor. hash: SHA-256 of the file. external: of the files with data outside it.
    """

    input: str
    output: str
    hash: str
    steps: list[Step] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place: dict[str, int] = {}
        self.curved: set[str] = set()
        self.tangled: set[str] = set()
        self.external: dict[str, str] = {}

    def finish(self) -> None:
        """Drop what the output does not depend on, and number the tensors."""
        needed, kept = {self.output}, []
        for step in reversed(self.steps):
            if step.out in needed:
                kept.append(step)
                needed.update(step.sources)
        self.steps = kept[::-1]
        self.sizes = {n: math.prod(s) for n, s in self.shapes.items() if n in needed or n == self.input}
        self.place = {self.input: -1, **{step.out: i for i, step in enumerate(self.steps)}}
        self.curved = {s.source for s in self.steps if isinstance(s, Unary)}
        self._find_tangled()

    def _find_tangled(self) -> None:
        """Tensors of which intervals step by step are wider than those of the affine function of the outputs of
        nonlinear steps (`roots`) that they are, and of which these matter: what nonlinear steps read, and the output.
        """
        roots = {self.input: {self.input}}
        single, tight = {self.input}, {self.input}  # elements that vary by themselves; intervals that are as narrow
        for step in self.steps:
            if isinstance(step, Unary):
                roots[step.out] = {step.out}
                single.add(step.out)
                tight.add(step.out)
                continue
            own = [roots[n] for n in step.sources]
            roots[step.out] = set[str]().union(*own)
            apart = sum(map(len, own)) == len(roots[step.out])
            straight = [isinstance(m, Scale) or (isinstance(m, Pick) and m.once) for _, m in step.terms]
            if apart and all(n in single or (s and n in tight) for n, s in zip(step.sources, straight, strict=True)):
                tight.add(step.out)
            if apart and all(straight) and single.issuperset(step.sources):
                single.add(step.out)
        self.tangled = {n for n in (*self.curved, self.output) if n not in tight}


def read_limited(path: Path, most: int = _MOST_BYTES) -> bytes:
    """A file's bytes, if there are not too many."""
    try:
        require(path.is_file() and path.stat().st_size <= most, f"{path.name}: no regular file, or too large")
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{path.name}: {error.strerror}") from None


def load(path: Path) -> Network:
    """Read a network; its nodes are translated by :func:`proofcheck.nodes.translate`."""
    from proofcheck.nodes import Translator

    data = read_limited(path)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own errors
        raise Refused(f"{path.name} is not an ONNX file: {error}") from None
    graph = model.graph
    outside = Outside(path.parent)
    constants = {t.name: outside.array(t) for t in graph.initializer}
    if graph.sparse_initializer or model.functions:
        raise NotCovered("sparse initialisers or functions inside the ONNX file")
    require(len(constants) == len(graph.initializer), f"{path.name}: two initialisers have the same name")
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise NotCovered(f"a network with {len(inputs)} inputs and {len(graph.output)} outputs")
    if inputs[0].type.tensor_type.elem_type not in (1, 11):
        raise NotCovered("an input that is neither float32 nor float64")
    network = Network(inputs[0].name, graph.output[0].name, hashlib.sha256(data).hexdigest())
    network.shapes[network.input] = _shape(inputs[0])
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    translator = Translator(network, constants, opset, outside)
    seen = {network.input, *constants}
    for node in graph.node:
        where = f"node {node.name or node.output[:1]} ({node.op_type})"
        if node.domain not in ("", "ai.onnx"):
            raise NotCovered(f"{where}: domain {node.domain}")
        for name in node.output:
            require(
                name not in seen and "#" not in name, f"{where}: tensor {name!r} is written twice, or has a # in it"
            )
        require(all(not n or n in seen for n in node.input), f"{where}: reads a tensor that is not there yet")
        seen.update(n for n in node.output if n)
        translator.translate(node, where)
    if network.output not in network.shapes:
        raise NotCovered("an output that does not depend on the input")
    network.finish()
    network.external = {n: hashlib.sha256(read_limited(outside.folder / n)).hexdigest() for n in outside.read}
    return network


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """The input's shape, for one sample."""
    dims = value.type.tensor_type.shape.dim
    shape = [d.dim_value if d.HasField("dim_value") else 0 for d in dims]
    if shape and shape[0] <= 0:
        shape[0] = 1
    if any(d <= 0 for d in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise NotCovered(f"an input of shape {shape}")
    return tuple(shape)


class Outside:
    """Arrays of ONNX tensors, and data in files beside the network.

    Attributes:
        read: locations of what was read outside.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.read: set[str] = set()

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """The values of a tensor, in its own type."""
        shape = tuple(tensor.dims)
        if tensor.data_type not in _TYPES:
            raise NotCovered(f"constant {tensor.name}: element type {tensor.data_type}")
        require(all(d >= 0 for d in shape), f"constant {tensor.name}: negative size")
        size, dtype = math.prod(shape), np.dtype(_TYPES[tensor.data_type])
        require(size <= MOST_ELEMENTS, f"constant {tensor.name}: too large")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raw = self._beside(tensor, size * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            raw = tensor.raw_data
        elif tensor.data_type in _FIELDS:
            raw = np.array(getattr(tensor, _FIELDS[tensor.data_type])).astype(dtype).tobytes()
        else:
            raise NotCovered(f"constant {tensor.name}: encoding of element type {tensor.data_type}")
        require(len(raw) == size * dtype.itemsize, f"constant {tensor.name}: {len(raw)} bytes for shape {shape}")
        values = np.frombuffer(raw, dtype).reshape(shape)
        require(np.isfinite(values).all() or dtype.kind != "f", f"constant {tensor.name}: not finite")
        return values

    def _beside(self, tensor: onnx.TensorProto, size: int) -> bytes:
        """External data, which must lie in the network's folder."""
        entries = {e.key: e.value for e in tensor.external_data}
        path = (self.folder / entries.get("location", "")).resolve()
        require(path.is_relative_to(self.folder), f"constant {tensor.name}: data outside the network's folder")
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
            require(offset >= 0 and length == size, f"constant {tensor.name}: offset {offset}, length {length}")
            require(path.is_file(), f"constant {tensor.name}: no file {path.name}")
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except (OSError, ValueError) as error:
            raise Refused(f"constant {tensor.name}: external data: {error}") from None
        self.read.add(entries["location"])
        return data
