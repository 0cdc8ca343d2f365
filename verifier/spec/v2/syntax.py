"""What a VNN-LIB 2.0 text says, after its types were checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from verifier.spec.v2.polynomial import Polynomial
from verifier.spec.v2.tokens import Text, Token

FLOATS = frozenset(
    ["float16", "float32", "float64", "bfloat16", "float8e4m3fn", "float8e5m2", "float8e4m3fnuz", "float8e5m2fnuz"]
    + ["float4e2m1"]
)
SIGNED = frozenset(["int4", "int8", "int16", "int32", "int64"])
UNSIGNED = frozenset(["uint4", "uint8", "uint16", "uint32", "uint64"])
OTHERS = frozenset(["complex64", "complex128", "bool", "string"])
REAL = "real"
TYPES = FLOATS | SIGNED | UNSIGNED | OTHERS | {REAL}


class Kind(StrEnum):
    """What a tensor is to its network."""

    INPUT = "input"
    HIDDEN = "hidden"
    OUTPUT = "output"


@dataclass(frozen=True)
class Tensor:
    """A declared tensor.

    Attributes:
        name: its token.
        dtype: one of :data:`TYPES`.
        written: the element type as written.
        start: of its elements among all variables of the query, row-major from there.
        node: the name in the ONNX graph of a hidden tensor, else empty.
    """

    name: Token
    kind: Kind
    dtype: str
    written: str
    shape: tuple[int, ...]
    start: int
    node: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Declared:
    """A network's declaration.

    Attributes:
        equal_to: name of the network whose file this one has, else empty.
        isomorphic_to: name of the network whose structure this one has, else empty.
        tensors: in order.
    """

    name: Token
    equal_to: str
    isomorphic_to: str
    tensors: tuple[Tensor, ...]

    def of(self, kind: Kind) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.kind is kind]


@dataclass(frozen=True)
class Comparison:
    """``polynomial OP 0`` with OP one of <, <=, ==, !=."""

    polynomial: Polynomial
    operator: str
    position: int


@dataclass(frozen=True)
class Connective:
    """A conjunction or a disjunction; without parts it is true or false."""

    conjunction: bool
    parts: tuple[Formula, ...]
    position: int


Formula = Comparison | Connective


@dataclass(frozen=True)
class Query:
    """A query whose types are right."""

    text: Text
    networks: tuple[Declared, ...]
    asserts: tuple[Formula, ...]

    @property
    def tensors(self) -> Iterator[Tensor]:
        for network in self.networks:
            yield from network.tensors

    @property
    def n_variables(self) -> int:
        return sum(tensor.size for tensor in self.tensors)


_NEGATED = {"<=": "<", "<": "<=", "==": "!=", "!=": "=="}


def negated(formula: Formula) -> Formula:
    """The formula's negation, without negations inside."""
    if isinstance(formula, Connective):
        parts = tuple(negated(part) for part in formula.parts)
        return Connective(not formula.conjunction, parts, formula.position)
    other, p = _NEGATED[formula.operator], formula.polynomial
    if formula.operator in ("<", "<="):  # not (p <= 0) is -p < 0
        p = {m: -c for m, c in p.items()}
    return Comparison(p, other, formula.position)
