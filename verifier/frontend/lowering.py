"""What translators of ATen calls work with: the state of one translation, and how they refuse a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verifier.core.errors import UnsupportedOpError
from verifier.frontend.builder import Builder
from verifier.frontend.capture import Call, Ref
from verifier.graph.op import Op, Shape
from verifier.ops.reduce import Mean, Sum
from verifier.ops.shape import Gather, Reshape


class MissingRules(UnsupportedOpError):
    """Nodes without a rule, one phrase each; the message names the network and all of them."""

    def __init__(self, network: str, phrases: Sequence[str]) -> None:
        start = f"{network}: no rule for " if network else "no rule for "
        super().__init__(start + "; ".join(phrases))
        self.phrases = tuple(phrases)


class CannotLower(Exception):
    """A translator does not cover this use of its op; the message says which."""


@dataclass
class Lowering:
    """State of one translation: the builder, the node of every recorded value, and the type of the call at hand.

    Attributes:
        minus_infinity: by the number of a value, which of its elements are minus infinity whatever the input is, bool
            of its shape. Its node holds zeros there. Translators in ``READS_INFINITY`` alone may read such values.
        lowest: likewise, which elements are the lowest number of their type; their node holds that number.
        made, made_lowest: the same of the outputs of the call at hand, by position; translators fill them.
    """

    builder: Builder
    node_of: dict[int, int] = field(default_factory=dict)
    values: Sequence[Tensor] = ()
    dtype: torch.dtype = torch.float32  # in which the call at hand computes
    widened: set[int] = field(default_factory=set)  # float64 values that hold float32 numbers
    minus_infinity: dict[int, Tensor] = field(default_factory=dict)
    lowest: dict[int, Tensor] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)
    made_lowest: dict[int, Tensor] = field(default_factory=dict)

    def emit(self, op: Op, inputs: Sequence[int], shape: Sequence[int], name: str) -> int:
        """Append a node. A single number, of shape (), is a node of shape (1,): bounds need a dim to index."""
        if shape:
            return self.builder.emit(op, inputs, shape, name)
        if isinstance(op, Sum | Mean):
            full = (1,) * len(self.shape(inputs[0]))
            kept = self.builder.emit(replace(op, keepdim=True), inputs, full, name if len(full) == 1 else f"{name}/all")
            return kept if len(full) == 1 else self.builder.emit(Reshape((1,)), [kept], (1,), name)
        if isinstance(op, Reshape | Gather):
            op = replace(op, shape=(1,))
        return self.builder.emit(op, inputs, (1,), name)

    def captured_shape(self, number: int) -> Shape:
        """The shape that a recorded value has in the network, () for a single number."""
        return tuple(self.values[number].shape) if number < len(self.values) else self.shape(self.node_of[number])

    def param(self, tensor: Tensor, name: str) -> Any:
        return self.builder.param(tensor, name)

    def shape(self, node: int) -> Shape:
        return self.builder.shape(node)

    def node(self, a: Any) -> int | None:
        """The node behind an argument; None for constants."""
        return self.node_of[a.index] if isinstance(a, Ref) else None

    def infinite(self, a: Any) -> Tensor | None:
        """Which elements of an argument are minus infinity; None for none."""
        return self.minus_infinity.get(a.index) if isinstance(a, Ref) else None

    def least(self, a: Any) -> Tensor | None:
        """Which elements of an argument are below all that their type can hold otherwise; None for none."""
        found = [m.get(a.index) for m in (self.minus_infinity, self.lowest)] if isinstance(a, Ref) else []
        masks = [m for m in found if m is not None]
        return masks[0] if len(masks) == 1 else masks[0] | masks[1] if masks else None

    def the_node(self, a: Any) -> int:
        node = self.node(a)
        if node is None:
            raise CannotLower("a constant where a value is needed")
        return node


Translator = Callable[[Lowering, Call], "int | Sequence[int | None]"]


def constant(a: Any) -> Tensor:
    """A constant argument as a float64 tensor of finite numbers."""
    if isinstance(a, Ref):
        raise CannotLower("an operand that depends on the input where a constant is needed")
    return finite(torch.as_tensor(a, dtype=torch.float64))


def finite(c: Tensor) -> Tensor:
    """The same numbers; refused where one is none."""
    if not bool(torch.isfinite(c).all()):
        raise CannotLower("a constant that is not finite")
    return c
