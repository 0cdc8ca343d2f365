"""Ops that no code of the package knows by their class: stand-ins that say the same about themselves, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tests.bounds.nets import Case, case
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp, NonlinearOp, Op, Params, ParamSpec, Relaxation, Shape


@dataclass(frozen=True)
class ForeignAffine(AffineOp):
    """What an affine op has to say, and no more."""

    op: AffineOp

    @property
    def handles(self) -> tuple[Handle, ...]:
        return self.op.handles

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.op.forward(xs, p)

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.op.linear(xs, p)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self.op.magnitude(ms, p)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        return self.op.bias_dot(a, p)

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.op.forward_terms(in_shapes, out_shape)

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.op.backward_terms(in_shapes, out_shape)


@dataclass(frozen=True)
class ForeignNonlinear(NonlinearOp):
    """What a nonlinear op has to say, and no more."""

    op: NonlinearOp

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.op.forward(xs, p)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return self.op.interval(xs, p)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        return self.op.parameters(xs)

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> Relaxation:
        return self.op.relax(xs, params)


def _said(base: type[Op]) -> dict[str, property]:
    """Everything that ops of a kind say about themselves, from the op that is stood in for."""

    def asked(name: str) -> property:
        def get(self: Any) -> Any:
            return getattr(self.op, name)

        return property(get)

    return {name: asked(name) for cls in (base, Op) for name in vars(cls) if not name.startswith("_")}


TwinAffine = dataclass(frozen=True)(type("TwinAffine", (ForeignAffine,), _said(AffineOp)))
TwinNonlinear = dataclass(frozen=True)(type("TwinNonlinear", (ForeignNonlinear,), _said(NonlinearOp)))


def silent(op: Op) -> Op:
    """The same function without any trait."""
    if isinstance(op, AffineOp):
        return ForeignAffine(op)
    return ForeignNonlinear(op) if isinstance(op, NonlinearOp) else op


def twin(op: Op) -> Op:
    """The same function with the same traits."""
    if isinstance(op, AffineOp):
        return TwinAffine(op)
    return TwinNonlinear(op) if isinstance(op, NonlinearOp) else op


def replaced(made: Case, other: Callable[[Op], Op]) -> Case:
    """The same network of other ops."""
    nodes = tuple(replace(node, op=other(node.op)) for node in made.graph.nodes)
    return case(Graph(nodes, made.graph.output, made.graph.parameters), made.box)
