"""What ops promise by their traits holds for every sample."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.samples import AFFINE, NONLINEAR, SAMPLES, Sample
from tests.support.device import CONV_FLOAT32, DEVICE
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma
from verifier.graph.linear_forms import Dense, Form, OneHot, Patches, dense, one_window
from verifier.graph.op import AffineOp, NonlinearOp, Pieces, UnaryPlanes

seeds = st.integers(0, 2**31)


def those(samples: list[Sample]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", samples, ids=[s.name for s in samples])


def affine(sample: Sample) -> AffineOp:
    assert isinstance(sample.op, AffineOp)
    return sample.op


def pieces(sample: Sample) -> Pieces | None:
    return sample.op.pieces if isinstance(sample.op, NonlinearOp) else None


def inputs(sample: Sample, seed: int, n: int = 1) -> list[Tensor]:
    """Float64 points in the op's domain."""
    random = torch.Generator().manual_seed(seed)
    xs = [torch.randn((n, *s), generator=random, dtype=torch.float64) for s in sample.in_shapes]
    low, up = sample.domain
    return [(x.abs() + 0.1 if low == 0 else -x.abs() - 0.1 if up == 0 else x).to(DEVICE) for x in xs]


def out_shape(sample: Sample) -> tuple[int, ...]:
    return tuple(sample.op.forward(inputs(sample, 0), sample.params).shape[1:])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


# ---------------------------------------------------------------------------------------------------------- elementwise

ELEMENTWISE = [s for s in SAMPLES if s.op.elementwise]


def test_which_ops_are_elementwise() -> None:
    names = {s.op.kind for s in SAMPLES}
    mixing = {"Linear", "MatMulConstant", "Conv", "ConvTranspose", "Sum", "Mean", "AvgPool", "MatMul", "ExpSum"}
    moving = {"Reshape", "Permute", "Concat", "Gather"}
    assert {s.op.kind for s in ELEMENTWISE} == names - mixing - moving


@those(ELEMENTWISE)
@settings(max_examples=10)
@given(data=st.data(), seed=seeds)
def test_elementwise_outputs_see_the_elements_at_their_place(sample: Sample, data: st.DataObject, seed: int) -> None:
    """Another value of one element changes nothing where broadcasting does not put it."""
    xs, others = inputs(sample, seed), inputs(sample, seed + 1)
    before = sample.op.forward(xs, sample.params)
    i = data.draw(st.integers(0, len(xs) - 1))
    k = data.draw(st.integers(0, xs[i].numel() - 1))
    place = torch.arange(xs[i].numel(), device=DEVICE).reshape(sample.in_shapes[i]).expand(before.shape[1:]) == k
    xs[i] = xs[i].clone()
    xs[i].view(-1)[k] = others[i].view(-1)[k]
    after = sample.op.forward(xs, sample.params)
    assert not ((bits(before) != bits(after))[0] & ~place).any()


# ---------------------------------------------------------------------------------------------------------- affine ops

MOVES = [s for s in AFFINE if affine(s).moves]
EXACT = [s for s in AFFINE if affine(s).exact_weights]
PLAIN = [s for s in AFFINE if affine(s).plain_sums]


def test_which_ops_move() -> None:
    assert {s.op.kind for s in MOVES} == {"Reshape", "Permute", "Concat", "Gather"}


@those(MOVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_moved_elements_are_inputs_or_zero(sample: Sample, dtype: torch.dtype) -> None:
    """Which input an output is shows where inputs are numbered; then it is that one whatever the values are."""
    op, sizes = affine(sample), [math.prod(s) for s in sample.in_shapes]
    total = sum(sizes)
    numbers = (torch.arange(total, device=DEVICE) + 1).to(dtype).split(sizes)
    source = op.forward([n.reshape(1, *s) for n, s in zip(numbers, sample.in_shapes, strict=True)], sample.params)
    index = source.to(torch.int64)
    assert torch.equal(index.to(dtype), source) and bool(((index >= 0) & (index <= total)).all())
    values = torch.cat([x.to(dtype).flatten() for x in inputs(sample, 1)])
    values[:3] = torch.tensor([-0.0, math.inf, 1e-40], dtype=dtype)
    xs = [v.reshape(1, *s) for v, s in zip(values.split(sizes), sample.in_shapes, strict=True)]
    expected = torch.cat([values.new_zeros(1), values])[index]
    assert torch.equal(bits(op.forward(xs, sample.params)), bits(expected))
    shape = tuple(source.shape[1:])
    assert op.forward_terms(sample.in_shapes, shape) == 0


def test_kernels_that_transform_promise_no_plain_sums() -> None:
    """The error bound of the others is tested with the ops, in float32 on every device."""
    assert {s.op.kind for s in AFFINE if s not in PLAIN} == {"Conv", "ConvTranspose"}


def matrix(sample: Sample) -> Tensor:
    """(outputs, all inputs): W in float64, one column per unit vector."""
    op, columns = affine(sample), []
    sizes = [math.prod(s) for s in sample.in_shapes]
    for unit in torch.eye(sum(sizes), dtype=torch.float64, device=DEVICE):
        xs = [u.reshape(1, *s) for u, s in zip(unit.split(sizes), sample.in_shapes, strict=True)]
        columns.append(op.linear(xs, sample.params).flatten())
    return torch.stack(columns, 1)


def stored(sample: Sample) -> set[float]:
    return {v for q in sample.params if q.is_floating_point() for v in q.flatten().tolist()}


def powers() -> set[float]:
    return {0.0, *(s * 2.0**k for k in range(8) for s in (1, -1))}


@those(EXACT)
def test_exact_weights_are_stored_or_powers_of_two(sample: Sample) -> None:
    op, known = affine(sample), stored(sample)
    assert set(matrix(sample).flatten().tolist()) <= known | powers()
    zero = [torch.zeros((1, *s), dtype=torch.float64, device=DEVICE) for s in sample.in_shapes]
    assert set(op.forward(zero, sample.params).flatten().tolist()) <= known | {0.0}


def test_folded_and_divided_weights_are_not_exact() -> None:
    names = {s.name for s in AFFINE} - {s.name for s in EXACT}
    assert {"linear-lead", "scale-folded", "add-broadcast", "mean", "avgpool", "avgpool-divisor"} <= names
    assert {"linear", "matmul-left", "scale-shift", "add", "sum", "gather", "concat"} <= {s.name for s in EXACT}


@those(AFFINE)
@settings(max_examples=5)
@given(seed=seeds)
def test_what_an_op_does_not_call_everything_is_found_by_the_transpose(sample: Sample, seed: int) -> None:
    """With weights of one, the inputs that an op's outputs under a mask depend on get coefficients."""
    op, shape = affine(sample), out_shape(sample)
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3).to(DEVICE)
    ones = tuple(torch.ones_like(q) if q.is_floating_point() else q for q in sample.params)
    if op.reads_all(mask):
        return
    back = op.transpose(mask[None].double(), ones, sample.in_shapes)
    found = torch.cat([b.flatten() != 0 for b in back])
    needed = (matrix(sample)[mask.flatten()] != 0).any(0)
    assert not (needed & ~found).any()


# -------------------------------------------------------------------------------------------------------------- windows


def forms(sample: Sample, seed: int) -> list[Form]:
    """Single elements, single elements as windows where the value is an image, and windows that grew and shrank."""
    shape, random = out_shape(sample), torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    index = torch.randint(0, size, (5,), generator=random)
    values = torch.randn(5, generator=random, dtype=torch.float64)
    values[-1] = 0.0
    one = OneHot(index.to(DEVICE), values.to(DEVICE), shape)
    out: list[Form] = [one]
    window = one_window(one)
    if isinstance(window, Patches):
        out.append(window)
        height, width = shape[-2:]
        kh, kw = min(2, height), min(3, width)
        top = torch.randint(0, height - kh + 1, (5,), generator=random).to(DEVICE)
        left = torch.randint(0, width - kw + 1, (5,), generator=random).to(DEVICE)
        a = torch.randn((2, 5, shape[-3], kh, kw), generator=random, dtype=torch.float64).to(DEVICE)
        out.append(Patches(a, top, left, shape))
    return out


@those(AFFINE)
@settings(max_examples=10)
@given(seed=seeds)
def test_windows_cross_like_dense_rows(sample: Sample, seed: int) -> None:
    op, p = affine(sample), sample.params
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.graph.linear_forms._SMALLEST_PLANE", 1)
        for form in forms(sample, seed):
            crossing = op.window_backward(form, p, sample.in_shapes, torch.float64)
            if crossing is None:
                continue
            a = dense(form)
            torch.testing.assert_close(dense(crossing.form), a, rtol=0, atol=0)
            flat = a.flatten(0, 1)
            expected = op.transpose(flat, p, sample.in_shapes)
            for part, want, shape in zip(crossing.parts, expected, sample.in_shapes, strict=True):
                torch.testing.assert_close(dense(part), want.reshape(*a.shape[:2], *shape), rtol=1e-12, atol=1e-12)
            bias = op.bias_dot(flat, p)
            assert (bias is None) == (crossing.constant is None)
            if bias is not None and crossing.constant is not None:
                torch.testing.assert_close(crossing.constant, bias.reshape(a.shape[:2]), rtol=1e-12, atol=1e-12)


@those(AFFINE)
@settings(max_examples=5)
@given(seed=seeds)
def test_rounding_of_windows_is_within_their_terms(sample: Sample, seed: int) -> None:
    """float32 against float64, as for the transpose of dense rows."""
    op = affine(sample)
    if not (CONV_FLOAT32 or op.plain_sums):
        pytest.skip("float32 convolutions have error bounds on a CPU alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.graph.linear_forms._SMALLEST_PLANE", 1)
        for form in forms(sample, seed):
            narrow = cast(form, torch.float32)
            found = op.window_backward(narrow, sample.cast(torch.float32), sample.in_shapes, torch.float64)
            if found is None:
                continue
            wide, sizes = cast(narrow, torch.float64), cast(narrow, torch.float64, magnitudes=True)
            exact = op.window_backward(wide, sample.params, sample.in_shapes, torch.float64)
            absolute = tuple(q.abs() if q.is_floating_point() else q for q in sample.params)
            size = op.window_backward(sizes, absolute, sample.in_shapes, torch.float64)
            assert exact is not None and size is not None
            # Where single elements pick coefficients, the walk magnitudes the product with theirs besides.
            picked = 2 if isinstance(found.form, OneHot) and found.terms else 0
            rate = gamma(found.terms + picked, torch.float32) * ROUNDING_SAFETY
            for f, e, s in zip(found.parts, exact.parts, size.parts, strict=True):
                error = (dense(f).double() - dense(e)).abs()
                assert bool((error <= rate * dense(s).abs() + 1e-37).all())


def cast(form: Form, dtype: torch.dtype, magnitudes: bool = False) -> Form:
    """The same rows, or their magnitudes, in another dtype."""
    if isinstance(form, OneHot):
        values = form.values.to(dtype)
        return OneHot(form.index, values.abs() if magnitudes else values, form.shape)
    assert isinstance(form, Patches)
    a = form.a.to(dtype)
    return Patches(a.abs() if magnitudes else a, form.top, form.left, form.shape)


def test_ops_that_let_windows_pass() -> None:
    """Which samples let single elements and windows of a large plane cross."""
    crossed: dict[type, set[str]] = {OneHot: set(), Patches: set()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.graph.linear_forms._SMALLEST_PLANE", 1)
        for sample in AFFINE:
            for form in forms(sample, 0):
                if affine(sample).window_backward(form, sample.params, sample.in_shapes, torch.float64) is not None:
                    crossed[type(form)].add(sample.name)
    images = {"conv", "conv-remainder", "conv-image", "scale-shift", "shift-image", "add-image"}
    assert crossed[Patches] == images | {"avgpool", "avgpool-divisor"}
    assert {"linear", "linear-lead", "linear-no-bias", "conv", "conv-remainder", "add", "reshape"} <= crossed[OneHot]
    assert not crossed[OneHot] & {"conv-groups", "conv-1d", "deconv", "add-broadcast", "avgpool-include", "sum", "mean"}


def test_dense_rows_of_a_convolution_become_windows_where_they_are_small() -> None:
    sample = next(s for s in AFFINE if s.name == "conv")
    op, shape = affine(sample), out_shape(sample)
    assert op.seeks_windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verifier.graph.linear_forms._SMALLEST_PLANE", 1)
        a = torch.zeros((1, 2, *shape), dtype=torch.float64, device=DEVICE)
        a[0, 0, ..., 0, 1] = 1.5
        crossing = op.window_backward(Dense(a), sample.params, sample.in_shapes, torch.float64)
        assert crossing is not None and isinstance(crossing.form, Patches)
        assert torch.equal(dense(crossing.form), a)
        everywhere = Dense(torch.ones_like(a))
        assert op.window_backward(everywhere, sample.params, sample.in_shapes, torch.float64) is None
    assert not any(affine(s).seeks_windows for s in AFFINE if s.op.kind not in ("Conv", "ConvTranspose"))


# ----------------------------------------------------------------------------------------------------------- pieces

BENT = [s for s in NONLINEAR if pieces(s) is not None]


def test_which_ops_are_piecewise_linear() -> None:
    assert {type(s.op).__name__ for s in BENT} == {"Relu"}
    assert len(BENT) >= 4
    slopes = [found.negative_slope for s in BENT if (found := pieces(s)) is not None]
    assert slopes == [s.op.negative_slope for s in BENT]  # type: ignore[attr-defined]
    assert Pieces((0.0,), (-1.0, 2.0)).negative_slope is None
    assert Pieces((1.0,), (0.0, 1.0)).negative_slope is None
    assert Pieces((0.0,), (0.0, 1.0), 1.0).negative_slope is None
    assert Pieces((0.0, 1.0), (0.0, 1.0, 0.0)).negative_slope is None


def value(found: Pieces, z: Fraction) -> Fraction:
    """The function in rationals: from the first point along the pieces."""
    points, slopes = [Fraction(p) for p in found.points], [Fraction(s) for s in found.slopes]
    total = Fraction(found.value)
    if z <= points[0]:
        return total + slopes[0] * (z - points[0])
    for slope, (left, right) in zip(slopes[1:], pairwise([*points, z]), strict=False):
        total += slope * (min(z, right) - left) if z > left else 0
        if right >= z:
            break
    return total


@those(BENT)
@settings(max_examples=50)
@given(z=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-149)]))
def test_pieces_are_the_function(sample: Sample, z: float) -> None:
    """Products of two float32 numbers are exact in float64, and so is what the op computes."""
    found = pieces(sample)
    assert found is not None and sample.op.elementwise and len(sample.in_shapes) == 1
    assert len(found.slopes) == len(found.points) + 1 and list(found.points) == sorted(set(found.points))
    y = sample.op.forward([torch.full((1, 1), z, dtype=torch.float64, device=DEVICE)], ())
    assert Fraction(y.item()) == value(found, Fraction(z))


lengths = st.floats(0, 1e4, width=32)


@those(BENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@settings(max_examples=30)
@given(
    ends=st.tuples(st.floats(0, 1e4, width=32), st.floats(0, 1e4, width=32)), share=st.sampled_from([None, 0.0, 1.0])
)
def test_planes_without_a_point_inside_are_the_function(
    sample: Sample, dtype: torch.dtype, ends: tuple[float, float], share: float | None
) -> None:
    found, op = pieces(sample), sample.op
    assert found is not None and isinstance(op, NonlinearOp)
    first, last = found.points[0], found.points[-1]
    low = torch.tensor([[last + min(ends), first - max(ends)]], dtype=dtype, device=DEVICE)
    up = torch.tensor([[last + max(ends), first - min(ends)]], dtype=dtype, device=DEVICE)
    box = [Interval(low, up)]
    specs = op.parameters(box)
    params = None if share is None else {k: s.initial * 0 + (s.low if share == 0 else s.high) for k, s in specs.items()}
    planes = op.relax(box, params)
    assert isinstance(planes, UnaryPlanes)
    for end in (low, up):
        for slope, intercept in (
            (planes.lower_slope, planes.lower_intercept),
            (planes.upper_slope, planes.upper_intercept),
        ):
            for i in range(2):
                z = Fraction(end[0, i].item())
                at = Fraction(slope.expand(1, 1, 2)[0, 0, i].item()) * z
                assert at + Fraction(intercept.expand(1, 1, 2)[0, 0, i].item()) == value(found, z)


@those(NONLINEAR)
@settings(max_examples=10)
@given(seed=seeds)
def test_parallel_planes_hold(sample: Sample, seed: int) -> None:
    op = sample.op
    assert isinstance(op, NonlinearOp)
    first, second = inputs(sample, seed), inputs(sample, seed + 1)
    if 0.0 not in sample.domain:
        first, second = ([x.clamp(*sample.domain) for x in xs] for xs in (first, second))
    box = [Interval(torch.minimum(x, y), torch.maximum(x, y)) for x, y in zip(first, second, strict=True)]
    planes = op.parallel(box)
    random = torch.Generator().manual_seed(seed)
    share = [torch.rand(b.lower.shape, generator=random, dtype=torch.float64).to(DEVICE) for b in box]
    xs = [torch.lerp(b.lower, b.upper, t) for b, t in zip(box, share, strict=True)]
    y = op.forward(xs, ())
    for sign in (1.0, -1.0):
        a = torch.zeros((1, y[0].numel(), *y.shape[1:]), dtype=torch.float64, device=DEVICE)
        a.view(y[0].numel(), -1).fill_diagonal_(sign)
        parts, constant = planes.backward(a)
        line = constant + sum((part * x[:, None]).flatten(2).sum(-1) for part, x in zip(parts, xs, strict=True))
        assert bool((line <= sign * y.flatten(1) + 1e-9 * (1 + y.abs().flatten(1))).all())
    slope = None if (found := pieces(sample)) is None else found.negative_slope
    if slope is not None and 0 <= slope <= 1:
        assert isinstance(planes, UnaryPlanes)
        assert torch.equal(planes.lower_slope, planes.upper_slope)


# ------------------------------------------------------------------------------------------------------------- cuts


def test_which_ops_can_be_split_nowhere() -> None:
    assert {s.op.kind for s in NONLINEAR if nonlinear(s).cuts is None} == {"ExpSum", "Single", "Within"}
    kinks = {s.op.kind for s in NONLINEAR if (cuts := nonlinear(s).cuts) is not None and not cuts.anywhere}
    assert kinks == {"Relu", "LeakyRelu", "Sign", "Heaviside"}


def nonlinear(sample: Sample) -> NonlinearOp:
    assert isinstance(sample.op, NonlinearOp)
    return sample.op


@those([s for s in NONLINEAR if nonlinear(s).cuts is not None])
@settings(max_examples=5)
@given(seed=seeds)
def test_gains_of_cuts_are_numbers(sample: Sample, seed: int) -> None:
    """One for every element of the input, none of them negative."""
    op, first, second = nonlinear(sample), inputs(sample, seed, 2), inputs(sample, seed + 1, 2)
    box = [Interval(torch.minimum(x, y), torch.maximum(x, y)) for x, y in zip(first, second, strict=True)]
    a = torch.randn((2, 1, *out_shape(sample)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i, b in enumerate(box):
        at = b.lower / 2 + b.upper / 2
        gains = op.cut_gains(i, at, box, a.to(DEVICE), [x[:, None] for x in first])
        assert gains.shape == at.shape and bool((gains >= 0).all()) and bool(torch.isfinite(gains).all())
