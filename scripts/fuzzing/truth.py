"""What a network really computes: onnxruntime, and an interpreter in rationals, 50 digits or float64.

Nothing here shares code with the verifier. The interpreter reads ONNX nodes one by one and is generic over the kind of
number: exact for piecewise-linear and polynomial networks, to 50 digits where functions are transcendental.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

DIGITS = 50
_MP = mpmath.mp.clone()
_MP.dps = DIGITS

Array = np.ndarray


class NoTruth(Exception):
    """The interpreter has no rule for an op, or none that is exact."""


# ------------------------------------------------------------------------------------------------------ kinds of number


class Field:
    """A kind of number: how arrays are made of it and what functions it has."""

    name = "float64"
    exact = False

    def array(self, values: Any) -> Array:
        return np.asarray(values, dtype=np.float64)

    def apply(self, function: str, x: Array) -> Array:
        return np.vectorize(_FLOAT[function], otypes=[np.float64])(x) if x.size else x


class Rational(Field):
    name = "rational"
    exact = True

    def array(self, values: Any) -> Array:
        given = np.asarray(values)
        if given.dtype == object:
            return given
        out = np.empty(given.shape, dtype=object)
        for index, value in np.ndenumerate(given):
            if not math.isfinite(float(value)):
                raise NoTruth("a number is not finite")
            out[index] = Fraction(int(value)) if given.dtype.kind in "iub" else Fraction(float(value))
        return out

    def apply(self, function: str, x: Array) -> Array:
        if function not in _EXACT:
            raise NoTruth(function)
        out = np.empty(x.shape, dtype=object)
        for index, value in np.ndenumerate(x):
            out[index] = _EXACT[function](value)
        return out


class Digits(Field):
    name = "digits"

    def array(self, values: Any) -> Array:
        given = np.asarray(values)
        out = np.empty(given.shape, dtype=object)
        for index, value in np.ndenumerate(given):
            if isinstance(value, Fraction):
                out[index] = _MP.mpf(value.numerator) / value.denominator
            else:
                out[index] = _MP.mpf(float(value))
        return out

    def apply(self, function: str, x: Array) -> Array:
        out = np.empty(x.shape, dtype=object)
        for index, value in np.ndenumerate(x):
            out[index] = _DIGITS[function](value)
        return out


FLOAT, RATIONAL, REAL = Field(), Rational(), Digits()


def _sign(v: Any) -> Any:
    return (v > 0) - (v < 0)


def _float_exp(v: float) -> float:
    return math.exp(v) if v < 709 else math.inf


_FLOAT: dict[str, Callable[[Any], Any]] = {
    "Sigmoid": lambda v: 1 / (1 + _float_exp(-v)),
    "Tanh": math.tanh,
    "Exp": _float_exp,
    "Log": lambda v: math.log(v) if v > 0 else math.nan,
    "Sqrt": lambda v: math.sqrt(v) if v >= 0 else math.nan,
    "Erf": math.erf,
    "Sin": math.sin,
    "Cos": math.cos,
    "Softplus": lambda v: max(v, 0.0) + math.log1p(math.exp(-abs(v))),
    "Softsign": lambda v: v / (1 + abs(v)),
    "Floor": lambda v: math.floor(v),
    "Ceil": lambda v: math.ceil(v),
    "Round": lambda v: round(v),
    "Sign": _sign,
}
_EXACT: dict[str, Callable[[Any], Any]] = {
    "Floor": lambda v: Fraction(math.floor(v)),
    "Ceil": lambda v: Fraction(math.ceil(v)),
    "Round": lambda v: Fraction(round(v)),
    "Sign": lambda v: Fraction(_sign(v)),
    "Softsign": lambda v: v / (1 + abs(v)),
}
_DIGITS: dict[str, Callable[[Any], Any]] = {
    "Sigmoid": lambda v: 1 / (1 + _MP.exp(-v)),
    "Tanh": _MP.tanh,
    "Exp": _MP.exp,
    "Log": lambda v: _MP.log(v) if v > 0 else _MP.nan,
    "Sqrt": lambda v: _MP.sqrt(v) if v >= 0 else _MP.nan,
    "Erf": _MP.erf,
    "Sin": _MP.sin,
    "Cos": _MP.cos,
    "Softplus": lambda v: _MP.log1p(_MP.exp(v)),
    "Softsign": lambda v: v / (1 + abs(v)),
    "Floor": _MP.floor,
    "Ceil": _MP.ceil,
    "Round": _MP.nint,
    "Sign": lambda v: _MP.mpf(_sign(v)),
}
UNARY = tuple(_DIGITS)


# ---------------------------------------------------------------------------------------------------------- interpreter


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes, strings decoded."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def constants(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def evaluate(model: onnx.ModelProto, x: Array, field: Field) -> dict[str, Array]:
    """Every value of the network by name.

    Args:
        x: (n_in,), numbers of the field.

    Raises:
        NoTruth: a node has no rule in this field.
    """
    info = model.graph.input[0]
    shape = tuple(d.dim_value or 1 for d in info.type.tensor_type.shape.dim)
    values: dict[str, Array] = {info.name: x.reshape(shape)}
    raw = constants(model)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    for node in model.graph.node:
        rule = _RULES.get(node.op_type)
        if node.op_type not in UNARY and rule is None:
            raise NoTruth(node.op_type)
        given: list[Any] = []
        for name in node.input:
            if name and name not in values and name in raw:
                values[name] = field.array(raw[name]) if raw[name].dtype.kind == "f" else raw[name]
            given.append(values[name] if name else None)
        try:
            out = field.apply(node.op_type, given[0]) if rule is None else rule(field, given, attributes(node), opset)
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            raise NoTruth(f"{node.op_type}: {error}") from error
        outs = out if isinstance(out, list) else [out]
        for name, value in zip(node.output, outs, strict=False):
            if name:
                values[name] = np.asarray(value)
    return values


def _ints(a: Any) -> list[int]:
    return [int(v) for v in np.asarray(a).reshape(-1)]


def _gemm(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    left = v[0].T if a.get("transA") else v[0]
    right = v[1].T if a.get("transB") else v[1]
    out = (left @ right) * f.array(a.get("alpha", 1.0))
    return out + v[2] * f.array(a.get("beta", 1.0)) if len(v) > 2 and v[2] is not None else out


def _spatial(a: dict[str, Any], shape: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], ...]:
    """Strides, dilations, pads at the begin and at the end."""
    n = len(kernel)
    strides, dilations = list(a.get("strides", [1] * n)), list(a.get("dilations", [1] * n))
    pads = list(a.get("pads", [0] * 2 * n))
    auto = a.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * n
        for i in range(n):
            total = max(
                0, (-(-shape[i] // strides[i]) - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - shape[i]
            )
            small, large = total // 2, total - total // 2
            pads[i], pads[n + i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto == "VALID":
        pads = [0] * 2 * n
    return strides, dilations, pads[:n], pads[n:]


def _windows(x: Array, kernel: Sequence[int], a: dict[str, Any], fill: Any) -> list[tuple[tuple[int, ...], Array]]:
    """For every offset in the kernel the slice of the padded input that it meets, (N, C, *out)."""
    strides, dilations, begin, end = _spatial(a, x.shape[2:], kernel)
    padded_shape = [s + b + e for s, b, e in zip(x.shape[2:], begin, end, strict=True)]
    padded = np.full((*x.shape[:2], *padded_shape), fill, dtype=x.dtype)
    inner = tuple(slice(b, b + s) for b, s in zip(begin, x.shape[2:], strict=True))
    padded[(slice(None), slice(None), *inner)] = x
    sizes = [
        (p - (k - 1) * d - 1) // s + 1 for p, k, d, s in zip(padded_shape, kernel, dilations, strides, strict=True)
    ]
    if min(sizes) < 1:
        raise NoTruth("an empty window")
    out = []
    for offset in itertools.product(*map(range, kernel)):
        cut = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s)
            for o, d, n, s in zip(offset, dilations, sizes, strides, strict=True)
        )
        out.append((offset, padded[(slice(None), slice(None), *cut)]))
    return out


def _conv(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    x, w, groups = v[0], v[1], a.get("group", 1)
    per, each = w.shape[1], w.shape[0] // groups
    total: Any = 0
    for offset, part in _windows(x, w.shape[2:], a, f.array(0.0)[()]):
        kernel = w[(slice(None), slice(None), *offset)]
        rows = [
            np.tensordot(kernel[g * each : (g + 1) * each], part[:, g * per : (g + 1) * per], axes=([1], [1]))
            for g in range(groups)
        ]
        total = total + np.concatenate(rows, 0)
    total = np.moveaxis(total, 1, 0)
    if len(v) > 2 and v[2] is not None:
        total = total + v[2].reshape(1, -1, *[1] * (x.ndim - 2))
    return total


def _conv_transpose(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    x, w, groups = v[0], v[1], a.get("group", 1)
    if "auto_pad" in a or "output_shape" in a:
        raise NoTruth("ConvTranspose")
    n = x.ndim - 2
    strides, dilations, begin, end = _spatial(a, x.shape[2:], w.shape[2:])
    extra = a.get("output_padding", [0] * n)
    full = [
        (s - 1) * t + (k - 1) * d + 1 + e
        for s, t, k, d, e in zip(x.shape[2:], strides, w.shape[2:], dilations, extra, strict=True)
    ]
    each, per = w.shape[1], x.shape[1] // groups
    out = np.full((1, each * groups, *full), f.array(0.0)[()], dtype=x.dtype)
    for offset in itertools.product(*map(range, w.shape[2:])):
        cut = tuple(
            slice(o * d, o * d + (s - 1) * t + 1, t)
            for o, d, s, t in zip(offset, dilations, x.shape[2:], strides, strict=True)
        )
        for g in range(groups):
            kernel = w[(slice(g * per, (g + 1) * per), slice(None), *offset)]
            part = np.tensordot(kernel, x[0, g * per : (g + 1) * per], axes=([0], [0]))
            out[(0, slice(g * each, (g + 1) * each), *cut)] += part
    inner = tuple(slice(b, s - e) for b, e, s in zip(begin, end, full, strict=True))
    out = out[(slice(None), slice(None), *inner)]
    return out + v[2].reshape(1, -1, *[1] * n) if len(v) > 2 and v[2] is not None else out


def _max_pool(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    if a.get("ceil_mode"):
        raise NoTruth("ceil_mode")
    x, zero = v[0], f.array(0.0)[()]
    # Padding never wins: it gets the least number there is.
    least = np.min(x) if x.size else zero
    parts = [p for _, p in _windows(x, a["kernel_shape"], a, least)]
    return _fold(np.maximum)(f, parts, a, opset)


def _average_pool(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    if a.get("ceil_mode"):
        raise NoTruth("ceil_mode")
    zero = f.array(0.0)[()]
    parts = [p for _, p in _windows(v[0], a["kernel_shape"], a, zero)]
    total = sum(parts[1:], parts[0])
    if a.get("count_include_pad"):
        return total / f.array(float(len(parts)))
    ones = f.array(np.ones(v[0].shape))
    counts = [p for _, p in _windows(ones, a["kernel_shape"], a, zero)]
    return total / sum(counts[1:], counts[0])


def _batch_norm(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    x, scale, shift, mean, var = v
    shape = (1, -1, *[1] * (x.ndim - 2))
    root = f.apply("Sqrt", var + f.array(np.float32(a.get("epsilon", 1e-5))))
    return (x - mean.reshape(shape)) / root.reshape(shape) * scale.reshape(shape) + shift.reshape(shape)


def _axes(v: list[Any], a: dict[str, Any], ndim: int) -> tuple[int, ...] | None:
    found = a.get("axes", _ints(v[1]) if len(v) > 1 and v[1] is not None else None)
    return None if not found else tuple(int(i) % ndim for i in found)


def _reduce(combine: Callable[[Field, Array, int], Array]) -> Callable[..., Array]:
    def rule(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
        x, axes = v[0], _axes(v, a, v[0].ndim)
        if axes is None and a.get("noop_with_empty_axes"):
            return x
        axes = tuple(range(x.ndim)) if axes is None else axes
        keep = bool(a.get("keepdims", 1))
        rest = [i for i in range(x.ndim) if i not in axes]
        flat = np.transpose(x, [*rest, *axes]).reshape([*[x.shape[i] for i in rest], -1])
        out = combine(f, flat, flat.shape[-1])
        return np.asarray(out).reshape([1 if i in axes else s for i, s in enumerate(x.shape) if keep or i not in axes])

    return rule


def _top(f: Field, x: Array, n: int) -> Array:
    return np.max(x, -1)


def _softmax(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    x = v[0]
    axis = a.get("axis", 1 if opset < 13 else -1)
    if opset < 13:
        rows = x.reshape(int(np.prod(x.shape[:axis], dtype=int)), -1)
        e = f.apply("Exp", rows - np.max(rows, -1, keepdims=True))
        return (e / e.sum(-1, keepdims=True)).reshape(x.shape)
    e = f.apply("Exp", x - np.max(x, axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _slice(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    starts, ends = (a["starts"], a["ends"]) if opset < 10 else (_ints(v[1]), _ints(v[2]))
    axes = a.get("axes") if opset < 10 else (_ints(v[3]) if len(v) > 3 and v[3] is not None else None)
    steps = [1] * len(starts) if opset < 10 or len(v) < 5 or v[4] is None else _ints(v[4])
    cut: list[Any] = [slice(None)] * v[0].ndim
    for k, (start, end, step) in enumerate(zip(starts, ends, steps, strict=True)):
        axis = axes[k] if axes is not None else k
        size = v[0].shape[axis]
        first = start + size if start < 0 else start
        last = end + size if end < 0 else end
        if step > 0:
            cut[axis] = range(min(max(first, 0), size), min(max(last, 0), size), step)
        else:
            cut[axis] = range(min(max(first, 0), size - 1), max(min(last, size - 1), -1), step)
    out = v[0]
    for axis, part in enumerate(cut):
        if isinstance(part, range):
            out = np.take(out, list(part), axis=axis)
    return out


def _pad(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    x = v[0]
    pads = list(a["pads"]) if opset < 11 else _ints(v[1])
    mode = a.get("mode", "constant")
    value: Any = f.array(np.float32(a.get("value", 0.0)))[()] if opset < 11 else f.array(0.0)[()]
    if opset >= 11 and len(v) > 2 and v[2] is not None:
        value = v[2].reshape(-1)[0]
    if (len(v) > 3 and v[3] is not None) or min(pads) < 0:
        raise NoTruth("Pad")
    n = x.ndim
    width = list(zip(pads[:n], pads[n:], strict=True))
    if mode == "constant":
        out = np.full([s + b + e for s, (b, e) in zip(x.shape, width, strict=True)], value, dtype=x.dtype)
        out[tuple(slice(b, b + s) for s, (b, e) in zip(x.shape, width, strict=True))] = x
        return out
    return np.pad(x, width, mode={"reflect": "reflect", "edge": "edge"}[mode])


def _split(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> list[Array]:
    axis = a.get("axis", 0)
    sizes = a.get("split") or (_ints(v[1]) if len(v) > 1 and v[1] is not None else None)
    if sizes is None:
        raise NoTruth("Split")
    return list(np.split(v[0], np.cumsum(sizes)[:-1], axis=axis))


def _reshape(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    wanted = _ints(v[1])
    return v[0].reshape([v[0].shape[i] if s == 0 else s for i, s in enumerate(wanted)])


def _clip(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    low = a.get("min") if opset < 11 else v[1] if len(v) > 1 else None
    high = a.get("max") if opset < 11 else v[2] if len(v) > 2 else None
    out = v[0]
    if low is not None:
        out = np.maximum(out, f.array(np.float32(low)) if opset < 11 else low)
    if high is not None:
        out = np.minimum(out, f.array(np.float32(high)) if opset < 11 else high)
    return out


def _power(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    e = np.asarray(v[1]).reshape(-1)
    if e.size != 1 or e[0] != int(e[0]) or not 0 < int(e[0]) < 8:
        raise NoTruth("Pow")
    out = v[0]
    for _ in range(int(e[0]) - 1):
        out = out * v[0]
    return out


def _flatten(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    axis = a.get("axis", 1)
    axis = axis + v[0].ndim if axis < 0 else axis
    return v[0].reshape(int(np.prod(v[0].shape[:axis], dtype=int)), -1)


def _squeeze(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    axes = _axes(v, a, v[0].ndim)
    return np.squeeze(v[0], axes)


def _unsqueeze(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    axes = list(a.get("axes", [])) or _ints(v[1])
    n = v[0].ndim + len(axes)
    return np.expand_dims(v[0], tuple(int(i) % n for i in axes))


def _global_pool(combine: Callable[[Field, Array, int], Array]) -> Callable[..., Array]:
    def rule(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
        x = v[0]
        return combine(f, x.reshape(*x.shape[:2], -1), int(np.prod(x.shape[2:]))).reshape(
            *x.shape[:2], *[1] * (x.ndim - 2)
        )

    return rule


def _mean(f: Field, x: Array, n: int) -> Array:
    return x.sum(-1) / f.array(float(n))


def _fold(combine: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    def rule(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
        out = v[0]
        for part in v[1:]:
            out = combine(out, part)
        return out

    return rule


def _where(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    return np.where(v[0].astype(bool), v[1], v[2])


def _cast(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    if v[0].dtype == bool and a["to"] == TensorProto.FLOAT:
        return f.array(v[0].astype(np.float64))
    raise NoTruth("Cast")


def _transpose(f: Field, v: list[Any], a: dict[str, Any], opset: int) -> Array:
    return np.transpose(v[0], a.get("perm"))


_RULES: dict[str, Callable[[Field, list[Any], dict[str, Any], int], Any]] = {
    "Gemm": _gemm,
    "MatMul": lambda f, v, a, o: v[0] @ v[1],
    "Add": lambda f, v, a, o: v[0] + v[1],
    "Sub": lambda f, v, a, o: v[0] - v[1],
    "Mul": lambda f, v, a, o: v[0] * v[1],
    "Div": lambda f, v, a, o: v[0] / v[1],
    "Neg": lambda f, v, a, o: -v[0],
    "Abs": lambda f, v, a, o: np.abs(v[0]),
    "Reciprocal": lambda f, v, a, o: f.array(1.0) / v[0],
    "Identity": lambda f, v, a, o: v[0],
    "Dropout": lambda f, v, a, o: v[0],
    "Relu": lambda f, v, a, o: np.where(v[0] > 0, v[0], f.array(0.0)),
    "LeakyRelu": lambda f, v, a, o: np.where(v[0] > 0, v[0], v[0] * f.array(np.float32(a.get("alpha", 0.01)))),
    "PRelu": lambda f, v, a, o: np.where(v[0] > 0, v[0], v[0] * v[1]),
    "Max": _fold(np.maximum),
    "Min": _fold(np.minimum),
    "Sum": _fold(lambda x, y: x + y),
    "Mean": lambda f, v, a, o: _fold(lambda x, y: x + y)(f, v, a, o) / f.array(float(len(v))),
    "Clip": _clip,
    "Pow": _power,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool(_mean),
    "GlobalMaxPool": _global_pool(_top),
    "BatchNormalization": _batch_norm,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda f, v, a, o: np.concatenate(v, a["axis"]),
    "Slice": _slice,
    "Gather": lambda f, v, a, o: np.take(v[0], v[1].astype(int), axis=a.get("axis", 0)),
    "Pad": _pad,
    "Split": _split,
    "Softmax": _softmax,
    "ReduceSum": _reduce(lambda f, x, n: x.sum(-1)),
    "ReduceMean": _reduce(_mean),
    "ReduceMax": _reduce(_top),
    "ReduceMin": _reduce(lambda f, x, n: np.min(x, -1)),
    "ReduceL1": _reduce(lambda f, x, n: np.abs(x).sum(-1)),
    "ReduceSumSquare": _reduce(lambda f, x, n: (x * x).sum(-1)),
    "ReduceL2": _reduce(lambda f, x, n: f.apply("Sqrt", np.asarray((x * x).sum(-1)))),
    "Greater": lambda f, v, a, o: (v[0] > v[1]).astype(bool),
    "Less": lambda f, v, a, o: (v[0] < v[1]).astype(bool),
    "GreaterOrEqual": lambda f, v, a, o: (v[0] >= v[1]).astype(bool),
    "LessOrEqual": lambda f, v, a, o: (v[0] <= v[1]).astype(bool),
    "Not": lambda f, v, a, o: ~v[0].astype(bool),
    "Where": _where,
    "Cast": _cast,
}
KNOWN = frozenset(_RULES) | frozenset(UNARY)


# ---------------------------------------------------------------------------------------------------------- onnxruntime


@dataclass
class Runtime:
    """onnxruntime on the CPU, one thread, with or without graph optimisations."""

    model: onnx.ModelProto

    def __post_init__(self) -> None:
        self._sessions: dict[bool, onnxruntime.InferenceSession] = {}
        info = self.model.graph.input[0]
        self.shape = tuple(d.dim_value or 1 for d in info.type.tensor_type.shape.dim)
        self.dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        self.n_in = int(np.prod(self.shape, dtype=int))

    def one(self, x: Array, optimised: bool = True) -> Array:
        """(n_in,) to (n_out,), float64 of what onnxruntime gives."""
        session = self._session(optimised)
        given = np.asarray(x).astype(self.dtype).reshape(self.shape)
        return np.asarray(session.run(None, {session.get_inputs()[0].name: given})[0]).reshape(-1).astype(np.float64)

    def many(self, x: Array, optimised: bool = True) -> Array:
        return np.stack([self.one(p, optimised) for p in x])

    def _session(self, optimised: bool) -> onnxruntime.InferenceSession:
        if optimised not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 4
            level = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
            self._sessions[optimised] = onnxruntime.InferenceSession(
                self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[optimised]


def real_values(model: onnx.ModelProto, x: Array) -> tuple[dict[str, Array], Field]:
    """All values at a point of float numbers, as Fractions where all ops are rational, else with 50 digits.

    Raises:
        NoTruth: an op without a rule.
    """
    for field in (RATIONAL, REAL):
        try:
            given = RATIONAL.array(np.asarray(x, dtype=np.float64))
            return evaluate(model, given if field is RATIONAL else REAL.array(given), field), field
        except NoTruth:
            if field is REAL:
                raise
    raise AssertionError


def real_output(model: onnx.ModelProto, x: Array) -> tuple[list[Fraction], Fraction]:
    """Outputs at a point as Fractions, and by how much each may be off (0 when exact).

    Raises:
        NoTruth: an op without a rule, or a value that is not finite.
    """
    values, field = real_values(model, x)
    flat = values[model.graph.output[0].name].reshape(-1)
    if field is RATIONAL:
        return [Fraction(v) for v in flat], Fraction(0)
    if not all(_MP.isfinite(v) for v in flat):
        raise NoTruth("an output is not finite")
    out = [as_fraction(v) for v in flat]
    largest = max((abs(v) for v in out), default=Fraction(0))
    return out, (largest + 1) * Fraction(1, 10 ** (DIGITS // 2))


def as_fraction(v: Any) -> Fraction:
    """Exact value of a number of any field."""
    if isinstance(v, Fraction | int):
        return Fraction(v)
    if isinstance(v, float | np.floating):
        return Fraction(float(v))
    sign, mantissa, exponent, _ = v._mpf_
    return Fraction(-int(mantissa) if sign else int(mantissa)) * Fraction(2) ** int(exponent)


# ------------------------------------------------------------------------------------------- search for extreme points


@dataclass(frozen=True)
class Extreme:
    """The least value of a function that was found, and where."""

    value: float
    point: Array


def minimise(
    function: Callable[[Array], float], low: Array, high: Array, rng: np.random.Generator, effort: int = 200
) -> Extreme:
    """Least value over a box of float32 points: corners, random points, then coordinate steps that shrink.

    Args:
        function: (n,) to a number; NaN counts as infinity.
        effort: about how many evaluations.
    """
    n, width = low.size, high - low

    def at(x: Array) -> float:
        value = function(x)
        return value if value == value else math.inf

    starts = [low, high, snap((low + high) / 2, low, high)]
    starts += [np.where(rng.random(n) < 0.5, low, high) for _ in range(effort // 8)]
    starts += [snap(low + rng.random(n) * width, low, high) for _ in range(effort // 4)]
    scored = sorted(((at(x), k) for k, x in enumerate(starts)), key=lambda pair: pair[0])
    best = Extreme(scored[0][0], starts[scored[0][1]])
    left = effort
    for value, k in scored[:2]:
        x, step = starts[k], 0.5
        while left > 0 and step > 1e-9:
            moved = False
            for i in rng.permutation(n):
                if width[i] == 0:
                    continue
                for sign in (-1, 1):
                    y = x.copy()
                    y[i] = min(max(y[i] + sign * step * width[i], low[i]), high[i])
                    y = snap(y, low, high)
                    left -= 1
                    new = at(y)
                    if new < value:
                        x, value, moved = y, new, True
            step = step if moved else step / 3
        if value < best.value:
            best = Extreme(value, x)
        left = effort // 2
    return best


def snap(x: Array, low: Array, high: Array) -> Array:
    """Float32 points inside the box; a bound itself where no float32 lies between."""
    y = np.asarray(x, dtype=np.float64).astype(np.float32).astype(np.float64)
    y = np.where(y < low, np.nextafter(y.astype(np.float32), np.float32(np.inf)).astype(np.float64), y)
    y = np.where(y > high, np.nextafter(y.astype(np.float32), np.float32(-np.inf)).astype(np.float64), y)
    return np.clip(y, low, high)
