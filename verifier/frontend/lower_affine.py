"""Translators of ATen ops that are affine in the values that depend on the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from verifier.frontend.builder import broadcast
from verifier.frontend.capture import Call, Ref
from verifier.frontend.lower_shape import reshaped
from verifier.frontend.lowering import CannotLower, Lowering, Translator, constant, finite
from verifier.ops.add import Add
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear, MatMulConstant
from verifier.ops.product import MatMul
from verifier.ops.reduce import AvgPool, Mean, Sum
from verifier.ops.scale import ScaleShift

# Of the scale: variance plus eps, root, quotient; of the shift: a product and a difference more.
BATCH_NORM_ROUNDINGS = 5


def scalar(s: Lowering, a: Any) -> float:
    """A Python number as the call at hand sees it: rounded to the type that it computes in."""
    return float(torch.tensor(a, dtype=torch.float64).to(s.dtype))


def operand(s: Lowering, a: Any) -> Tensor:
    """A constant operand, a stored tensor or a Python number, as the call at hand sees it; all finite."""
    return finite(any_operand(s, a))


def any_operand(s: Lowering, a: Any) -> Tensor:
    """The same, finite or not."""
    if isinstance(a, Ref):
        raise CannotLower("an operand that depends on the input where a constant is needed")
    return torch.as_tensor(a, dtype=torch.float64).to(s.dtype).to(torch.float64)


def shifted(s: Lowering, x: int, c: Tensor, name: str, folded: int = 0, magnitude: Tensor | None = None) -> int:
    """x + c with broadcasting; ``folded`` roundings made c, of terms whose magnitudes sum up to ``magnitude``."""
    if not folded and not torch.any(c != 0) and broadcast(c.shape, s.shape(x)) == s.shape(x):
        return x
    shape = broadcast(s.shape(x), c.shape)
    size = None if magnitude is None else s.param(magnitude, f"{name}.shift_magnitude")
    return s.emit(ScaleShift(None, s.param(c, f"{name}.shift"), size, folded), [x], shape, name)


def times(s: Lowering, c: Tensor, factor: float) -> tuple[Tensor, int]:
    """factor c for constants, and how often it was rounded: in float64 products of two float32 numbers are exact."""
    exact = s.dtype == torch.float32 or abs(math.frexp(factor)[0]) == 0.5
    return c * factor, 0 if exact else 1


def scaled(s: Lowering, x: int, c: Tensor, name: str, exact: bool = True) -> int:
    """c x with broadcasting; ``exact`` is False when c was rounded."""
    shape = broadcast(s.shape(x), c.shape)
    if shape == s.shape(x) and bool(torch.all(c == 1)):
        return x
    if shape == s.shape(x) and bool(torch.all(c == -1)):
        return s.emit(Add((-1.0,)), [x], shape, name)
    handle = s.param(c, f"{name}.scale")
    return s.emit(ScaleShift(handle, folded=0 if exact else 1), [x], shape, name)


def combine(s: Lowering, x: Any, y: Any, factor: float, name: str) -> int:
    """x + factor y, of which at least one depends on the input."""
    a, b = s.node(x), s.node(y)
    if a is not None and b is not None:
        shape = broadcast(s.shape(a), s.shape(b))
        return s.emit(Add((1.0, factor)), [a, b], shape, name)
    if a is not None:
        moved, rounded = times(s, operand(s, y), factor)
        return shifted(s, a, moved, name, rounded)
    assert b is not None
    c = operand(s, x)
    if not torch.any(c != 0) and broadcast(c.shape, s.shape(b)) == s.shape(b):
        return scaled(s, b, torch.tensor(factor, dtype=torch.float64), name)
    inner = b if factor == 1 else scaled(s, b, torch.tensor(factor, dtype=torch.float64), f"{name}/scaled")
    return shifted(s, inner, c, name)


def add(s: Lowering, call: Call) -> int:
    masked = _masked_sum(s, call)
    if masked is not None:
        return masked
    return combine(s, call.args["self"], call.args["other"], scalar(s, call.args["alpha"]), call.names[0])


def _masked_sum(s: Lowering, call: Call) -> int | None:
    """A sum one of whose operands has elements that are minus infinity: there it is minus infinity as well."""
    x, y, name = call.args["self"], call.args["other"], call.names[0]
    masks = [m for m in (s.infinite(x), s.infinite(y)) if m is not None]
    if s.node(x) is None:
        x, y = y, x
    c = any_operand(s, y) if s.node(y) is None else None
    if c is not None and bool((c == -math.inf).any()):
        masks.append(c == -math.inf)
        c = torch.where(c == -math.inf, 0.0, c)
    if not masks:
        return None
    if call.args["alpha"] != 1:
        raise CannotLower("a difference with numbers that are infinite")
    shape = broadcast(*(m.shape for m in masks), call.shapes[0])
    whole = torch.zeros(shape, dtype=torch.bool)
    for m in masks:
        whole = whole | m
    s.made[0] = whole
    if c is None:
        return combine(s, x, y, 1.0, name)
    return shifted(s, s.the_node(x), finite(c), name)


def sub(s: Lowering, call: Call) -> int:
    return combine(s, call.args["self"], call.args["other"], -scalar(s, call.args["alpha"]), call.names[0])


def rsub(s: Lowering, call: Call) -> int:
    if call.args["alpha"] != 1:
        raise CannotLower("rsub with alpha")
    return combine(s, call.args["other"], call.args["self"], -1.0, call.names[0])


def neg(s: Lowering, call: Call) -> int:
    x = s.the_node(call.args["self"])
    return s.emit(Add((-1.0,)), [x], s.shape(x), call.names[0])


def inverse(c: Tensor) -> tuple[Tensor, bool]:
    """1 / c and whether it is exact."""
    if bool(torch.any(c == 0)):
        raise CannotLower("division by zero")
    r = 1 / c
    mantissa, _ = torch.frexp(c)
    return r, bool(torch.all(mantissa.abs() == 0.5))


def linear(s: Lowering, x: int, weight: Tensor, bias: Tensor | None, name: str, factor: float = 1.0) -> int:
    """x W^T + b on the last dim.

    Args:
        factor: that the weight was multiplied by.
    """
    b = None if bias is None else s.param(bias, f"{name}.bias")
    size = abs(factor)
    reach = max(size, 1 / size) if size else math.inf
    op = Linear(s.param(weight, f"{name}.weight"), b, folded=0 if size == 1 else 1, reach=reach)
    return s.emit(op, [x], (*s.shape(x)[:-1], weight.shape[0]), name)


def product(s: Lowering, x: Any, y: Any, name: str, factor: float = 1.0, bias: Tensor | None = None) -> int:
    """factor x @ y + bias for operands of at least two dims; bias (out,) may only be given when x is the value."""
    a, b = s.node(x), s.node(y)
    exact = abs(factor) == 1
    if a is not None and b is not None:
        out = matmul(s, a, b, name if exact and factor == 1 and bias is None else f"{name}/product")
        out = scaled(s, out, torch.tensor(factor, dtype=torch.float64), f"{name}/scaled")
        return out if bias is None else shifted(s, out, bias, name)
    if a is not None:
        w = constant(y) * factor
        if w.dim() == 2:
            return linear(s, a, w.t(), bias, name, factor)
        if bias is None and bool(torch.all(w == w.reshape(-1, *w.shape[-2:])[0])):
            return linear(s, a, w.reshape(-1, *w.shape[-2:])[0].t(), None, name, factor)
        shape = (*broadcast(s.shape(a)[:-2], w.shape[:-2]), s.shape(a)[-2], w.shape[-1])
        out = s.emit(MatMulConstant(s.param(constant(y), f"{name}.weight")), [a], shape, name)
    else:
        assert b is not None
        w = constant(x)
        shape = (*broadcast(s.shape(b)[:-2], w.shape[:-2]), w.shape[-2], s.shape(b)[-1])
        out = s.emit(MatMulConstant(s.param(w, f"{name}.weight"), left=True), [b], shape, name)
    out = scaled(s, out, torch.tensor(factor, dtype=torch.float64), f"{name}/scaled")
    return out if bias is None else shifted(s, out, bias, f"{name}/shifted")


def matmul(s: Lowering, a: int, b: int, name: str) -> int:
    """Matrix product of two values of equal leading dims."""
    return s.emit(MatMul(), [a, b], (*s.shape(a)[:-1], s.shape(b)[-1]), name)


def mm(s: Lowering, call: Call) -> int:
    second = call.args["mat2"]
    return product(s, call.args["self"], second, call.names[0])


def addmm(s: Lowering, call: Call) -> int:
    first, second = call.args.get("mat1", call.args.get("batch1")), call.args.get("mat2", call.args.get("batch2"))
    alpha, beta, c = scalar(s, call.args["alpha"]), scalar(s, call.args["beta"]), call.args["self"]
    name = call.names[0]
    if s.node(c) is not None:
        if s.node(first) is None and s.node(second) is None:
            moving = scaled(s, s.the_node(c), torch.tensor(beta, dtype=torch.float64), f"{name}/scaled")
            left, right = constant(first), constant(second)
            size = torch.matmul(left.abs(), right.abs()) * abs(alpha)
            return shifted(s, moving, torch.matmul(left, right) * alpha, name, left.shape[-1] + 1, size)
        out = product(s, first, second, f"{name}/product", alpha)
        return s.emit(Add((1.0, beta)), [out, s.the_node(c)], call.shapes[0], name)
    given = any_operand(s, c)
    if beta == 1 and bool((given == -math.inf).any()):
        s.made[0] = (given == -math.inf).expand(call.shapes[0])
        given = torch.where(given == -math.inf, 0.0, given)
    c, rounded = times(s, finite(given), beta)
    row = c.dim() == 0 or c.numel() == c.shape[-1]
    value_first = s.node(first) is not None and s.node(second) is None
    if row and value_first:
        bias = c.reshape(-1).expand(call.shapes[0][-1])
        if abs(beta) == 1:
            return product(s, first, second, name, alpha, bias)
    out = product(s, first, second, f"{name}/product", alpha)
    return shifted(s, out, c, name, rounded)


def mv(s: Lowering, call: Call) -> int:
    matrix, vector, name = call.args["self"], call.args["vec"], call.names[0]
    if s.node(matrix) is None:
        return linear(s, s.the_node(vector), constant(matrix), None, name)
    if s.node(vector) is not None:
        v = s.the_node(vector)
        column = reshaped(s, v, (*s.shape(v), 1), f"{name}/column")
        s.node_of[-1] = column
        out = product(s, matrix, Ref(-1), f"{name}/product")
    else:
        out = linear(s, s.the_node(matrix), constant(vector)[None], None, f"{name}/product")
    return reshaped(s, out, call.shapes[0], name)


def dot(s: Lowering, call: Call) -> int:
    x, y, name = call.args["self"], call.args.get("tensor", call.args.get("other")), call.names[0]
    if s.node(x) is None:
        x, y = y, x
    if s.node(y) is not None:
        raise CannotLower("inner product of two values")
    out = linear(s, s.the_node(x), constant(y)[None], None, f"{name}/product")
    return reshaped(s, out, (), name)


def convolution(s: Lowering, call: Call) -> int:
    a = call.args
    x, name = s.the_node(a["input"]), call.names[0]
    weight = constant(a["weight"])
    dims = weight.dim() - 2
    if dims not in (1, 2, 3):
        raise CannotLower(f"convolution over {dims} dims")
    bias = None if a["bias"] is None else s.param(constant(a["bias"]), f"{name}.bias")
    op = Conv(
        s.param(weight, f"{name}.weight"),
        bias,
        None,
        tuple(a["stride"]),
        tuple(a["padding"]),
        tuple(a["dilation"]),
        a["groups"],
        tuple(a["output_padding"]),
        bool(a["transposed"]),
        dims,
    )
    return s.emit(op, [x], call.shapes[0], name)


def batch_norm(s: Lowering, call: Call) -> list[int | None]:
    """(x - mean) / sqrt(var + eps) weight + bias, as one ScaleShift with parameters in float64."""
    a, name = call.args, call.names[0]
    x = s.the_node(a["input"])
    mean, var = constant(a["running_mean"]), constant(a["running_var"])
    weight = torch.ones_like(mean) if a["weight"] is None else constant(a["weight"])
    bias = torch.zeros_like(mean) if a["bias"] is None else constant(a["bias"])
    column = (-1, *[1] * (len(s.shape(x)) - 2))
    scale = weight / torch.sqrt(var + scalar(s, a["eps"]))
    if not bool(torch.isfinite(scale).all()):
        raise CannotLower("normalisation by a variance that is not positive")
    if bool(((scale == 0) & (weight != 0)).any()):
        raise CannotLower("normalisation by a factor that underflows")
    shift, magnitude = bias - mean * scale, bias.abs() + (mean * scale).abs()
    op = ScaleShift(
        s.param(scale.reshape(column), f"{name}.scale"),
        s.param(shift.reshape(column), f"{name}.shift"),
        s.param(magnitude.reshape(column), f"{name}.shift_magnitude"),
        folded=BATCH_NORM_ROUNDINGS,
    )
    return [s.emit(op, [x], call.shapes[0], name)]


def reduced_dims(call: Call, rank: int) -> tuple[int, ...]:
    dims = call.args.get("dim")
    if dims is None or (isinstance(dims, Sequence) and not len(dims)):
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims)))


def _reduction(kind: type[Sum] | type[Mean]) -> Translator:
    def run(s: Lowering, call: Call) -> int:
        x = s.the_node(call.args["self"])
        shape = s.shape(x)
        dims = reduced_dims(call, len(shape))
        if not dims or math.prod(shape[d] for d in dims) == 1:
            return reshaped(s, x, call.shapes[0], call.names[0])
        return s.emit(kind(dims, bool(call.args.get("keepdim"))), [x], call.shapes[0], call.names[0])

    return run


def spatial_dims(call: Call) -> int:
    """Of a pooling, by its name: avg_pool2d, max_pool3d_with_indices, ..."""
    return int(call.func.split("pool")[1][0])


def spread(values: Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for every spatial dim; a single one is that of all."""
    return tuple(values) * dims if len(values) == 1 else tuple(values)


def avg_pool(s: Lowering, call: Call) -> int:
    a, x, dims = call.args, s.the_node(call.args["self"]), spatial_dims(call)
    full, padding = spread(a["kernel_size"], dims), spread(a["padding"], dims)
    op = AvgPool(
        full,
        spread(a["stride"], dims) or full,
        padding,
        bool(a["ceil_mode"]),
        bool(a["count_include_pad"]),
        a.get("divisor_override"),
    )
    return s.emit(op, [x], call.shapes[0], call.names[0])


def adaptive_avg_pool(s: Lowering, call: Call) -> int:
    """Adaptive pooling whose windows are all alike."""
    x, name = s.the_node(call.args["self"]), call.names[0]
    size = call.shapes[0][-len(call.args["output_size"]) :]
    given = s.shape(x)[-len(size) :]
    if any(g % o for g, o in zip(given, size, strict=True)):
        raise CannotLower("adaptive pooling with windows of different sizes")
    kernel = tuple(g // o for g, o in zip(given, size, strict=True))
    return s.emit(AvgPool(kernel, kernel, (0,) * len(size), False, True, None), [x], call.shapes[0], name)


AFFINE: dict[str, Translator] = {
    "add": add,
    "sub": sub,
    "rsub": rsub,
    "neg": neg,
    "mm": mm,
    "bmm": mm,
    "addmm": addmm,
    "baddbmm": addmm,
    "mv": mv,
    "dot": dot,
    "vdot": dot,
    "convolution": convolution,
    "native_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "sum": _reduction(Sum),
    "mean": _reduction(Mean),
    "avg_pool1d": avg_pool,
    "avg_pool2d": avg_pool,
    "avg_pool3d": avg_pool,
    "_adaptive_avg_pool2d": adaptive_avg_pool,
    "_adaptive_avg_pool3d": adaptive_avg_pool,
}
