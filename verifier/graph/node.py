"""One op application in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import AffineOp, Op, Params, Shape


@dataclass(frozen=True)
class Input(Op):
    """The network input; node 0 of every graph."""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        raise TypeError("the input node is not evaluated")

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        raise TypeError("the input node is not evaluated")


@dataclass(frozen=True)
class Node:
    """One op application.

    Attributes:
        index: position in ``Graph.nodes``; inputs have smaller indices.
        name: the ONNX tensor's name or the torch module path the value had in the source network.
        op: what it computes.
        inputs: indices of the operands.
        shape: shape of the value for one sample.
    """

    index: int
    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def flops(self) -> float:
        """Multiplications and additions of one forward or backward pass for one row."""
        if isinstance(self.op, AffineOp) and self.op.handles and len(self.op.handles[0].shape) > 1:
            weight = self.op.handles[0].shape
            return 2.0 * math.prod(weight) * max(1, self.size // weight[0])
        return float(self.size)
