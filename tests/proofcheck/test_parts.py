"""The checker's parts: arithmetic, lines around functions, ONNX nodes against onnxruntime, properties."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from proofcheck import network, vnnlib
from proofcheck.arithmetic import Dyadic, Exact, Float, FloatTotal, dyadic
from proofcheck.bounds import Forward, Sizes, intervals, linear_bounds, new_total, unstable
from proofcheck.failures import NotCovered, Refused
from proofcheck.forest import leaves
from proofcheck.network import Affine, Unary
from proofcheck.relaxation import _derivative, _exp, _value, default_slopes, intercepts
from tests.proofcheck.build import Mlp, property_file, save

RNG = np.random.default_rng(0)


def _fractions(x: object) -> list[Fraction]:
    return [Fraction(int(n)) * Fraction(2) ** x.e for n in x.n.ravel()]  # type: ignore[attr-defined]


def test_dyadic_numbers_are_the_float64_numbers_and_are_rounded_to_the_asked_side() -> None:
    x = np.array([0.0, 1.0, -0.75, 1e-300, 3.0e5, 2.0**-1074, -1.1])
    assert _fractions(dyadic(x)) == [Fraction(float(v)) for v in x]
    third = dyadic(x) * dyadic(np.array([1.1])) + dyadic(np.array([1e-20]))
    for low, value, up in zip(third.floats(-1), _fractions(third), third.floats(1), strict=True):
        assert Fraction(float(low)) <= value <= Fraction(float(up))
        assert up <= np.nextafter(np.nextafter(low, np.inf), np.inf)


@pytest.mark.parametrize("function", ["exp", "sigmoid", "tanh", "square", "reciprocal"])
def test_values_and_derivatives_are_within_their_errors(function: str) -> None:
    x = np.concatenate([RNG.uniform(-30, 30, 300), RNG.uniform(-1e-3, 1e-3, 50), [0.0, 40.0, -40.0]])
    x = np.abs(x) + 1e-3 if function == "reciprocal" else x
    exact = {
        "exp": (mpmath.exp, mpmath.exp), "square": (lambda v: v * v, lambda v: 2 * v),
        "tanh": (mpmath.tanh, lambda v: mpmath.sech(v) ** 2),
        "sigmoid": (lambda v: 1 / (1 + mpmath.exp(-v)), lambda v: 1 / (2 + mpmath.exp(-v) + mpmath.exp(v))),
        "reciprocal": (lambda v: 1 / v, lambda v: -1 / v**2),
    }[function]  # fmt: skip
    with mpmath.workdps(60):
        for made, truth in zip((_value, _derivative), exact, strict=True):
            for v, f, error in zip(x, *made(function, x), strict=True):
                assert abs(mpmath.mpf(float(f)) - truth(mpmath.mpf(float(v)))) <= float(error)
        assert all(
            abs(mpmath.mpf(float(f)) / mpmath.exp(float(v)) - 1) < 2.0**-46 for v, f in zip(x, _exp(x), strict=True)
        )


PIECES = [
    ((0.0,), (0.0, 1.0), 0.0),
    ((0.0,), (0.01, 1.0), 0.0),
    ((-0.5, 1.0), (0.0, 1.0, 0.0), -0.5),
    ((0.0,), (1.0, 0.0), 0.0),
]


@pytest.mark.parametrize("ar", [Float(), Exact()], ids=["float", "exact"])
@pytest.mark.parametrize("pieces", PIECES)
def test_lines_around_piecewise_linear_functions(ar: object, pieces: tuple) -> None:
    knots, slopes, first = pieces
    step = Unary("h", "z", "linear pieces", knots, slopes, first)
    l = RNG.uniform(-2, 1.5, (1, 200))
    u = l + RNG.uniform(0, 2, l.shape) * (RNG.random(l.shape) < 0.9)
    for low, up in (default_slopes(step, l, u), (RNG.uniform(-1, 2, l.shape), RNG.uniform(0, 1, l.shape))):
        b, t = intercepts(ar, step, l, u, low, up)
        b, t = ((v, v) if isinstance(v, np.ndarray) else (v.floats(-1), v.floats(1)) for v in (b, t))
        for share in np.linspace(0, 1, 41):
            x = np.clip(l + share * (u - l), l, u)
            f = np.interp(x, knots, first + np.cumsum([0, *(np.diff(knots) * slopes[1:-1])]))
            f = f + slopes[0] * np.minimum(x - knots[0], 0) + slopes[-1] * np.maximum(x - knots[-1], 0)
            assert (low * x + b[0] <= f + 1e-14).all()
            assert (up * x + t[1] >= f - 1e-14).all()


@pytest.mark.parametrize("function", ["exp", "sigmoid", "tanh", "square", "reciprocal"])
@pytest.mark.parametrize("steep", [False, True])
def test_lines_around_smooth_functions(function: str, steep: bool) -> None:
    step = Unary("h", "z", function)
    l = RNG.uniform(-4, 3, 300) if function != "reciprocal" else RNG.uniform(0.1, 3, 300)
    u = l + RNG.uniform(0, 3, 300)
    low, up = default_slopes(step, l, u) if not steep else (RNG.uniform(-0.2, 0.6, 300), RNG.uniform(-0.2, 0.6, 300))
    b, t = intercepts(Float(), step, l, u, low, up)
    for share in np.linspace(0, 1, 41):
        x = np.clip(l + share * (u - l), l, u)
        f, error = _value(function, x)
        assert (low * x + b <= f + error + 1e-13).all()
        assert (up * x + t >= f - error - 1e-13).all()
    if function == "reciprocal":
        assert np.isnan(intercepts(Float(), step, l * 0 - 1.0, u, low, up)[0]).all(), "no line across the pole"
    elif not steep:
        assert (t - b < 30).all()


@pytest.mark.parametrize("pieces", PIECES[1:])
def test_float_intercepts_are_outside_exact_ones(pieces: tuple) -> None:
    step = Unary("h", "z", "linear pieces", *pieces)
    l = RNG.uniform(-2, 1.5, (1, 500)) * 0.1
    u = l + RNG.uniform(0, 0.3, l.shape)
    low, up = RNG.uniform(-1, 2, l.shape), RNG.uniform(-1, 1, l.shape)
    (b, t), (c, d) = (intercepts(ar, step, l, u, low, up) for ar in (Float(), Exact()))
    for x, y in ((b, c), (d, t)):
        x, y = ((v if isinstance(v, Dyadic) else dyadic(v)) for v in (x, y))
        gap = [float(q - p) for p, q in zip(_fractions(x), _fractions(y), strict=True)]
        assert min(gap) >= 0 and max(gap) < 1e-13


def test_a_total_knows_its_errors() -> None:
    """Each kind of error is at least its bound, at most four times that, and makes the total smaller."""
    n, u = 40, 2.0**-53
    a, x, y = RNG.normal(size=(2, 3, n)), RNG.normal(size=n), RNG.normal(size=(2, 1, n))
    products = np.abs(a * np.where(a > 0, x, y))
    for do, least in (
        (lambda t: t.add(a[..., 0]), u * np.abs(a[..., 0])),
        (lambda t: t.dot(a, x, x), u * n * (np.abs(a) @ np.abs(x))),
        (lambda t: t.dot(a, x, y), u * n * products.sum(-1)),
        (lambda t: t.rounded(a, np.abs(x)), u * (np.abs(a) @ np.abs(x))),
        (lambda t: t.lose(a, np.abs(x)), np.abs(a) @ np.abs(x)),
    ):
        total = FloatTotal((2, 3), 1.0)
        for _ in range(2):
            before = total.error
            do(total)
            assert (total.error - before >= least * (1 - 1e-9)).all()
            assert (total.error - before <= 4.0 * least + 10 * u * np.abs(total.value)).all()
        assert (total.lower() <= total.value - total.error).all() and (total.lower() < total.value).all()
    assert FloatTotal((1, 1), 1e6).error[0, 0] > 2.0**-1000 * 1e6
    total = FloatTotal((1, 3), 0.0)
    total.value[:] = [[np.nan, np.inf, 0.0]]
    assert not total.at_least(np.full((1, 3), -1.0))[0, :2].any() and total.at_least(np.full((1, 3), -1.0))[0, 2]
    assert not total.at_least(np.full((1, 3), np.nan)).any() and not total.above(np.full((1, 3), -np.inf)).any()


def test_reach_of_steps_and_forward_functions(tmp_path: Path) -> None:
    net = network.load(Mlp(np.random.default_rng(3), [4, 12, 3]).save(tmp_path / "n.onnx"))
    low, up = np.full((1, 4), -1.0 / 3), np.full((1, 4), 0.7)
    sizes = Sizes(net, intervals(Float(), net, {net.input: (low, up)}))
    step = net.steps[0]
    reach, loose = sizes.reach(step)  # type: ignore[arg-type]
    w = np.abs(step.terms[0][1].weight)  # type: ignore[union-attr]
    assert loose is None and (reach >= 12 * (sizes.of[net.input] @ w) * (1 - 1e-9)).all()
    forward, c = Forward(Float(), net, low, up), RNG.normal(size=(1, 4, 200))
    truth = Exact.of(np.abs(c)) * dyadic(forward.radius)
    exact = _fractions(Dyadic(truth.n.sum(1), truth.e))
    assert all(Fraction(float(r)) >= t for r, t in zip(forward._reach(c)[0], exact, strict=True))
    assert (forward.radius[0, :, 0] >= 0.5 * (0.7 + 1.0 / 3)).all()


def test_float_bounds_are_below_exact_ones_and_close(tmp_path: Path) -> None:
    net = network.load(Mlp(np.random.default_rng(3), [4, 12, 12, 12, 3]).save(tmp_path / "n.onnx"))
    box = {net.input: (np.full((2, 4), -1.0 / 3), np.array([[0.7] * 4, [0.1] * 4]))}
    for make in (lambda ar: None, lambda ar: Forward(ar, net, *box[net.input]), lambda ar: unstable(ar, net)):
        found = [intervals(ar, net, box, hook=make(ar)) for ar in (Float(), Exact())]
        for name in net.sizes:
            (a, b), (c, d) = (f[name] for f in found)
            room = 1e-12 if make(Float()) else 0.0  # slopes follow from bounds, which are not quite the same
            assert (a <= c + room).all() and (d <= b + room).all()
            np.testing.assert_allclose(np.stack([a, b]), np.stack([c, d]), atol=1e-9)
        sizes, eye = Sizes(net, found[0]), np.broadcast_to(np.eye(3), (2, 3, 3))
        totals = []
        for ar in (Float(), Exact()):
            total = new_total(ar, sizes, (2, 3))
            linear_bounds(ar, sizes, found[0], {net.output: ar.of(eye)}, total, default_slopes)
            totals.append(total.lower())
        assert (totals[0] <= totals[1]).all()
        np.testing.assert_allclose(*totals, atol=1e-9)


def test_holes_and_leftovers_in_trees_are_seen() -> None:
    good = np.array([0, -1, 1, -1, -1, -1])
    assert [b.tree.tolist() for b in leaves(good, 2, 2, "x")] == [[0, 0], [0, 1]]
    batch = next(leaves(good, 2, 10, "x"))
    assert batch.split.tolist() == [0, 0, 1, 0, 1] and batch.upper.tolist() == [False, True, False, True, True]
    for nodes, trees in (
        ([0, -1], 1),
        ([0, -1, -1, -1], 1),
        ([], 1),
        ([-1], 2),
        ([-2], 1),
        ([0] * 20000 + [-1] * 20001, 1),
    ):
        with pytest.raises(Refused):
            list(leaves(np.array(nodes, np.int64), trees, 100, "x"))


NODES = {
    "Conv": (([helper.make_node("Conv", ["x", "w", "b"], ["out"], strides=[2, 1], pads=[1, 0, 1, 1], group=2)]),
             {"w": RNG.normal(size=(4, 1, 3, 2)), "b": RNG.normal(size=4)}, [1, 2, 5, 6]),
    "AveragePool": ([helper.make_node("AveragePool", ["x"], ["out"], kernel_shape=[3, 2], pads=[1, 0, 1, 0])],
                    {}, [1, 2, 5, 6]),
    "MaxPool": ([helper.make_node("MaxPool", ["x"], ["out"], kernel_shape=[2, 2], strides=[2, 2])], {}, [1, 2, 4, 6]),
    "BatchNormalization": ([helper.make_node("BatchNormalization", ["x", "a", "a", "b", "a"], ["out"])],
                           {"a": RNG.uniform(0.5, 2, 2), "b": RNG.normal(size=2)}, [1, 2, 4, 3]),
    "Mul and Div": ([helper.make_node("Mul", ["c", "x"], ["y"]), helper.make_node("Div", ["y", "d"], ["out"])],
                    {"c": RNG.normal(size=(2, 1)), "d": RNG.uniform(1, 2, (1, 3))}, [1, 2, 3]),
    "Sub and Max": ([helper.make_node("Sub", ["c", "x"], ["y"]), helper.make_node("Max", ["y", "x"], ["out"])],
                    {"c": RNG.normal(size=(2, 3))}, [1, 2, 3]),
    "MatMul": ([helper.make_node("MatMul", ["x", "w"], ["out"])], {"w": RNG.normal(size=(3, 2))}, [1, 2, 3]),
    "LeakyRelu": ([helper.make_node("LeakyRelu", ["x"], ["out"], alpha=0.1)], {}, [1, 4]),
    "Clip": ([helper.make_node("Clip", ["x", "l", "u"], ["out"])], {"l": np.array(-0.3), "u": np.array(0.4)}, [1, 4]),
    "Abs": ([helper.make_node("Abs", ["x"], ["out"])], {}, [1, 4]),
    "Sigmoid": ([helper.make_node("Sigmoid", ["x"], ["out"])], {}, [1, 4]),
    "moves": ([
        helper.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 1]), helper.make_node("Reshape", ["a", "shape"], ["b"]),
        helper.make_node("Slice", ["b", "one", "far", "one"], ["c"]),
        helper.make_node("Split", ["c", "parts"], ["d", "e"], axis=1),
        helper.make_node("Concat", ["e", "k", "d"], ["f"], axis=1), helper.make_node("Unsqueeze", ["f", "one"], ["g"]),
        helper.make_node("Gather", ["g", "pick"], ["h"], axis=2), helper.make_node("Pad", ["h", "pads"], ["out"])],
        {"shape": np.array([1, -1]), "one": np.array([1]), "far": np.array([99]), "parts": np.array([2, 3]),
         "k": np.ones((1, 2)),
         "pick": np.array([3, 0, 3, -1]), "pads": np.array([0, 0, 1, 0, 0, 2])}, [1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_nodes_mean_what_onnxruntime_computes(tmp_path: Path, name: str) -> None:
    """Values from the steps, and intervals around values at points of a box."""
    nodes, initial, shape = NODES[name]
    initial = {n: v if v.dtype.kind == "i" else v.astype(np.float32) for n, v in initial.items()}
    path = save(tmp_path / "n.onnx", nodes, initial, shape, ["a"])
    session = _session(path)
    net = network.load(path)
    x = RNG.uniform(-1, 1, (20, *shape[1:])).astype(np.float32)
    box = {net.input: (x.reshape(20, -1).min(0)[None].astype(float), x.reshape(20, -1).max(0)[None].astype(float))}
    found = [intervals(ar, net, box) for ar in (Float(), Exact())]
    for one in x:
        truth = session.run(None, {"x": one[None]})[0].ravel()
        np.testing.assert_allclose(_run(net, one.ravel().astype(float)), truth, atol=1e-5)
        for bounds in found:
            low, up = bounds[net.output]
            assert (low[0] <= truth + 1e-5).all() and (truth - 1e-5 <= up[0]).all()


def _session(path: Path) -> onnxruntime.InferenceSession:
    model = onnx.load(str(path))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, str(path))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _run(net: network.Network, x: np.ndarray) -> np.ndarray:
    values = {net.input: x[None]}
    for step in net.steps:
        if isinstance(step, Affine):
            values[step.out] = sum(m.apply(m.weight, values[n]) for n, m in step.terms) + (
                0 if step.bias is None else step.bias
            )
        elif step.knots:
            z = values[step.source]
            ends = step.first + np.cumsum([0, *(np.diff(step.knots) * step.slopes[1:-1])])
            values[step.out] = np.interp(z, step.knots, ends) + step.slopes[0] * np.minimum(z - step.knots[0], 0) + (
                step.slopes[-1] * np.maximum(z - step.knots[-1], 0))  # fmt: skip
        else:
            values[step.out] = _value(step.function, values[step.source])[0]
    return values[net.output][0]


def test_an_unknown_node_is_not_covered(tmp_path: Path) -> None:
    path = save(tmp_path / "n.onnx", [helper.make_node("Erf", ["x"], ["out"])], {}, [1, 2], [1, 2])
    with pytest.raises(NotCovered, match="Erf"):
        network.load(path)


def test_cases_of_a_property(tmp_path: Path) -> None:
    text = "(or (and (<= X_0 0.1) (>= Y_0 (* 2 Y_1))) (and (>= X_0 2) (> Y_0 1)) (<= (+ Y_0 Y_1) 0.3))"
    prop = vnnlib.load(property_file(tmp_path / "p", np.array([0.0]), np.array([1.0]), 2, text))
    assert [c.empty for c in prop.cases] == [False, True, False]
    first, second, third = prop.cases
    assert first.upper[0] == np.nextafter(0.1, 1) or Fraction(float(first.upper[0])) >= Fraction("0.1")
    assert first.rows[0].parts == {("Y", 0): -1, ("Y", 1): 2} and first.rows[0].d == 0
    assert second.rows[0].strict and third.rows[0].parts == {("Y", 0): 1, ("Y", 1): 1}
    assert third.rows[0].d == Fraction("0.3")
    for bad in ("(<= Y_2 0)", "(<= Y_0)", "(<= Y_0 nan)", "(<= Y_0 1", "(<= Y_0 1))"):
        with pytest.raises((Refused, NotCovered)):
            vnnlib.load(property_file(tmp_path / "p", np.array([0.0]), np.array([1.0]), 2, bad))
