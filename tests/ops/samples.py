"""At least one instance of every op class: op, input shapes, parameters. Other tests run over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.ops.exact import ADDED, UNARY
from tests.support.device import DEVICE
from verifier.graph.op import AffineOp, NonlinearOp, Op, Shape
from verifier.ops.add import Add
from verifier.ops.conv import Conv
from verifier.ops.exp_sum import ExpSum
from verifier.ops.linear import Linear, MatMulConstant
from verifier.ops.product import MatMul, Mul
from verifier.ops.reduce import AvgPool, Mean, Sum
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Concat, Gather, Permute, Reshape, inverse_index
from verifier.ops.within import Within
from verifier.testing import Sample, sample


def _given(name: str, make: Callable[..., Op], in_shapes: tuple[Shape, ...], **tensors: Tensor) -> Sample:
    """A sample whose op takes handles for ``tensors``, in field order."""
    return sample(name, make, *in_shapes, **tensors)


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 values held as float64, so that casting them changes nothing."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def _conv(name: str, shape: Shape, weight: tuple[int, ...], bias: bool = True, **options: object) -> Sample:
    tensors = {"weight": _random(*weight)}
    if bias:
        out = weight[1] * options.get("groups", 1) if options.get("transposed") else weight[0]  # type: ignore[operator]
        tensors["bias"] = _random(int(out), seed=1)  # type: ignore[call-overload]
        tensors["bias_magnitude"] = tensors["bias"].abs() + 0.5
    return _given(name, partial(Conv, **options), (shape,), **tensors)  # type: ignore[arg-type]


def _large(n: int) -> Tensor:
    return _random(n).abs() + 2


_INDEX = torch.tensor([0, 3, -1, 5, 3, 3, -1, 1, 4, 0])
_PICK = torch.tensor([4, 0, -1, 2, 5])

AFFINE: list[Sample] = [
    *(s for s in ADDED if isinstance(s.op, AffineOp)),
    _given("linear", Linear, ((5,),), weight=_random(4, 5), bias=_random(4)),
    _given(
        "linear-lead", Linear, ((1, 3, 5),), weight=_random(4, 5), bias=_random(4), bias_magnitude=_random(4).abs() + 2
    ),
    _given("linear-no-bias", Linear, ((1, 5),), weight=_random(4, 5)),
    _given("matmul-right", MatMulConstant, ((1, 3, 5),), weight=_random(5, 2)),
    _given("matmul-left", partial(MatMulConstant, left=True), ((2, 3, 5),), weight=_random(4, 3)),
    _given("matmul-batched", MatMulConstant, ((2, 3, 5),), weight=_random(2, 5, 2)),
    _given("matmul-widening", MatMulConstant, ((3, 5),), weight=_random(2, 5, 2)),
    _given("matmul-wider-batch", MatMulConstant, ((1, 3, 5),), weight=_random(4, 5, 2)),
    _conv("conv", (1, 3, 6, 5), (4, 3, 3, 2), stride=(2, 1), padding=(1, 0)),
    _conv("conv-groups", (4, 7, 7), (6, 2, 3, 3), groups=2, dilation=(2, 2), padding=(2, 2)),
    _conv("conv-remainder", (1, 2, 8, 9), (3, 2, 2, 3), bias=False, stride=(3, 2)),
    _conv("conv-image", (2, 12, 11), (3, 2, 3, 2), padding=1),
    _conv("conv-1d", (1, 2, 9), (3, 2, 3), dims=1, stride=2, padding=1),
    _conv("conv-3d", (1, 2, 3, 4, 5), (2, 2, 2, 2, 2), dims=3),
    _conv("deconv", (1, 3, 4, 4), (3, 2, 3, 3), transposed=True, stride=2, padding=1, output_padding=1),
    _conv("deconv-groups", (1, 4, 3, 3), (4, 2, 2, 3), transposed=True, groups=2, dilation=(2, 1)),
    _conv("deconv-1d", (1, 2, 5), (2, 3, 4), transposed=True, dims=1, stride=3),
    _given("scale-shift", ScaleShift, ((1, 3, 4),), scale=_random(3, 1), shift=_random(3, 4)),
    _given(
        "scale-folded", ScaleShift, ((3, 4),), scale=_random(4), shift=_random(4), shift_magnitude=_random(4).abs() + 3
    ),
    _given("shift", ScaleShift, ((3,),), shift=_random(2, 3)),
    _given("shift-image", ScaleShift, ((2, 5, 6),), shift=_random(2, 1, 1)),
    _given("scale-wide", ScaleShift, ((1, 3),), scale=_random(4, 3)),
    Sample("scale-nothing", ScaleShift(), ((2,),)),
    Sample("add", Add((1.0, -1.0)), ((2, 3), (2, 3))),
    Sample("add-broadcast", Add((1.0, 2.5, -1.0)), ((2, 3), (3,), (2, 1))),
    Sample("add-image", Add((1.0, -2.0)), ((2, 5, 6), (2, 5, 6))),
    Sample("reshape", Reshape((3, 2)), ((1, 6),)),
    Sample("permute", Permute((2, 0, 1)), ((2, 3, 4),)),
    Sample("permute-negative", Permute((0, -1, 1)), ((2, 3, 4),)),
    Sample("concat", Concat(1), ((2, 3), (2, 1))),
    Sample("concat-last", Concat(-1), ((2, 3), (2, 1), (2, 2))),
    _given("gather", partial(Gather, shape=(2, 5)), ((2, 3),), index=_INDEX),
    _given("gather-inverse", partial(Gather, shape=(2, 5)), ((2, 3),), index=_INDEX, inverse=inverse_index(_INDEX, 6)),
    _given("gather-injective", partial(Gather, shape=(5,)), ((6,),), index=_PICK, inverse=inverse_index(_PICK, 6)),
    Sample("sum", Sum((1,)), ((2, 3, 4),)),
    Sample("sum-keep", Sum((0, -1), keepdim=True), ((2, 3, 4),)),
    Sample("mean", Mean((0, 2)), ((2, 3, 4),)),
    Sample("mean-keep", Mean((-1,), keepdim=True), ((2, 3),)),
    Sample("avgpool", AvgPool((2, 2)), ((1, 2, 4, 6),)),
    Sample("avgpool-overlap", AvgPool((3, 2), (2, 1), (1, 1), True, False), ((2, 6, 5),)),
    Sample("avgpool-include", AvgPool((3, 3), (2, 2), (1, 1), True, True), ((1, 2, 6, 6),)),
    Sample("avgpool-divisor", AvgPool((2, 2), divisor_override=3), ((1, 2, 4, 4),)),
    Sample("avgpool-1d", AvgPool((3,), (2,), (1,)), ((1, 2, 7),)),
    Sample("avgpool-3d", AvgPool((2, 2, 2), (1, 1, 1)), ((1, 2, 3, 3, 3),)),
]

NONLINEAR: list[Sample] = [
    Sample("exp-sum", ExpSum(1), ((2, 3, 2),)),
    Sample("exp-sum-last", ExpSum(-1), ((2, 3),)),
    Sample("within", Within(0.0, math.inf), ((2, 3),), (), (0.0, math.inf)),
    Sample("within-both", Within(-0.75, 0.5), ((2, 3),), (), (-0.75, 0.5)),
    *(Sample(f"{op.kind}-{i}", op, ((2, 3),), (), domain, exact) for i, (op, exact, domain) in enumerate(UNARY)),
    *(s for s in ADDED if isinstance(s.op, NonlinearOp) and s.exact is None),
    Sample("mul", Mul(), ((2, 3), (2, 3))),
    Sample("mul-broadcast", Mul(), ((2, 3), (3,))),
    Sample("mul-outer", Mul(), ((3, 1), (1, 2))),
    Sample("bilinear", MatMul(), ((2, 3), (3, 2))),
    Sample("bilinear-batched", MatMul(), ((2, 2, 3), (2, 3, 1))),
]

AFFINE, NONLINEAR = ([s.to(DEVICE) for s in samples] for samples in (AFFINE, NONLINEAR))
SAMPLES = [*AFFINE, *NONLINEAR]
assert all(isinstance(s.op, AffineOp) for s in AFFINE)
assert all(isinstance(s.op, NonlinearOp) for s in NONLINEAR)
