"""The kit for ops finds what is wrong with an op, and nothing wrong with ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import mpmath
import pytest
import torch
from torch import Tensor

from tests.ops.samples import AFFINE, NONLINEAR
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.op import AffineOp, NonlinearOp, Params, ParamSpec, Shape, UnaryPlanes
from verifier.ops.bent import BentOp, Cos, Gelu, Silu, Sin
from verifier.ops.curves import Curve, CurveOp
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu
from verifier.ops.sigmoid import TANH, Tanh
from verifier.testing import Sample, check_op, checks, sample

BY_NAME = {s.name: s for s in [*AFFINE, *NONLINEAR]}
OURS = ["linear", "conv-groups", "gather", "add-broadcast", "avgpool-include", "mul-broadcast", "bilinear", "Floor-25"]


@pytest.mark.parametrize("check", checks([BY_NAME[name] for name in OURS if name in BY_NAME], examples=4), ids=str)
def test_ours_pass(check: Callable[[], None]) -> None:
    check()


def test_one_call_checks_everything() -> None:
    check_op(Tanh(), exact=mpmath.tanh, examples=4)
    check_op(Relu, replace(BY_NAME["Relu-0"], exact=lambda z: max(z, 0)), examples=4)
    check_op(Linear, sample("mine", Linear, (5,), weight=torch.randn(4, 5).double()), examples=4)


@pytest.mark.parametrize("op", [Silu, Gelu, Sin, Cos])
def test_a_class_without_arguments_will_do(op: type[BentOp]) -> None:
    check_op(op, examples=6)


@dataclass(frozen=True)
class _Shallow(Silu):
    """The smallest value is -0.27846454...; this is 1.9e-7 above it, which only points near the minimum tell."""

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(torch.where(low == self.minimum[2], -0.27846435, low), up)


def test_extremes_are_looked_for() -> None:
    silu = Sample("silu", Silu(), ((2, 3),), exact=lambda z: z / (1 + mpmath.exp(-z)))
    check_op(Silu(), silu, examples=6)
    with pytest.raises(AssertionError, match="is not in"):
        check_op(_Shallow(), replace(silu, op=_Shallow()), examples=6)


def test_names_say_op_and_property() -> None:
    names = list(map(str, checks([BY_NAME["linear"], BY_NAME["Tanh-5"]])))
    assert {"linear-transpose-is-vjp", "linear-interval", "Tanh-5-planes", "Tanh-5-exact-planes"} <= set(names)
    assert {"Tanh-5-float32-accuracy", "Tanh-5-float64-accuracy"} <= set(names) and len(set(names)) == len(names)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear cannot be made without arguments"):
        check_op(Linear)
    with pytest.raises(TypeError, match="samples"):
        check_op(Linear(Handle("w", (2, 2))))
    with pytest.raises(TypeError, match="is of"):
        check_op(Relu(), Sample("x", Tanh(), ((2,),)))


# ----------------------------------------------------------------------------------------------- ops with a mistake


@dataclass(frozen=True)
class _Curve(CurveOp):
    """tanh, with something changed."""

    name: str = ""

    @property
    def curve(self) -> Curve:
        return _CURVES[self.name]


_CURVES = {
    "value": replace(TANH, value=lambda z: torch.tanh(z) * (1 + 1e-4)),
    "slope": replace(TANH, slope=lambda z: TANH.slope(z) * 1.01),
    "inflection": replace(TANH, inflection=1.0),
    "accuracy": replace(TANH, ulps=0.01),
    "bend": replace(TANH, bend=lambda z: 2 * TANH.bend(z)),
}


@dataclass(frozen=True)
class _Planes(NonlinearOp):
    """|z| with constant planes, or with mistakes."""

    mistake: str = ""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].abs()

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = xs[0]
        most = torch.maximum(low.abs(), up.abs())
        return Interval(low.abs() if self.mistake == "interval" else torch.zeros_like(low), most)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        return {"s": ParamSpec(torch.zeros_like(xs[0].lower)[:, None], -1.0, 1.0)}

    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> UnaryPlanes:
        s = (params or {k: v.initial for k, v in self.parameters(xs).items()})["s"]
        zero = torch.zeros_like(s)
        most = self.interval(xs, ()).upper[:, None] + zero
        if self.mistake == "upper":
            most = most * 0.99
        if self.mistake == "nan":
            most = most - xs[0].lower[:, None] + xs[0].lower[:, None]
        if self.mistake == "slope":
            s = s * 1.1
        one = {"s": (torch.ones_like(s) * (2 if self.mistake == "gradient" else 1), zero)}
        return UnaryPlanes(s, zero, zero, most, one)


@dataclass(frozen=True)
class _Affine(AffineOp):
    """2 x + 1, with mistakes."""

    mistake: str = ""

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0] * (2.0 if self.mistake != "rounds" else 2.1) + 1

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (a * (3.0 if self.mistake == "transpose" else 2.0 if self.mistake != "rounds" else 2.1),)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        return None if self.mistake == "bias" else a.flatten(1).sum(1)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return ms[0] * (1.9 if self.mistake == "magnitude" else 2.1 if self.mistake == "rounds" else 2.0) + 1

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 0 if self.mistake == "terms" else 2

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 0 if self.mistake == "rounds" else 1

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        found = super().interval(xs, p)
        return Interval(found.lower, found.upper - 0.05) if self.mistake == "narrow" else found


FAULTY = [
    *(_Curve(name) for name in _CURVES),
    *(_Planes(m) for m in ("interval", "upper", "nan", "slope", "gradient")),
    *(_Affine(m) for m in ("transpose", "bias", "magnitude", "terms", "rounds", "narrow")),
]
EXACT = {_Curve: mpmath.tanh, _Planes: abs}


def test_the_same_ops_without_a_mistake_pass() -> None:
    check_op(_Planes(), exact=abs)
    check_op(_Affine())


@pytest.mark.parametrize("op", FAULTY, ids=str)
def test_mistakes_are_found(op: NonlinearOp | AffineOp) -> None:
    with pytest.raises(AssertionError):
        check_op(op, exact=EXACT.get(type(op)))
