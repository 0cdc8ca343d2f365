"""Random ONNX networks that the interpreter can evaluate: layers of all kinds, put together at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
MOST = 40  # elements of a value


@dataclass
class Value:
    """A value of the network under construction."""

    name: str
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Builder:
    """Collects nodes and constants.

    Attributes:
        grid: weights are multiples of 1/grid when positive, so that values meet exactly.
    """

    rng: np.random.Generator
    opset: int = 13
    grid: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[Value | str], shape: Shape, **attributes: Any) -> Value:
        name = f"v{len(self.nodes)}"
        names = [v if isinstance(v, str) else v.name for v in inputs]
        self.nodes.append(helper.make_node(op, names, [name], **attributes))
        return Value(name, shape)

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype=dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def weights(self, shape: Shape, deviation: float) -> np.ndarray:
        """Normal numbers, some of them zero."""
        w = self.rng.normal(size=shape) * deviation
        if self.grid:
            w = np.round(w * self.grid) / self.grid
        if self.rng.random() < 0.3:
            w = np.where(self.rng.random(shape) < 0.3, 0.0, w)
        return w.astype(np.float32)

    def model(self, input_shape: Shape, output: Value) -> onnx.ModelProto:
        return make(self.nodes, self.constants, input_shape, output.name, self.opset)


def make(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shape: Sequence[int],
    output: str,
    opset: int = 13,
    kind: int = TensorProto.FLOAT,
    out_kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model with input ``X`` and one output."""
    graph = helper.make_graph(
        list(nodes),
        "fuzzed",
        [helper.make_tensor_value_info("X", kind, list(shape))],
        [helper.make_tensor_value_info(output, out_kind, None)],
        [numpy_helper.from_array(a, k) for k, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


# --------------------------------------------------------------------------------------------------------------- layers


def linear(b: Builder, x: Value, width: int = 0) -> Value:
    """An affine layer on a matrix (1, n); other shapes are flattened first."""
    x = flat(b, x)
    n, m = x.size, width or int(b.rng.integers(1, 9))
    gain = float(b.rng.choice([0.5, 1.0, 1.5, 3.0]))
    w, bias = b.weights((m, n), gain / math.sqrt(n)), b.weights((m,), 0.5)
    way = int(b.rng.integers(0, 5))
    if way == 0:
        alpha, beta = (float(v) for v in b.rng.choice([0.5, 1.0, -2.0, 1.25], 2))
        return b.node("Gemm", [x, b.constant(w), b.constant(bias)], (1, m), transB=1, alpha=alpha, beta=beta)
    if way == 1:
        return b.node("Gemm", [x, b.constant(w.T), b.constant(bias)], (1, m))
    if way == 2:
        return b.node("Gemm", [x, b.constant(w.T)], (1, m))
    h = b.node("MatMul", [x, b.constant(w.T)], (1, m))
    return h if way == 3 else b.node("Add", [b.constant(bias), h], (1, m))


def flat(b: Builder, x: Value) -> Value:
    if len(x.shape) == 2 and x.shape[0] == 1:
        return x
    if x.shape[0] == 1 and b.rng.random() < 0.5:
        return b.node("Flatten", [x], (1, x.size))
    return b.node("Reshape", [x, b.ints(1, -1)], (1, x.size))


def image(b: Builder, x: Value) -> Value:
    """The value as (1, C, H, W)."""
    if len(x.shape) == 4:
        return x
    n = x.size
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    c = int(b.rng.choice(divisors))
    rest = [d for d in range(1, n // c + 1) if (n // c) % d == 0]
    h = int(b.rng.choice(rest))
    return b.node("Reshape", [x, b.ints(1, c, h, n // c // h)], (1, c, h, n // c // h))


def conv(b: Builder, x: Value) -> Value:
    x = image(b, x)
    c, sizes = x.shape[1], x.shape[2:]
    kernel = [int(b.rng.integers(1, min(s, 3) + 1)) for s in sizes]
    strides, dilations = [int(s) for s in b.rng.integers(1, 3, 2)], [int(s) for s in b.rng.choice([1, 1, 2], 2)]
    dilations = [d if (k - 1) * d + 1 <= s else 1 for d, k, s in zip(dilations, kernel, sizes, strict=True)]
    pads = [int(p) for p in b.rng.integers(0, 2, 4)] if b.rng.random() < 0.6 else [0] * 4
    groups = c if c > 1 and b.rng.random() < 0.2 else 1
    m = groups * int(b.rng.integers(1, 4))
    out = [
        (s + pads[i] + pads[i + 2] - (kernel[i] - 1) * dilations[i] - 1) // strides[i] + 1 for i, s in enumerate(sizes)
    ]
    if min(out) < 1 or m * math.prod(out) > MOST:
        return linear(b, x)
    fan = c // groups * math.prod(kernel)
    inputs = [x, b.constant(b.weights((m, c // groups, *kernel), 1.2 / math.sqrt(fan)))]
    if b.rng.random() < 0.7:
        inputs.append(b.constant(b.weights((m,), 0.4)))
    given = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups, "kernel_shape": kernel}
    return b.node("Conv", inputs, (1, m, *out), **given)


def deconv(b: Builder, x: Value) -> Value:
    x = image(b, x)
    c, sizes = x.shape[1], x.shape[2:]
    kernel = [int(k) for k in b.rng.integers(1, 4, 2)]
    strides = [int(s) for s in b.rng.integers(1, 3, 2)]
    extra = [int(b.rng.integers(0, s)) for s in strides]
    pads = [min(int(p), (k - 1) // 2) for p, k in zip(b.rng.integers(0, 2, 2), kernel, strict=True)] * 2
    m = int(b.rng.integers(1, 3))
    out = [(s - 1) * t + k + e - 2 * p for s, t, k, e, p in zip(sizes, strides, kernel, extra, pads, strict=False)]
    if min(out) < 1 or m * math.prod(out) > MOST:
        return linear(b, x)
    inputs = [x, b.constant(b.weights((c, m, *kernel), 1 / math.sqrt(c))), b.constant(b.weights((m,), 0.4))]
    return b.node("ConvTranspose", inputs, (1, m, *out), strides=strides, output_padding=extra, pads=pads)


def pool(b: Builder, x: Value, kind: str = "") -> Value:
    x = image(b, x)
    kind = kind or str(b.rng.choice(["AveragePool", "GlobalAveragePool"]))
    if kind.startswith("Global"):
        return b.node(kind, [x], (1, x.shape[1], 1, 1))
    kernel = [int(b.rng.integers(1, min(s, 3) + 1)) for s in x.shape[2:]]
    strides = [int(s) for s in b.rng.integers(1, 3, 2)]
    pads = [int(b.rng.integers(0, 1 + k // 2)) for k in kernel] * 2 if b.rng.random() < 0.5 else [0] * 4
    out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(x.shape[2:], pads, kernel, strides, strict=False)]
    given: dict[str, Any] = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if kind == "AveragePool" and b.rng.random() < 0.5:
        given["count_include_pad"] = 1
    return b.node(kind, [x], (1, x.shape[1], *out), **given)


def batch_norm(b: Builder, x: Value) -> Value:
    c = x.shape[1] if len(x.shape) > 1 else 1
    if len(x.shape) < 2 or x.shape[0] != 1:
        return linear(b, x)
    parts = [b.weights((c,), 1.0), b.weights((c,), 0.5), b.weights((c,), 0.5), np.abs(b.weights((c,), 1.0)) + 0.25]
    return b.node("BatchNormalization", [x, *map(b.constant, parts)], x.shape)


def scale(b: Builder, x: Value) -> Value:
    """An elementwise affine op with a constant, broadcast in some way."""
    shape = tuple(s if b.rng.random() < 0.7 else 1 for s in x.shape)
    shape = shape[int(b.rng.integers(0, len(shape))) :] if b.rng.random() < 0.4 else shape
    op = str(b.rng.choice(["Add", "Sub", "Mul", "Div", "Neg", "RSub"]))
    if op == "Neg":
        return b.node("Neg", [x], x.shape)
    c = b.weights(shape, 1.0)
    if op == "Div":
        c = np.where(np.abs(c) < 0.25, np.float32(0.5), c)
    name = b.constant(c)
    if op == "RSub":
        return b.node("Sub", [name, x], x.shape)
    pair = [name, x] if op in ("Add", "Mul") and b.rng.random() < 0.4 else [x, name]
    return b.node(op, pair, x.shape)


def rearranged(b: Builder, x: Value) -> Value:
    """Transposes, slices, gathers, padding, concatenation."""
    axis = int(b.rng.integers(0, len(x.shape)))
    size = x.shape[axis]
    kind = str(b.rng.choice(["Transpose", "Slice", "Gather", "Pad", "Concat", "Split", "Squeeze", "ReduceSum"]))
    if kind == "Transpose":
        perm = [int(i) for i in b.rng.permutation(len(x.shape))]
        return b.node("Transpose", [x], tuple(x.shape[i] for i in perm), perm=perm)
    if kind == "Slice" and size > 1:
        step = int(b.rng.choice([1, 2, -1]))
        if step < 0:
            start, end = size - 1, -size - 1
            n = size
        else:
            start = int(b.rng.integers(0, size - 1))
            end = int(b.rng.integers(start + 1, size + 1))
            n = -(-(end - start) // step)
        shape = tuple(n if i == axis else s for i, s in enumerate(x.shape))
        inputs = [x, b.ints(start), b.ints(end), b.ints(axis), b.ints(step)]
        return b.node("Slice", inputs, shape)
    if kind == "Gather":
        picked = [int(i) for i in b.rng.integers(-size, size, int(b.rng.integers(1, size + 2)))]
        shape = tuple(len(picked) if i == axis else s for i, s in enumerate(x.shape))
        return b.node("Gather", [x, b.ints(*picked)], shape, axis=axis) if math.prod(shape) <= MOST else x
    if kind == "Pad":
        low, high = ([int(p) for p in b.rng.integers(0, 2, len(x.shape))] for _ in range(2))
        low[0] = high[0] = 0
        shape = tuple(s + p + q for s, p, q in zip(x.shape, low, high, strict=True))
        if math.prod(shape) > MOST:
            return x
        return b.node("Pad", [x, b.ints(*low, *high), b.constant(b.weights((), 0.5))], shape)
    if kind == "Concat" and 2 * x.size <= MOST:
        other = scale(b, x)
        if other.shape == x.shape:
            shape = tuple(2 * s if i == axis else s for i, s in enumerate(x.shape))
            return b.node("Concat", [x, other], shape, axis=axis - (len(x.shape) if b.rng.random() < 0.5 else 0))
    if kind == "Split" and size > 1:
        first = int(b.rng.integers(1, size))
        name = f"v{len(b.nodes)}"
        b.nodes.append(helper.make_node("Split", [x.name, b.ints(first, size - first)], [name + "a", name], axis=axis))
        return Value(name, tuple(size - first if i == axis else s for i, s in enumerate(x.shape)))
    if kind == "ReduceSum" and len(x.shape) > 1 and axis > 0:
        if b.rng.random() < 0.5:
            return b.node("ReduceMean", [x], tuple(1 if i == axis else s for i, s in enumerate(x.shape)), axes=[axis])
        shape = tuple(1 if i == axis else s for i, s in enumerate(x.shape))
        return b.node("ReduceSum", [x, b.ints(axis)], shape, keepdims=1)
    return x


AFFINE: dict[str, Callable[[Builder, Value], Value]] = {
    "linear": linear,
    "conv": conv,
    "deconv": deconv,
    "pool": pool,
    "norm": batch_norm,
    "scale": scale,
    "rearranged": rearranged,
}


# -------------------------------------------------------------------------------------------------------- nonlinear ops


def relu(b: Builder, x: Value) -> Value:
    return b.node("Relu", [x], x.shape)


def paired(b: Builder, x: Value) -> Value:
    """c relu(z) - c relu(-z) = c z inside a layer, with factors, other neurons and near misses beside them."""
    x = flat(b, x)
    n, pairs, others, m = x.size, *(int(v) for v in b.rng.integers((1, 0, 1), (5, 4, 6)))
    w, c = b.weights((pairs, n + 1), 1 / math.sqrt(n)), b.weights((m, pairs), 1 / math.sqrt(pairs))
    k = np.float32(b.rng.choice([1.0, 1.0, 2.0, 0.5, 3.0, 0.7]))
    rows = np.concatenate([w, -k * w, b.weights((others, n + 1), 1 / math.sqrt(n))])
    columns = np.concatenate([k * c, b.rng.choice([-1, -1, -1, 1]) * c, b.weights((m, others), 0.5)], 1)
    if b.rng.random() < 0.2:
        rows[pairs, int(b.rng.integers(n + 1))] *= np.float32(1 + 2.0**-20)
    order = b.rng.permutation(len(rows))
    rows, columns = rows[order].astype(np.float32), columns[:, order].astype(np.float32)
    h = b.node("Gemm", [x, b.constant(rows[:, :-1]), b.constant(rows[:, -1])], (1, len(rows)), transB=1)
    return b.node("Gemm", [relu(b, h), b.constant(columns), b.constant(b.weights((m,), 0.5))], (1, m), transB=1)


def bent(b: Builder, x: Value) -> Value:
    """Piecewise linear, one argument."""
    kind = str(b.rng.choice(["LeakyRelu", "PRelu", "Abs", "Clip"]))
    if kind == "LeakyRelu":
        return b.node(kind, [x], x.shape, alpha=float(np.float32(b.rng.choice([0.01, 0.25, 0.9, 1.5, -0.5]))))
    if kind == "PRelu":
        return b.node(kind, [x, b.constant(b.rng.choice([0.25, -0.5, 2.0, 0.1]))], x.shape)
    if kind == "Clip":
        low = float(b.rng.choice([-1.0, -0.5, 0.0]))
        return b.node(kind, [x, b.constant(low), b.constant(low + float(b.rng.choice([0.5, 1.0, 2.0])))], x.shape)
    return b.node(kind, [x], x.shape)


def extremum(b: Builder, x: Value) -> Value:
    """Largest of several."""
    kind = str(b.rng.choice(["Max", "Min", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "MaxConstant"]))
    if kind in ("MaxPool", "GlobalMaxPool"):
        return pool(b, x, kind)
    if kind.startswith("Reduce") and len(x.shape) > 1:
        axis = int(b.rng.integers(1, len(x.shape)))
        return b.node(kind, [x], tuple(1 if i == axis else s for i, s in enumerate(x.shape)), axes=[axis])
    if kind == "MaxConstant":
        return b.node("Max", [x, b.constant(b.weights(x.shape[-1:], 0.5))], x.shape)
    other = linear(b, x, x.size)
    x = flat(b, x)
    return b.node("Min" if "Min" in kind else "Max", [x, other], x.shape)


def smooth(b: Builder, x: Value) -> Value:
    kind = str(
        b.rng.choice(
            [
                *("Sigmoid", "Tanh", "Exp", "Erf", "Sin", "Cos", "Softplus", "Silu", "Gelu"),
                *("Sqrt", "Log", "Reciprocal"),
            ]
        )
    )
    if kind == "Exp":  # of something bounded, so that numbers stay small
        x = b.node("Clip", [x, b.constant(-4.0), b.constant(2.0)], x.shape)
    elif kind == "Silu":
        return b.node("Mul", [x, b.node("Sigmoid", [x], x.shape)], x.shape)
    elif kind == "Gelu":
        e = b.node("Erf", [b.node("Div", [x, b.constant(math.sqrt(2))], x.shape)], x.shape)
        one = b.node("Add", [e, b.constant(1.0)], x.shape)
        return b.node("Mul", [b.node("Mul", [x, one], x.shape), b.constant(0.5)], x.shape)
    elif kind in ("Sqrt", "Log", "Reciprocal"):
        inner = b.node("Mul", [x, x], x.shape) if b.rng.random() < 0.5 else b.node("Abs", [x], x.shape)
        x = b.node("Add", [inner, b.constant(float(b.rng.choice([0.25, 1.0])))], x.shape)
    return b.node(kind, [x], x.shape)


def product(b: Builder, x: Value) -> Value:
    x = flat(b, x)
    kind = str(b.rng.choice(["Mul", "Square", "Pow", "Div", "MatMul", "Gate"]))
    if kind == "Square":
        return b.node("Mul", [x, x], x.shape)
    if kind == "Pow":
        return b.node("Pow", [x, b.constant(float(b.rng.choice([2, 3])))], x.shape)
    if kind == "MatMul" and x.size <= 6:
        left = b.node("Reshape", [linear(b, x, x.size), b.ints(x.size, 1)], (x.size, 1))
        return flat(b, b.node("MatMul", [left, x], (x.size, x.size)))
    other = linear(b, x, x.size)
    if kind == "Div":
        square = b.node("Mul", [other, other], x.shape)
        return b.node("Div", [x, b.node("Add", [square, b.constant(0.5)], x.shape)], x.shape)
    if kind == "Gate":
        other = b.node("Sigmoid", [other], x.shape)
    return b.node("Mul", [x, other], x.shape)


def softmax(b: Builder, x: Value) -> Value:
    x = flat(b, x)
    return b.node("Softmax", [x], x.shape, axis=-1)


def step(b: Builder, x: Value) -> Value:
    kind = str(b.rng.choice(["Sign", "Floor", "Ceil", "Round", "Where"]))
    if kind == "Where":
        test = b.node(str(b.rng.choice(["Greater", "Less"])), [x, b.constant(b.weights((), 0.3))], x.shape)
        other = scale(b, x)
        return b.node("Where", [test, x, other], x.shape) if other.shape == x.shape else relu(b, x)
    return b.node(kind, [x], x.shape)


def pictures(rng: np.random.Generator, side: int = 0, channels: int = 0) -> onnx.ModelProto:
    """Convolutions that keep the size of a picture, with residual sums and differences, pools and a linear end.

    Args:
        side: height and width, 0: some.
    """
    b = Builder(rng)
    c, h, w = channels or int(rng.integers(1, 3)), side or int(rng.integers(2, 5)), side or int(rng.integers(2, 5))
    shape: Shape = (1, int(rng.integers(1, 3)), h, w)
    x = same(b, Value("X", shape), c)
    for _ in range(int(rng.integers(1, 4))):
        y = relu(b, x) if rng.random() < 0.6 else bent(b, x)
        y = same(b, y, c)
        if rng.random() < 0.3:
            y = batch_norm(b, y)
        x = b.node(str(rng.choice(["Add", "Sub"])), [x, y] if rng.random() < 0.5 else [y, x], x.shape)
        if rng.random() < 0.3:
            x = b.node("Mul", [x, b.constant(b.weights((c, 1, 1), 1.0))], x.shape)
    x = relu(b, x)
    if rng.random() < 0.5:
        x = pool(b, x, str(rng.choice(["AveragePool", "MaxPool", "GlobalAveragePool"])))
    if rng.random() < 0.5:
        x = relu(b, conv(b, x))
    return b.model(shape, linear(b, x, int(rng.integers(1, 3))))


def same(b: Builder, x: Value, channels: int) -> Value:
    """A convolution with an output of the same size; odd or even kernels, padded to fit."""
    kernel = [int(k) for k in b.rng.integers(1, 4, 2)]
    begin = [int(b.rng.integers(0, k)) for k in kernel]
    pads = [*begin, *[k - 1 - p for k, p in zip(kernel, begin, strict=True)]]
    n = x.shape[1]
    w = b.weights((channels, n, *kernel), 1.2 / math.sqrt(n * math.prod(kernel)))
    inputs = [x, b.constant(w), b.constant(b.weights((channels,), 0.4))]
    return b.node("Conv", inputs, (1, channels, *x.shape[2:]), pads=pads)


Layer = Callable[[Builder, Value], Value]

# What a family is made of, with weights.
FAMILIES: dict[str, list[tuple[float, Layer]]] = {
    "relu": [(4, relu), (1, paired)],
    "piecewise": [(3, relu), (0.5, paired), (2, bent), (1, extremum)],
    "smooth": [(3, smooth), (1, relu)],
    "product": [(2, product), (1, relu), (1, smooth)],
    "mixed": [(2, relu), (0.5, paired), (1, bent), (1, extremum), (1, smooth), (1, product), (0.5, softmax)],
    "steps": [(1, step), (2, relu)],
    "softmax": [(1, softmax), (1, relu), (1, smooth)],
    "affine": [],
}
# Families whose values are rational.
RATIONAL_FAMILIES = ("relu", "piecewise", "affine")


def random_network(
    rng: np.random.Generator, family: str, n_in: int = 0, depth: int = 0, n_out: int = 0, grid: int = 0, width: int = 0
) -> onnx.ModelProto:
    """A network of a family.

    Args:
        n_in: inputs, 0: some.
        depth: nonlinear layers, 0: some.
        grid: weights are multiples of 1/grid.
        width: of hidden layers of plain networks.
    """
    if family == "pictures":
        return pictures(rng)
    for _ in range(50):
        b = Builder(rng, grid=grid)
        shape: Shape = (1, n_in or int(rng.integers(1, 7)))
        if not n_in and rng.random() < 0.35:
            shape = (1, int(rng.integers(1, 3)), int(rng.integers(2, 5)), int(rng.integers(1, 4)))
        x = Value("X", shape)
        seen = [x]
        plain = bool(width) or rng.random() < 0.3
        for _ in range(depth or int(rng.integers(1, 4))):
            x = linear(b, x, width or int(rng.integers(2, 12))) if plain else _affine(b, x)
            x = _nonlinear(b, x, family)
            x = _joined(b, x, seen, family)
            seen.append(x)
            if x.size > MOST:
                break
        out = linear(b, x, n_out or int(rng.integers(1, 4)))
        if x.size <= 2 * MOST:
            return b.model(shape, out)
    raise AssertionError("no small network came")


def _affine(b: Builder, x: Value) -> Value:
    for _ in range(int(b.rng.integers(1, 3))):
        name = str(b.rng.choice(list(AFFINE), p=[0.3, 0.25, 0.08, 0.07, 0.07, 0.08, 0.15]))
        x = AFFINE[name](b, x)
    return x


def _nonlinear(b: Builder, x: Value, family: str) -> Value:
    layers = FAMILIES[family]
    if not layers:
        return scale(b, x)
    weights = np.array([w for w, _ in layers])
    return layers[int(b.rng.choice(len(layers), p=weights / weights.sum()))][1](b, x)


def _joined(b: Builder, x: Value, seen: list[Value], family: str) -> Value:
    """Sometimes an earlier value comes in again."""
    if b.rng.random() > 0.35:
        return x
    other = seen[int(b.rng.integers(0, len(seen)))]
    if other.shape != x.shape:
        if b.rng.random() < 0.5:
            return x
        if b.rng.random() < 0.3 and x.size + other.size <= MOST:
            x, other = flat(b, x), flat(b, other)
            return b.node("Concat", [other, x], (1, x.size + other.size), axis=1)
        other, x = linear(b, other, x.size), flat(b, x)
    return b.node(str(b.rng.choice(["Add", "Add", "Sub"])), [x, other], x.shape)


Layers = list[tuple[np.ndarray, np.ndarray]]


def layers(rng: np.random.Generator, widths: Sequence[int]) -> Layers:
    """Weights (m, n) and biases (m,) of a plain network with these widths, inputs first; float32."""
    b = Builder(rng)
    gain = float(rng.choice([1.0, 1.5, 2.5]))
    sizes = itertools.pairwise(widths)
    return [(b.weights((m, n), gain / math.sqrt(n)), b.weights((m,), 0.5)) for n, m in sizes]


def perceptron(layers: Layers) -> onnx.ModelProto:
    """The plain ReLU network of some layers."""
    b = Builder(np.random.default_rng(0))
    shape = (1, layers[0][0].shape[1])
    x = Value("X", shape)
    for k, (w, bias) in enumerate(layers):
        x = relu(b, x) if k else x
        x = b.node("Gemm", [x, b.constant(w), b.constant(bias)], (1, len(bias)), transB=1)
    return b.model(shape, x)
