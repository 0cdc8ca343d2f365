"""A problem about several tensors of one or more networks, and how these take part in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verifier.core.problem import Problem


@dataclass(frozen=True)
class Port:
    """A tensor that a network takes or gives, as a property declares it.

    Attributes:
        dtype: in lower case; ``real`` fits every floating-point type.
        node: name of a hidden tensor in the ONNX graph, else empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    node: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """One network of a question.

    Attributes:
        name: in the property.
        equal_to: the earlier network whose file it has, or empty.
        inputs, hidden, outputs: in the order of the declaration, which is that of the ONNX file.
        index: int64, where the elements of all inputs, one tensor after the other, are among the problem's inputs.
    """

    name: str
    equal_to: str
    inputs: tuple[Port, ...]
    hidden: tuple[Port, ...]
    outputs: tuple[Port, ...]
    index: np.ndarray

    @property
    def n_values(self) -> int:
        """Elements of hidden tensors and outputs, its share of the problem's outputs, in this order."""
        return sum(port.size for port in (*self.hidden, *self.outputs))


@dataclass(frozen=True)
class Question:
    """What a VNN-LIB 2.0 file asks.

    Attributes:
        source: the file.
        problem: its outputs are the values of all parts, one part after the other, then products.
        parts: in order of declaration.
    """

    source: str
    problem: Problem
    parts: tuple[Part, ...]

    @property
    def named(self) -> tuple[str, ...]:
        """Names of the networks that need a file."""
        return tuple(part.name for part in self.parts if not part.equal_to)

    @property
    def is_plain(self) -> bool:
        """Whether it is about one network with one input and one output, each element by itself."""
        if len(self.parts) != 1 or self.problem.products:
            return False
        (part,) = self.parts
        single = len(part.inputs) == len(part.outputs) == 1 and not part.hidden
        return single and np.array_equal(part.index, np.arange(self.problem.n_in))
