"""Planes of single ops on random boxes against exact values, and backward passes of affine ops against forward ones.

Boxes are tiny and huge, reach to and over the places where a function bends or jumps, and are single points too;
optimised parameters are anywhere, also outside of their limits where every value has to be sound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import mpmath
import numpy as np

from scripts.fuzzing import checks, frontend

_MP = mpmath.mp.clone()
_MP.dps = 90
_Number = Any  # Fraction, or a number of many digits


# ------------------------------------------------------------------------------------------------- functions, exactly


def _digits(z: Fraction) -> Any:
    return _MP.mpf(z.numerator) / z.denominator


def _softplus(z: Any) -> Any:
    return _MP.log1p(_MP.exp(z)) if z < 0 else z + _MP.log1p(_MP.exp(-z))


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + _MP.exp(-z)) if z > 0 else _MP.exp(z) / (1 + _MP.exp(z))


def _power(e: float) -> Callable[[Any], Any]:
    return lambda z: z ** int(e) if float(e).is_integer() else _MP.power(z, e)


def _sign(z: Fraction) -> Fraction:
    return Fraction((z > 0) - (z < 0))


def _single(z: Fraction) -> Fraction:
    with np.errstate(over="ignore"):
        return Fraction(float(np.float32(float(z))))  # the value is a double, or a float32 number


# Name of an op class: makes one, its function, whether that is exact in rationals, and where it is defined.
UNARY: dict[str, tuple[Callable[[np.random.Generator], dict[str, Any]], Callable[..., _Number], bool, float]] = {}


def _unary(
    name: str,
    function: Callable[..., _Number],
    exact: bool = False,
    start: float = -np.inf,
    fields: Callable[[np.random.Generator], dict[str, Any]] = lambda rng: {},
) -> None:
    UNARY[name] = (fields, function, exact, start)


_unary("Relu", lambda z, op: max(z, z * Fraction(op.negative_slope)) if op.negative_slope <= 1 else z, True,
       fields=lambda rng: {"negative_slope": float(np.float32(rng.choice([0.0, 0.0, 0.01, 0.5])))})  # fmt: skip
_unary("Sigmoid", lambda z, op: _sigmoid(_digits(z)))
_unary("Tanh", lambda z, op: _MP.tanh(_digits(z)))
_unary("Erf", lambda z, op: _MP.erf(_digits(z)))
_unary("Exp", lambda z, op: _MP.exp(_digits(z)))
_unary("Log", lambda z, op: _MP.log(_digits(z)), start=0.0)
_unary("Softplus", lambda z, op: _softplus(_digits(z)))
_unary("Square", lambda z, op: z * z, True)
_unary("Power", lambda z, op: _power(op.exponent)(z if float(op.exponent).is_integer() else _digits(z)),
       fields=lambda rng: {"exponent": float(rng.choice([2.0, 3.0, 4.0, 5.0]))})  # fmt: skip
_unary("Sqrt", lambda z, op: _MP.sqrt(_digits(z)), start=0.0)
_unary("Reciprocal", lambda z, op: 1 / z, True, start=0.0)
_unary("Sin", lambda z, op: _MP.sin(_digits(z)))
_unary("Cos", lambda z, op: _MP.cos(_digits(z)))
_unary("Gelu", lambda z, op: _digits(z) * (1 + _MP.erf(_digits(z) / _MP.sqrt(2))) / 2)
_unary("Silu", lambda z, op: _digits(z) * _sigmoid(_digits(z)))
_unary("Sign", lambda z, op: _sign(z), True)
_unary("Heaviside", lambda z, op: Fraction(op.at_zero) if z == 0 else Fraction(z > 0), True,
       fields=lambda rng: {"at_zero": float(rng.choice([0.0, 1.0]))})  # fmt: skip
_unary("Floor", lambda z, op: Fraction(z.numerator // z.denominator), True)
_unary("Ceil", lambda z, op: Fraction(-(-z.numerator // z.denominator)), True)
_unary("Round", lambda z, op: Fraction(round(z)), True)
_unary("Single", lambda z, op: _single(z), True)

# Ops of several inputs: makes one, shapes of its inputs.
SEVERAL: dict[str, Callable[[np.random.Generator], tuple[dict[str, Any], list[tuple[int, ...]]]]] = {
    "Mul": lambda rng: ({}, [[(3,), (3,)], [(2, 2), (2,)], [(1,), (3,)]][int(rng.integers(0, 3))]),
    "MatMul": lambda rng: ({}, [(2, 3), (3, 2)]),
}
# Parameters of these may be anything; elsewhere they keep to their limits.
_ANYWHERE = ("lower_point", "upper_point")


def op_of(name: str, **fields: Any) -> Any:
    from verifier.ops.registry import our_classes

    return {cls.__name__: cls for cls in our_classes()}[name](**fields)


@cache
def added() -> dict[str, Any]:
    """Samples of the unary ops in ``verifier/contrib`` that say what their function is, by name."""
    from verifier.ops.registry import our_sets

    return {s.name: s for found in our_sets() for s in found.samples if s.exact is not None}


def _exactly(sample: Any) -> Callable[..., _Number]:
    """A sample's function, in as many digits as others have here."""

    def value(z: Fraction, op: Any) -> Any:
        with mpmath.workdps(_MP.dps):
            return _MP.mpf(sample.exact(mpmath.mpf(z.numerator) / z.denominator))

    return value


# ------------------------------------------------------------------------------------------------------ random boxes


def box(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, start: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of one kind: usual, far out, tiny, or a single point; some begin or end at a whole number."""
    kind = rng.random()
    centre, width = rng.normal(size=shape) * 2, np.abs(rng.normal(size=shape)) * float(rng.choice([0.01, 0.3, 1, 3]))
    if kind < 0.15:
        centre = centre * float(10.0 ** rng.integers(-30, 20))
        width = np.abs(centre) * rng.choice([1e-7, 0.1, 1.0, 2.0], shape)
    elif kind < 0.25:
        width = width * 0
    elif kind < 0.35:
        width = width * 40
    low, up = centre - width, centre + width
    if rng.random() < 0.3:
        whole = rng.random(shape) < 0.5
        low = np.where(whole, np.floor(low), low)
        up = np.where(~whole, np.maximum(np.ceil(up), low), up)
    if start > -np.inf:
        low, up = np.abs(low) + 1e-3, np.abs(low) + 1e-3 + (up - low)
    low, up = low.astype(dtype), up.astype(dtype)
    return np.minimum(low, up), np.maximum(low, up)


def points(rng: np.random.Generator, low: np.ndarray, up: np.ndarray, count: int) -> list[np.ndarray]:
    """Corners, middles and others, and zero where it is inside."""
    out = [low, up, (low / 2 + up / 2).astype(low.dtype), np.clip(np.zeros_like(low), low, up)]
    for _ in range(count):
        t = rng.random(low.shape) if rng.random() < 0.6 else (rng.random(low.shape) < 0.5).astype(float)
        out.append((low + t * (up - low)).astype(low.dtype))
    for _ in range(2):
        out.append(np.clip(np.nextafter(out[-1], np.float64(rng.choice([-1, 1]) * np.inf)).astype(low.dtype), low, up))
    return [np.clip(p, low, up) for p in out]


def parameters(rng: np.random.Generator, op: Any, xs: list[Any]) -> dict[str, Any] | None:
    """Values of what is optimised: the first ones, the limits, between or beyond."""
    import torch

    specs = op.parameters(xs)
    if not specs or rng.random() < 0.2:
        return None
    out = {}
    for name, spec in specs.items():
        low, high = (torch.as_tensor(v, dtype=spec.initial.dtype).expand_as(spec.initial) for v in spec[1:])
        t = torch.from_numpy(rng.random(tuple(spec.initial.shape))).to(spec.initial.dtype)
        value = [low + t * (high - low), low, high, spec.initial][int(rng.integers(0, 4))]
        if name in _ANYWHERE and rng.random() < 0.4:
            value = value + torch.from_numpy(rng.normal(size=tuple(value.shape))).to(value.dtype) * float(
                rng.choice([0.1, 1.0, 10.0])
            )
        out[name] = torch.where(torch.isfinite(value), value, spec.initial)
    return out


# ---------------------------------------------------------------------------------------------------------- relaxations


def relaxation(rng: np.random.Generator) -> str | None:
    """One nonlinear op: its interval and its planes hold every exact value in the box."""
    name = str(rng.choice([*UNARY, *SEVERAL, *added()]))
    dtype = np.float32 if rng.random() < 0.5 else np.float64
    if name in added():
        sample = added()[name]
        low, up = box(rng, (int(rng.integers(1, 5)),), dtype, 0.0 if 0.0 in sample.domain else -np.inf)
        low, up = (-up, -low) if sample.domain[1] == 0 else (low, up)
        limits = np.array(sample.domain, dtype)
        return _held(rng, sample.op, [(low.clip(*limits), up.clip(*limits))], _exactly(sample))
    if name in UNARY:
        fields, function, _, start = UNARY[name]
        op, shapes = op_of(name, **fields(rng)), [(int(rng.integers(1, 5)),)]
    else:
        made, shapes = SEVERAL[name](rng)
        op, start = op_of(name, **made), -np.inf
        function = None
    boxes = [box(rng, shape, dtype, start) for shape in shapes]
    return _held(rng, op, boxes, function)


def _held(
    rng: np.random.Generator,
    op: Any,
    boxes: list[tuple[np.ndarray, np.ndarray]],
    function: Callable[..., _Number] | None,
) -> str | None:
    import torch

    from verifier.core.interval import Interval

    xs = [Interval(*(torch.from_numpy(v)[None] for v in pair)) for pair in boxes]
    chosen = parameters(rng, op, xs)
    planes, image = op.relax(xs, chosen), op.interval(xs, ())
    shape = tuple(image.lower.shape[1:])
    signs = rng.choice([-1.0, 1.0], (1, 2, *shape)) * (rng.random((1, 2, *shape)) < 0.8)
    if function is not None and rng.random() < 0.5:  # one element at a time shows what sums hide
        signs = signs * 0
        signs[0, 0].flat[0], signs[0, 1].flat[0] = 1.0, -1.0
    a = torch.from_numpy(signs.astype(boxes[0][0].dtype))
    coefficients, constant = planes.backward(a)
    eps = 0.0 if function is not None else 64 * float(torch.finfo(a.dtype).eps)
    tried = list(zip(*(points(rng, low, up, 5) for low, up in boxes), strict=True))
    for point in tried:
        values = _values(op, point, function)
        if values is None:
            continue
        for k in range(2):
            rest = float(constant[0, k])
            if rest == -np.inf:
                continue
            if np.isnan(rest) or rest == np.inf or any(not bool(torch.isfinite(c[0, k]).all()) for c in coefficients):
                return f"{op}: a plane of {rest!r} and coefficients that are no numbers on {_shown(boxes)}"
            total, size = -Fraction(rest), abs(Fraction(rest))
            for c, x in zip(coefficients, point, strict=True):
                for u, v in zip(c[0, k].flatten().tolist(), x.ravel().tolist(), strict=True):
                    total -= Fraction(u) * Fraction(v)
                    size += abs(Fraction(u) * Fraction(v))
            # Sums of several intercepts and coefficients are rounded; the certificate accounts for that, not the plane.
            many = eps or (0.0 if np.count_nonzero(signs[0, k]) < 2 else 64 * float(torch.finfo(a.dtype).eps))
            height = sum(s * v for s, v in zip(signs[0, k].ravel().tolist(), values, strict=True) if s)
            room = height + _like(total + size * Fraction(many), height)
            if room < -_least(height):
                shown = {n: v.flatten().tolist() for n, v in (chosen or {}).items()}
                return (
                    f"{op}: planes for {signs[0, k].ravel().tolist()} pass {float(-room):.3g} above the value at "
                    f"{[p.tolist() for p in point]} on {_shown(boxes)} with {shown}"
                )
        for value, low, up in zip(values, image.lower.flatten().tolist(), image.upper.flatten().tolist(), strict=True):
            slack = _least(value)
            if np.isnan(low) or np.isnan(up):
                return f"{op}: an interval with NaN on {_shown(boxes)}"
            if (np.isfinite(low) and value < _like(Fraction(low), value) - slack) or (
                np.isfinite(up) and value > _like(Fraction(up), value) + slack
            ):
                return f"{op}: {float(value)!r} at {[p.tolist() for p in point]} is outside [{low!r}, {up!r}]"
    return None


def _values(op: Any, point: tuple[np.ndarray, ...], function: Callable[..., _Number] | None) -> list[_Number] | None:
    """Exact outputs in row-major order; None where the function has no value."""
    exact = [np.vectorize(Fraction, otypes=[object])(p.astype(np.float64)) for p in point]
    with contextlib.suppress(ZeroDivisionError, OverflowError, ValueError):
        if function is not None:
            return [function(z, op) for z in exact[0].ravel()]
        name = type(op).__name__
        if name == "Mul":
            return list((exact[0] * exact[1]).ravel())
        return list((exact[0] @ exact[1]).ravel())
    return None


def _like(value: Fraction, other: _Number) -> _Number:
    return value if isinstance(other, (Fraction, int, float)) else _digits(value)


def _least(value: _Number) -> _Number:
    """What digits may lose."""
    return 0 if isinstance(value, (Fraction, int, float)) else abs(value) * _MP.mpf(10) ** -70 + _MP.mpf(10) ** -900


def _shown(boxes: list[tuple[np.ndarray, np.ndarray]]) -> str:
    return ", ".join(f"[{low.tolist()}, {up.tolist()}]" for low, up in boxes)


# --------------------------------------------------------------------------------------------------------- affine ops


def adjoint(rng: np.random.Generator) -> str | None:
    """Affine ops of one random ONNX node, with whole numbers: a . f(x) = (W^T a) . x + a . b, without any rounding."""
    import torch

    from verifier.core.errors import VerifierError
    from verifier.graph.op import AffineOp

    case = frontend.random_case(rng)
    if case is None:
        return None
    query = checks.Query(case[0].SerializeToString(), "", (), ())
    with checks.written(query) as (file, _):
        try:
            graph = checks.load(file).graph
        except VerifierError:
            return None
    for name, node in graph.nodes.items() if hasattr(graph.nodes, "items") else enumerate(graph.nodes):
        op = node.op
        if not isinstance(op, AffineOp):
            continue
        sources = [graph.nodes[i] for i in node.inputs]
        shapes = [tuple(s.shape) for s in sources]
        p = tuple(
            graph.parameters[h]
            if not graph.parameters[h].is_floating_point()
            else torch.full(tuple(h.shape), 5.0).double()
            if "magnitude" in h.name
            else torch.from_numpy(rng.integers(-4, 5, tuple(h.shape)).astype(np.float64))
            for h in op.handles
        )
        xs = [torch.from_numpy(rng.integers(-4, 5, (3, *s)).astype(np.float64)) for s in shapes]
        a = torch.from_numpy(rng.integers(-4, 5, (3, *node.shape)).astype(np.float64))
        with torch.no_grad():
            y = op.forward(xs, p)
            back = op.transpose(a, p, shapes)
            bias = op.bias_dot(a, p)
            most = op.magnitude([x.abs() for x in xs], p)
        left = (a * y).flatten(1).sum(1)
        right = sum(((b * x).flatten(1).sum(1) for b, x in zip(back, xs, strict=True)), torch.zeros(3).double())
        right = right if bias is None else right + bias
        scale = 1.0 + float((a.abs() * y.abs()).sum())
        if not bool(((left - right).abs() <= 1e-9 * scale).all()):
            return f"{op} of node {name}: a . f(x) is {left.tolist()}, by the backward pass {right.tolist()}"
        if bool((most < y.abs() * (1 - 1e-9) - 1e-9).any()):
            return f"{op} of node {name}: values above the magnitude {float(most.max())}"
    return None
