"""What ONNX nodes mean, as affine, unary and product steps.

Nodes that only move elements are applied to an array of indices, by numpy. Nodes without a variable input are
computed as constants, in the types of the file, and only by operations that IEEE 754 defines to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from proofcheck.failures import NotCovered, Refused, require
from proofcheck.maps import Convolution, Dense, LinearMap, Pick, Scale
from proofcheck.network import MOST_ELEMENTS, Affine, Network, Outside, Unary

_LOOSE = 2.0**-49  # of a factor that took at most four float64 operations
_UNARY = {"Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Reciprocal": "reciprocal"}
_EXACT = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Neg": np.negative}


class Translator:
    """Adds the steps of one ONNX node after another to a network."""

    def __init__(self, network: Network, constants: dict[str, np.ndarray], opset: int, outside: Outside) -> None:
        self.network, self.constants, self.opset, self.outside = network, constants, opset, outside

    def translate(self, node: onnx.NodeProto, where: str) -> None:
        """Add a node. Anything unforeseen in it is refused, whatever the exception."""
        attributes = {a.name: self._attribute(a, where) for a in node.attribute}
        method = getattr(self, f"op_{node.op_type.lower()}", None) if node.op_type[:1].isupper() else None
        moves = _MOVES.get(node.op_type)
        if not (method or moves or node.op_type in _EXACT or node.op_type in _UNARY or node.op_type in _CONSTANT):
            raise NotCovered(f"{where}: unknown operation")
        try:
            if all(n in self.constants or not n for n in node.input):
                self._constant(node, attributes, where)
            elif moves:
                self._move(node, moves, attributes, where)
            elif node.op_type in _UNARY:
                self._add_unary(node.output[0], node.input[0], _UNARY[node.op_type])
            elif method:
                method(node, attributes, where)
            else:
                raise NotCovered(f"{where}: of a variable")
        except (NotCovered, Refused):
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise Refused(f"{where}: {type(error).__name__}: {error}") from None

    def _attribute(self, attribute: onnx.AttributeProto, where: str) -> object:
        if attribute.type == onnx.AttributeProto.TENSOR:
            return self.outside.array(attribute.t)
        if attribute.type not in (1, 2, 3, 6, 7):
            raise NotCovered(f"{where}: attribute {attribute.name}")
        return onnx.helper.get_attribute_value(attribute)

    # --- constants

    def _constant(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        values: list = [self.constants[n] if n else None for n in node.input]
        if node.op_type == "Constant":
            if set(attributes) - {"value", "value_float", "value_int", "value_floats", "value_ints"}:
                raise NotCovered(f"{where}: attributes {sorted(attributes)}")
            ((name, value),) = attributes.items()
            out = [value if name == "value" else np.array(value, np.float32 if "float" in name else np.int64)]
        elif node.op_type in _MOVES:
            out = _MOVES[node.op_type](values, attributes, len(node.output))
        elif node.op_type in _EXACT:
            require(all(v.dtype == values[0].dtype for v in values), f"{where}: mixed types")
            if node.op_type == "Div" and values[0].dtype.kind != "f":
                raise NotCovered(f"{where}: integers")
            out = [_EXACT[node.op_type](*values)]
        elif node.op_type in _CONSTANT:
            out = [_CONSTANT[node.op_type](values, attributes)]
        else:
            raise NotCovered(f"{where}: of constants")
        for name, value in zip(node.output, out, strict=False):
            require(value.size <= MOST_ELEMENTS, f"{where}: too large")
            require(value.dtype.kind != "f" or np.isfinite(value).all(), f"{where}: not finite")
            self.constants[name] = value

    def _number(self, name: str) -> np.ndarray:
        """A float constant, exact in float64."""
        value = self.constants[name]
        if value.dtype.kind != "f":
            raise NotCovered(f"constant {name} of type {value.dtype}")
        return value.astype(np.float64)

    def op_shape(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        if attributes:
            raise NotCovered(f"{where}: a part of a shape")
        self.constants[node.output[0]] = np.array(self.network.shapes[node.input[0]], np.int64)

    # --- steps

    def _variable(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that depends on the input."""
        return self.network.shapes[name]

    def _add(
        self,
        out: str,
        shape: tuple[int, ...],
        terms: list[tuple[str, LinearMap]],
        bias: np.ndarray | None = None,
        loose: float = 0.0,
    ) -> None:
        size = math.prod(shape)
        require(0 < size <= MOST_ELEMENTS, f"tensor {out}: {size} elements")
        for name, m in terms:
            require(m.n_out == size and m.n_in == math.prod(self._variable(name)), f"tensor {out}: sizes do not fit")
        if bias is not None:
            bias = np.ascontiguousarray(np.broadcast_to(bias, shape), dtype=np.float64).ravel()
        self.network.shapes[out] = tuple(int(d) for d in shape)
        self.network.steps.append(Affine(out, tuple(terms), bias, loose))

    def _add_unary(
        self, out: str, source: str, function: str, knots: tuple = (), slopes: tuple = (), first: float = 0.0
    ) -> None:
        self.network.shapes[out] = self._variable(source)
        self.network.steps.append(Unary(out, source, function, knots, slopes, first))

    def _move(self, node: onnx.NodeProto, moves: Callable, attributes: dict, where: str) -> None:
        """Apply the node to indices: one number per element of every variable, -1 for a padded zero."""
        names = [n for n in node.input if n and n not in self.constants]
        if node.op_type != "Concat" and names != [node.input[0]]:
            raise NotCovered(f"{where}: how elements move depends on the input")
        starts = np.cumsum([0, *(math.prod(self._variable(n)) for n in names)])
        values: list = []
        consts = [n for n in node.input if n in self.constants]
        mixed = node.op_type == "Concat" and consts
        table = []  # constants that are joined with variables have indices below -1
        for n in node.input:
            if n in names:
                shape, at = self._variable(n), starts[names.index(n)]
                values.append(np.arange(at, at + math.prod(shape)).reshape(shape))
            elif n and mixed:
                value = self._number(n)
                values.append(-2 - sum(t.size for t in table) - np.arange(value.size).reshape(value.shape))
                table.append(value.ravel())
            else:
                values.append(self.constants[n] if n else None)
        every = np.concatenate(table) if table else np.zeros(0)
        for name, index in zip(node.output, moves(values, attributes, len(node.output)), strict=False):
            if not name:
                continue
            flat, terms = index.ravel(), []
            for n, a, b in zip(names, starts[:-1], starts[1:], strict=True):
                own = (flat >= a) & (flat < b)
                if own.any():
                    terms.append((n, Pick(np.where(own, flat - a, -1), int(b - a))))
            bias = np.where(flat < -1, every[np.clip(-2 - flat, 0, every.size - 1)], 0.0) if table else None
            self._add(name, index.shape, terms, None if bias is None else bias.reshape(index.shape))

    def _spread(self, name: str, shape: tuple[int, ...]) -> Pick:
        """Broadcast a variable."""
        own = self._variable(name)
        return Pick(np.broadcast_to(np.arange(math.prod(own)).reshape(own), shape), math.prod(own))

    def _signed(self, node: onnx.NodeProto, sign: float) -> None:
        shapes = [self._variable(n) if n not in self.constants else self.constants[n].shape for n in node.input]
        shape = np.broadcast_shapes(*shapes)
        terms, bias, size = [], None, math.prod(shape)
        for n, s in zip(node.input, (1.0, sign), strict=True):
            if n in self.constants:
                bias = s * self._number(n)
            elif s == 1.0:
                terms.append((n, self._spread(n, shape)))
            else:
                self._add(f"{node.output[0]}#minus", shape, [(n, self._spread(n, shape))])
                terms.append((f"{node.output[0]}#minus", Scale(np.full(size, s))))
        self._add(node.output[0], shape, terms, bias)

    def op_add(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._signed(node, 1.0)

    def op_sub(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._signed(node, -1.0)

    def op_neg(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._scaled(node.output[0], node.input[0], np.array(-1.0))

    def _scaled(
        self, out: str, source: str, by: np.ndarray, loose: float = 0.0, bias: np.ndarray | None = None
    ) -> None:
        shape = np.broadcast_shapes(self._variable(source), by.shape)
        if shape != self._variable(source):
            self._add(f"{out}#spread", shape, [(source, self._spread(source, shape))])
            source = f"{out}#spread"
        self._add(out, shape, [(source, Scale(np.broadcast_to(by, shape)))], bias, loose)

    def op_mul(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        a, b = node.input
        if a in self.constants or b in self.constants:
            self._scaled(node.output[0], *((b, self._number(a)) if a in self.constants else (a, self._number(b))))
            return
        raise NotCovered(f"{where}: of two variables")

    def op_div(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        a, b = node.input
        if b not in self.constants:
            raise NotCovered(f"{where}: division by a variable")
        by = self._number(b)
        require((by != 0).all(), f"{where}: division by zero")
        inverse = 1.0 / by
        require(np.isfinite(inverse).all() and (np.abs(inverse) > 1e-200).all(), f"{where}: divisor out of range")
        self._scaled(node.output[0], a, inverse, _LOOSE)

    # --- dense and convolutional layers

    def op_matmul(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        a, b = node.input
        if b in self.constants:
            self._right(node.output[0], a, self._number(b), where)
        else:
            raise NotCovered(f"{where}: a variable as the second factor")

    def _right(
        self, out: str, source: str, w: np.ndarray, where: str, bias: np.ndarray | None = None, loose: float = 0.0
    ) -> None:
        shape = self._variable(source)
        if w.ndim != 2:
            raise NotCovered(f"{where}: a weight with {w.ndim} axes")
        require(shape[-1:] == w.shape[:1], f"{where}: sizes {shape} and {w.shape}")
        self._add(out, (*shape[:-1], w.shape[1]), [(source, Dense(w, math.prod(shape[:-1])))], bias, loose)

    def op_gemm(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        alpha, beta = float(attributes.get("alpha", 1.0)), float(attributes.get("beta", 1.0))
        source, weight = node.input[:2]
        if weight not in self.constants or source in self.constants or (len(node.input) > 2 and node.input[2] and (
                node.input[2] not in self.constants)):  # fmt: skip
            raise NotCovered(f"{where}: weights that depend on the input")
        if len(self._variable(source)) != 2 or attributes.get("transA", 0):
            raise NotCovered(f"{where}: shape {self._variable(source)}")
        w = self._number(weight)
        w = alpha * (w.T if attributes.get("transB", 0) else w)
        bias = beta * self._number(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        loose = 0.0 if alpha == 1.0 and beta == 1.0 else _LOOSE
        self._right(node.output[0], source, np.ascontiguousarray(w), where, bias, loose)

    def _windows(
        self, attributes: dict, axes: int, inside: tuple[int, ...], kernel: tuple[int, ...], where: str
    ) -> tuple:
        """Strides, pads and dilations of a window node."""
        auto = attributes.get("auto_pad", b"NOTSET")
        strides = tuple(attributes.get("strides", [1] * axes))
        dilations = tuple(attributes.get("dilations", [1] * axes))
        flat = list(attributes.get("pads", [0] * (2 * axes)))
        if auto not in (b"NOTSET", b"VALID") or attributes.get("ceil_mode", 0):
            raise NotCovered(f"{where}: automatic padding or ceil_mode")
        if auto == b"VALID":
            flat = [0] * (2 * axes)
        require(
            len(strides) == len(dilations) == axes == len(kernel) and len(flat) == 2 * axes
            and min(strides) >= 1 and min(dilations) >= 1 and min(flat) >= 0 and min(kernel) >= 1,
            f"{where}: strides, pads or dilations",
        )  # fmt: skip
        pads = tuple(zip(flat[:axes], flat[axes:], strict=True))
        fits = (s + a + b >= (k - 1) * d + 1 for s, (a, b), k, d in zip(inside, pads, kernel, dilations, strict=True))
        require(all(fits), f"{where}: the kernel is larger than the padded input")
        return strides, pads, dilations

    def op_conv(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        if any(n not in self.constants for n in node.input[1:] if n):
            raise NotCovered(f"{where}: weights that depend on the input")
        w, shape, groups = self._number(node.input[1]), self._variable(node.input[0]), int(attributes.get("group", 1))
        require(w.ndim == len(shape) >= 3 and groups >= 1, f"{where}: shapes {w.shape} and {shape}")
        require(shape[0] == 1 or w.ndim >= 3, f"{where}: shape {shape}")
        require(w.shape[0] % groups == 0 and w.shape[1] * groups == shape[1], f"{where}: groups")
        geometry = self._windows(attributes, w.ndim - 2, shape[2:], w.shape[2:], where)
        if "kernel_shape" in attributes:
            require(tuple(attributes["kernel_shape"]) == w.shape[2:], f"{where}: kernel_shape")
        if shape[0] != 1:
            raise NotCovered(f"{where}: {shape[0]} images at a time")
        m = Convolution(w.reshape(groups, w.shape[0] // groups, *w.shape[1:]), shape[2:], *geometry)
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = self._number(node.input[2]).reshape(-1, *[1] * (w.ndim - 2))
        self._add(node.output[0], (1, w.shape[0], *m.outside), [(node.input[0], m)], bias)

    def op_batchnormalization(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        if (
            attributes.get("training_mode", 0)
            or not attributes.get("spatial", 1)
            or len([n for n in node.output if n]) != 1
        ):
            raise NotCovered(f"{where}: in training mode")
        scale, bias, mean, variance = (self._number(n) for n in node.input[1:5])
        shape, out = self._variable(node.input[0]), node.output[0]
        require(all(v.shape == (shape[1],) for v in (scale, bias, mean, variance)), f"{where}: shapes")
        epsilon = float(np.float32(attributes.get("epsilon", 1e-5)))
        require((variance >= 0).all() and epsilon > 0, f"{where}: variance")
        column = (-1, *[1] * (len(shape) - 2))
        self._add(f"{out}#centred", shape, [(node.input[0], self._spread(node.input[0], shape))], -mean.reshape(column))
        factor = (scale / np.sqrt(variance + epsilon)).reshape(column)  # four roundings, each of relative 2^-53
        self._scaled(out, f"{out}#centred", factor, _LOOSE, bias.reshape(column))

    def op_averagepool(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        kernel = tuple(attributes["kernel_shape"])
        self._average(node, kernel, attributes, bool(attributes.get("count_include_pad", 0)), where)

    def op_globalaveragepool(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._average(node, self._variable(node.input[0])[2:], {}, True, where)

    def _average(self, node: onnx.NodeProto, kernel: tuple, attributes: dict, padded: bool, where: str) -> None:
        shape, out, axes = self._variable(node.input[0]), node.output[0], len(kernel)
        require(len(shape) == axes + 2 and shape[0] == 1, f"{where}: shape {shape}")
        geometry = self._windows(attributes, axes, shape[2:], kernel, where)
        m = Convolution(np.ones((shape[1], 1, 1, *kernel)), shape[2:], *geometry)
        sums = (1, shape[1], *m.outside)
        self._add(f"{out}#sum", sums, [(node.input[0], m)])
        ones = np.ones((1, m.n_in))
        count = np.full(sums, float(math.prod(kernel))) if padded else m.apply(m.weight, ones).reshape(sums)
        require((count >= 1).all(), f"{where}: a window of padding alone")
        exact = bool((np.frexp(count)[0] == 0.5).all())  # powers of two
        self._scaled(out, f"{out}#sum", 1.0 / count, 0.0 if exact else _LOOSE)

    # --- piecewise linear functions

    def op_relu(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._add_unary(node.output[0], node.input[0], "linear pieces", (0.0,), (0.0, 1.0))

    def op_abs(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        self._add_unary(node.output[0], node.input[0], "linear pieces", (0.0,), (-1.0, 1.0))

    def op_leakyrelu(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        slope = float(np.float32(attributes.get("alpha", 0.01)))
        self._add_unary(node.output[0], node.input[0], "linear pieces", (0.0,), (slope, 1.0))

    def op_clip(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        ends = []
        for at, name in ((1, "min"), (2, "max")):
            given = len(node.input) > at and node.input[at]
            value = self._number(node.input[at]) if given else attributes.get(name)
            if value is None or np.size(value) != 1:
                raise NotCovered(f"{where}: without one {name}")
            ends.append(float(np.float32(value)) if not given else float(np.ravel(value)[0]))
        require(ends[0] <= ends[1], f"{where}: min above max")
        self._add_unary(node.output[0], node.input[0], "linear pieces", tuple(ends), (0.0, 1.0, 0.0), ends[0])

    def op_pow(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        if node.input[1] not in self.constants or not np.array_equal(np.ravel(self.constants[node.input[1]]), [2]):
            raise NotCovered(f"{where}: another power than 2")
        self._add_unary(node.output[0], node.input[0], "square")

    def op_max(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        """max(a, b) = b + relu(a - b)."""
        if len(node.input) != 2 or any(n in self.constants for n in node.input):
            raise NotCovered(f"{where}: of constants, or not of two tensors")
        (a, b), out = node.input, node.output[0]
        shape = np.broadcast_shapes(self._variable(a), self._variable(b))
        self._add(f"{out}#b", shape, [(b, self._spread(b, shape))])
        self._maximum(out, shape, (a, self._spread(a, shape)), f"{out}#b")

    def _maximum(self, out: str, shape: tuple[int, ...], a: tuple[str, LinearMap], b: str) -> None:
        one = Scale(np.ones(math.prod(shape)))
        self._add(f"{out}#less", shape, [a, (b, Scale(-one.weight))])
        self._add_unary(f"{out}#bend", f"{out}#less", "linear pieces", (0.0,), (0.0, 1.0))
        self._add(out, shape, [(f"{out}#bend", one), (b, one)])

    def op_maxpool(self, node: onnx.NodeProto, attributes: dict, where: str) -> None:
        """Maxima of two at a time over the positions of the window."""
        kernel, shape, out = tuple(attributes["kernel_shape"]), self._variable(node.input[0]), node.output[0]
        require(len(shape) == len(kernel) + 2, f"{where}: shape {shape}")
        strides, pads, dilations = self._windows(attributes, len(kernel), shape[2:], kernel, where)
        if (
            any(p != (0, 0) for p in pads)
            or len([n for n in node.output if n]) != 1
            or attributes.get("storage_order", 0)
        ):
            raise NotCovered(f"{where}: with padding or indices")
        m = Convolution(np.ones((1, 1, 1, *kernel)), shape[2:], strides, pads, dilations)
        index = np.arange(math.prod(shape)).reshape(shape)
        last, final = "", (*shape[:2], *m.outside)
        windows = m._windows()
        for i, (_, window) in enumerate(windows):
            part = index[(..., *window)]
            own = Pick(part, index.size)
            if not i:
                last = f"{out}#0" if len(windows) > 1 else out
                self._add(last, final, [(node.input[0], own)])
                continue
            new = f"{out}#{i}" if i + 1 < len(windows) else out
            self._maximum(new, final, (node.input[0], own), last)
            last = new


# Operations that move elements: functions of (inputs, attributes, number of outputs) that return the outputs.


def _list(values: list, at: int, attributes: dict, name: str) -> list[int] | None:
    """A list of integers that is an input in new operator sets and an attribute in old ones."""
    if len(values) > at and values[at] is not None:
        require(values[at].dtype.kind in "iu", f"{name} are not integers")
        return [int(v) for v in values[at].ravel()]
    return None if attributes.get(name) is None else [int(v) for v in attributes[name]]


def _same(values: list, attributes: dict, count: int) -> list:
    if len(values) > 2 and values[2] is not None and np.any(values[2]):
        raise NotCovered("Dropout in training mode")
    return [values[0]]


def _flatten(values: list, attributes: dict, count: int) -> list:
    axis, shape = int(attributes.get("axis", 1)), values[0].shape
    axis += len(shape) if axis < 0 else 0
    require(0 <= axis <= len(shape), "axis of Flatten")
    return [values[0].reshape(math.prod(shape[:axis]), -1)]


def _reshape(values: list, attributes: dict, count: int) -> list:
    wanted = _list(values, 1, attributes, "shape")
    if wanted is None or attributes.get("allowzero", 0):
        raise NotCovered("Reshape without a shape, or with allowzero")
    return [values[0].reshape([values[0].shape[i] if d == 0 else d for i, d in enumerate(wanted)])]


def _squeeze(values: list, attributes: dict, count: int) -> list:
    axes = _list(values, 1, attributes, "axes")
    return [np.squeeze(values[0], None if axes is None else tuple(axes))]


def _unsqueeze(values: list, attributes: dict, count: int) -> list:
    return [np.expand_dims(values[0], tuple(_list(values, 1, attributes, "axes") or ()))]


def _transpose(values: list, attributes: dict, count: int) -> list:
    return [np.transpose(values[0], attributes.get("perm"))]


def _concat(values: list, attributes: dict, count: int) -> list:
    return [np.concatenate(values, int(attributes["axis"]))]


def _slice(values: list, attributes: dict, count: int) -> list:
    starts, ends = _list(values, 1, attributes, "starts"), _list(values, 2, attributes, "ends")
    if starts is None or ends is None:
        raise NotCovered("Slice without starts and ends")
    axes = _list(values, 3, attributes, "axes") or list(range(len(starts)))
    steps = _list(values, 4, {}, "steps") or [1] * len(starts)
    require(len(starts) == len(ends) == len(axes) == len(steps) and 0 not in steps, "lengths or steps of Slice")
    rank = values[0].ndim
    require(all(-rank <= a < rank for a in axes) and len({a % rank for a in axes}) == len(axes), "axes of Slice")
    out = [slice(None)] * rank
    for axis, a, b, step in zip(axes, starts, ends, steps, strict=True):
        size = values[0].shape[axis]
        stop = None if step < 0 and b < -size else b  # far below the first element: to the beginning
        out[axis] = slice(a, stop, step)
    return [values[0][tuple(out)]]


def _gather(values: list, attributes: dict, count: int) -> list:
    axis, index = int(attributes.get("axis", 0)), values[1]
    size = values[0].shape[axis]
    require(index.dtype.kind in "iu" and ((index >= -size) & (index < size)).all(), "indices of Gather")
    return [np.take(values[0], index, axis)]


def _split(values: list, attributes: dict, count: int) -> list:
    axis = int(attributes.get("axis", 0))
    size = values[0].shape[axis]
    sizes = _list(values, 1, attributes, "split")
    if sizes is None:
        each = -(-size // count)
        sizes = [min(each, size - i * each) for i in range(count)]
    require(len(sizes) == count and min(sizes) >= 0 and sum(sizes) == size, "sizes of Split")
    return np.split(values[0], np.cumsum(sizes)[:-1], axis)


def _pad(values: list, attributes: dict, count: int) -> list:
    pads = _list(values, 1, attributes, "pads")
    value = values[2] if len(values) > 2 and values[2] is not None else attributes.get("value", 0.0)
    rank = values[0].ndim
    if pads is None or attributes.get("mode", b"constant") != b"constant" or np.any(value) or len(values) > 3:
        raise NotCovered("Pad with another mode, value or axes")
    require(len(pads) == 2 * rank and min(pads) >= 0, "pads")
    fill = -1 if values[0].dtype.kind == "i" else 0
    return [np.pad(values[0], list(zip(pads[:rank], pads[rank:], strict=True)), constant_values=fill)]


def _expand(values: list, attributes: dict, count: int) -> list:
    shape = np.broadcast_shapes(values[0].shape, tuple(_list(values, 1, attributes, "shape") or ()))
    require(math.prod(shape) <= MOST_ELEMENTS, "Expand to too many elements")
    return [np.broadcast_to(values[0], shape)]


_MOVES: dict[str, Callable[[list, dict, int], list]] = {
    "Identity": _same, "Dropout": _same, "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Concat": _concat, "Slice": _slice, "Gather": _gather,
    "Split": _split, "Pad": _pad, "Expand": _expand,
}  # fmt: skip


def _cast(values: list, attributes: dict) -> np.ndarray:
    to = {1: np.float32, 11: np.float64, 6: np.int32, 7: np.int64}.get(int(attributes["to"]))
    if to is None or (np.dtype(to).kind == "i" and values[0].dtype.kind == "f"):
        raise NotCovered("Cast of a constant to this type")
    return values[0].astype(to)


def _constantofshape(values: list, attributes: dict) -> np.ndarray:
    shape = [int(d) for d in values[0]]
    require(min(shape, default=1) >= 0 and math.prod(shape) <= MOST_ELEMENTS, "shape of ConstantOfShape")
    return np.full(shape, np.ravel(attributes.get("value", np.zeros(1, np.float32)))[0])


_CONSTANT: dict[str, Callable[[list, dict], np.ndarray]] = {
    "Constant": lambda values, attributes: values[0],
    "Cast": _cast,
    "ConstantOfShape": _constantofshape,
    "Shape": lambda values, attributes: np.array(values[0].shape, np.int64),
}
