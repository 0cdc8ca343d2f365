"""Translators of ATen ops that are not affine: activations, products of values, maxima by ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verifier.frontend.builder import broadcast
from verifier.frontend.capture import Call, Ref
from verifier.frontend.lower_affine import (
    any_operand,
    combine,
    inverse,
    operand,
    reduced_dims,
    scalar,
    scaled,
    shifted,
    spatial_dims,
    spread,
)
from verifier.frontend.lower_parts import ROUNDED, bounded, masked, multiplied, reciprocal_of, relu_of, root_of, within
from verifier.frontend.lower_shape import MOVEMENT, gathered, move, reshaped
from verifier.frontend.lower_softmax import log_softmax, softmax
from verifier.frontend.lowering import CannotLower, Lowering, Translator, constant
from verifier.ops.add import Add
from verifier.ops.bent import Cos, Gelu, Silu, Sin
from verifier.ops.exponential import Exp, Log, Softplus
from verifier.ops.power import Power, Sqrt, Square
from verifier.ops.reduce import Mean
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Concat
from verifier.ops.sigmoid import Erf, Sigmoid, Tanh
from verifier.ops.step import Ceil, Floor, Heaviside, Round, Sign

# exp(-t) / t is below half a unit in the last place of 1.
SOFTPLUS_THRESHOLD = {torch.float32: 20.0, torch.float64: 40.0}
# Limits beyond this would take digits from all that they are added to.
LARGE_LIMIT = 2.0**20
MOST_EXPONENTS = 16


def unary(op: type, **fixed: object) -> Translator:
    """An op without constants of its own, of the call's first tensor."""

    def run(s: Lowering, call: Call) -> int:
        first = next((name for name, a in call.args.items() if isinstance(a, Ref | Tensor)), "self")
        x = s.the_node(call.args[first])
        return s.emit(op(**fixed), [x], s.shape(x), call.names[0])

    return run


def leaky(s: Lowering, x: int, slope: Tensor, name: str) -> int:
    """x for x >= 0, else slope x: a ReLU of that slope where it is one float32 number, else w x + (1 - w) relu(x)."""
    one = float(slope.reshape(-1)[0])
    if bool(torch.all(slope == one)) and torch.tensor(one, dtype=torch.float32).item() == one:
        return relu_of(s, x, name, one)
    part = scaled(s, x, slope, f"{name}/negative")
    rest = scaled(s, relu_of(s, x, f"{name}/relu"), 1 - slope, f"{name}/positive", exact=False)
    return s.emit(Add((1.0, 1.0)), [part, rest], s.shape(x), name)


def leaky_relu(s: Lowering, call: Call) -> int:
    slope = torch.tensor(scalar(s, call.args["negative_slope"]), dtype=torch.float64)
    return leaky(s, s.the_node(call.args["self"]), slope, call.names[0])


def absolute(s: Lowering, call: Call) -> int:
    return relu_of(s, s.the_node(call.args["self"]), call.names[0], -1.0)


def prelu(s: Lowering, call: Call) -> int:
    """One slope, or a slope per channel."""
    x, w, name = s.the_node(call.args["self"]), constant(call.args["weight"]), call.names[0]
    if w.dim() == 1 and w.numel() > 1:
        w = w.reshape(-1, *[1] * (len(s.shape(x)) - 2))
    return leaky(s, x, w.reshape(()) if w.numel() == 1 else w, name)


def larger(s: Lowering, a: int, b: int, name: str, sign: float = 1.0, apart: Tensor | None = None) -> int:
    """max(a, b) = a + relu(b - a); with sign -1 min(a, b) = a - relu(a - b).

    Args:
        apart: 0 where the two are the same element, else 1.
    """
    shape = broadcast(s.shape(a), s.shape(b))
    gap = s.emit(Add((-sign, sign)), [a, b], shape, f"{name}/difference")
    gap = gap if apart is None else masked(s, gap, apart, f"{name}/apart")
    return s.emit(Add((1.0, sign)), [a, relu_of(s, gap, f"{name}/relu")], shape, name)


def limited(s: Lowering, x: int, c: Tensor, name: str, sign: float) -> int:
    """max(x, c) = c + relu(x - c); with sign -1 min(x, c) = c - relu(c - x). Limits no number can cross go."""
    wider = broadcast(c.shape, s.shape(x)) != s.shape(x)
    if bool(torch.all(c * sign <= -torch.finfo(s.dtype).max)):
        if wider:
            raise CannotLower("a limit that only repeats elements")
        return x
    if bool((c * sign == -math.inf).any()):
        c = torch.where(c * sign == -math.inf, -sign * torch.finfo(s.dtype).max, c)  # no number is beyond it
    if not bool(torch.isfinite(c).all()):
        raise CannotLower("a limit that is infinite for some elements only")
    if sign > 0 and not wider and not bool(torch.any(c != 0)):
        return relu_of(s, x, name)
    if bool(torch.any(c.abs() > LARGE_LIMIT)):
        return _limited_far_away(s, x, c, name, sign)
    gap = signed_shift(s, x, sign, -sign * c, f"{name}/difference")
    return signed_shift(s, relu_of(s, gap, f"{name}/relu"), sign, c, name)


def _limited_far_away(s: Lowering, x: int, c: Tensor, name: str, sign: float) -> int:
    """max(x, c) = x + relu(c - x), min(x, c) = x - relu(x - c): what is stable adds nothing, however large c is."""
    shape = broadcast(c.shape, s.shape(x))
    gap = signed_shift(s, x, -sign, sign * c, f"{name}/difference")
    return s.emit(Add((1.0, sign)), [x, relu_of(s, gap, f"{name}/relu")], shape, name)


def signed_shift(s: Lowering, x: int, sign: float, c: Tensor, name: str) -> int:
    """sign x + c in one node."""
    if sign > 0:
        return shifted(s, x, c, name)
    minus = s.param(torch.tensor(-1.0, dtype=torch.float64), f"{name}.scale")
    shape = broadcast(s.shape(x), c.shape)
    return s.emit(ScaleShift(minus, s.param(c, f"{name}.shift")), [x], shape, name)


def extremum(sign: float) -> Translator:
    def run(s: Lowering, call: Call) -> int:
        x, y = call.args["self"], call.args["other"]
        if s.node(x) is None:
            x, y = y, x
        if s.node(y) is None:
            return limited(s, s.the_node(x), any_operand(s, y), call.names[0], sign)
        if sign > 0 and (s.least(x) is not None or s.least(y) is not None):
            return _larger_of_marked(s, x, y, call)
        return larger(s, s.the_node(x), s.the_node(y), call.names[0], sign)

    return run


def _larger_of_marked(s: Lowering, x: Ref, y: Ref, call: Call) -> int:
    """max(x, y) where some elements of one are below everything: there it is the other."""
    name, shape = call.names[0], call.shapes[0]
    none = torch.zeros(shape, dtype=torch.bool)
    first, second = (none if m is None else none | m for m in (s.least(x), s.least(y)))
    for marks, made in ((s.minus_infinity, s.made), (s.lowest, s.made_lowest)):
        both = [none | marks[r.index] for r in (x, y) if r.index in marks]
        least = first & second if marks is s.lowest else both[0] & both[1] if len(both) == 2 else none
        if bool(least.any()):
            made[0] = least
    if s.infinite(x) is not None or s.infinite(y) is not None:
        mixed = first & second & ~s.made.get(0, none)
        if bool(mixed.any()):
            raise CannotLower("of minus infinity and the lowest number")
    sizes = [math.prod(s.shape(s.the_node(r))) for r in (x, y)]
    places = [
        torch.arange(n).reshape(s.captured_shape(r.index)).expand(shape) for n, r in zip(sizes, (x, y), strict=True)
    ]
    flat = [reshaped(s, s.the_node(r), (n,), f"{name}/flat") for n, r in zip(sizes, (x, y), strict=True)]
    joined = s.emit(Concat(0), flat, (sum(sizes),), f"{name}/joined")
    a = gathered(s, joined, torch.where(first, places[1] + sizes[0], places[0]), f"{name}/first")
    b = gathered(s, joined, torch.where(second, places[0], places[1] + sizes[0]), f"{name}/second")
    gap = s.emit(Add((-1.0, 1.0)), [a, b], shape, f"{name}/difference")
    gap = masked(s, gap, (~(first | second)).to(torch.float64), f"{name}/apart")
    return s.emit(Add((1.0, 1.0)), [a, relu_of(s, gap, f"{name}/relu")], shape, name)


def clamp(s: Lowering, call: Call) -> int:
    x, name = s.the_node(call.args["self"]), call.names[0]
    low, high = call.args.get("min", call.args.get("min_val")), call.args.get("max", call.args.get("max_val"))
    if low is not None:
        x = limited(s, x, any_operand(s, low), name if high is None else f"{name}/floor", 1.0)
    return x if high is None else limited(s, x, any_operand(s, high), name, -1.0)


def threshold(s: Lowering, call: Call) -> int:
    if call.args["threshold"] != call.args["value"]:
        raise CannotLower("a threshold that jumps")
    return limited(s, s.the_node(call.args["self"]), operand(s, call.args["threshold"]), call.names[0], 1.0)


def hard_sigmoid_of(s: Lowering, x: int, name: str) -> int:
    """clamp(x + 3, 0, 6) / 6."""
    up = shifted(s, x, torch.tensor(3.0, dtype=torch.float64), f"{name}/shifted")
    low = relu_of(s, up, f"{name}/floor")
    cut = limited(s, low, torch.tensor(6.0, dtype=torch.float64), f"{name}/ceiling", -1.0)
    return scaled(s, cut, torch.tensor(1 / 6, dtype=torch.float64), name, exact=False)


def hard_sigmoid(s: Lowering, call: Call) -> int:
    return hard_sigmoid_of(s, s.the_node(call.args["self"]), call.names[0])


def reduce_extremum(sign: float) -> Translator:
    """max or min over dims: halve the reduced positions until one is left."""

    def run(s: Lowering, call: Call) -> int:
        x, name = s.the_node(call.args["self"]), call.names[0]
        shape = s.shape(x)
        dims = reduced_dims(call, len(shape))
        positions = torch.arange(math.prod(shape)).reshape(shape)
        kept = [d for d in range(len(shape)) if d not in dims]
        rows = positions.permute(*dims, *kept).reshape(-1, *call.shapes[0])
        least = s.least(call.args["self"]) if sign > 0 else None
        if least is not None:
            return _largest_of_marked(s, x, rows, least.reshape(-1)[rows], call)
        return halve(s, x, rows, name, sign)

    return run


def halve(s: Lowering, x: int, rows: Tensor, name: str, sign: float) -> int:
    """Maximum over the first dim of positions ``rows`` (r, *shape) of a node, as a tree of ReLU maxima."""
    level = 0
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        odd = rows[2 * half :]
        first = torch.cat([rows[:half], odd])
        second = torch.cat([rows[half : 2 * half], odd])
        last = first.shape[0] == 1
        label = f"{name}/level{level}"
        if last:
            first, second = first[0], second[0]
        a, b = gathered(s, x, first, f"{label}/left"), gathered(s, x, second, f"{label}/right")
        same = first == second
        x = larger(s, a, b, name if last else label, sign, (~same).to(torch.float64) if bool(same.any()) else None)
        if last:
            return x
        rows = torch.arange(first.numel()).reshape(first.shape)
        level += 1
    return gathered(s, x, rows[0], name)


def _largest_of_marked(s: Lowering, x: int, rows: Tensor, least: Tensor, call: Call) -> int:
    """Maximum over the first dim of positions, some of which are below everything: another one stands in for them."""
    number = call.args["self"].index
    for marks, made in ((s.minus_infinity, s.made), (s.lowest, s.made_lowest)):
        if number in marks:
            made[0] = marks[number].reshape(-1)[rows].all(0)
    if bool((least.all(0) & ~s.made.get(0, s.made_lowest.get(0, least.all(0)))).any()):
        raise CannotLower("of minus infinity and the lowest number")
    order = torch.argsort(least.to(torch.int8), dim=0, stable=True)
    count = (~least).sum(0, keepdim=True).clamp(min=1)
    turn = torch.arange(len(rows)).reshape(-1, *[1] * (rows.dim() - 1)) % count
    rows = rows.gather(0, order).gather(0, turn.expand(rows.shape))
    return halve(s, x, rows[: int(count.max())], call.names[0], 1.0)


def max_pool(s: Lowering, call: Call) -> list[int | None]:
    """Separable: maximum over the taps of each dim in turn; taps in the padding repeat a tap of the same window."""
    from verifier.frontend.windows import pool_windows

    a, x, name = call.args, s.the_node(call.args["self"]), call.names[0]
    dims = spatial_dims(call)
    kernel, padding, dilation = (spread(a[k], dims) for k in ("kernel_size", "padding", "dilation"))
    stride = spread(a["stride"], dims) or kernel
    for i in range(dims):
        shape = s.shape(x)
        axis = len(shape) - dims + i
        pads = padding[i], padding[i]
        taps = pool_windows(shape[axis], kernel[i], stride[i], pads, dilation[i], a["ceil_mode"])
        positions = torch.arange(math.prod(shape)).reshape(shape)
        rows = torch.stack([positions.index_select(axis, torch.tensor(tap)) for tap in taps])
        x = halve(s, x, rows, name if i == dims - 1 else f"{name}/dim{i}", 1.0)
    return [x, None]


def mul(s: Lowering, call: Call) -> int:
    x, y, name = call.args["self"], call.args["other"], call.names[0]
    a, b = s.node(x), s.node(y)
    if a is not None and b is not None:
        return multiplied(s, a, b, name)
    if a is not None:
        return scaled(s, a, operand(s, y), name)
    assert b is not None
    return scaled(s, b, operand(s, x), name)


def div(s: Lowering, call: Call) -> int:
    x, y, name = call.args["self"], call.args["other"], call.names[0]
    if call.args.get("rounding_mode") is not None:
        raise CannotLower(f"division with rounding '{call.args['rounding_mode']}'")
    a, b = s.node(x), s.node(y)
    if b is None:
        assert a is not None
        r, exact = inverse(operand(s, y))
        return scaled(s, a, r, name, exact)
    down = reciprocal_of(s, b, f"{name}/reciprocal")
    if a is None:
        return scaled(s, down, operand(s, x), name)
    return multiplied(s, a, down, name)


def power(s: Lowering, call: Call) -> int:
    """A constant power: whole ones from 2, roots and inverses of them."""
    if isinstance(call.args["exponent"], Ref) or s.node(call.args["self"]) is None:
        raise CannotLower("a power whose exponent depends on the input")
    x, e, name = s.the_node(call.args["self"]), operand(s, call.args["exponent"]), call.names[0]
    shape = tuple(call.shapes[0]) or (1,)
    if bool(torch.all(e == e.reshape(-1)[0])) and shape == s.shape(x):
        return powered(s, x, float(e.reshape(-1)[0]), name)
    return _powers(s, x, e.expand(shape), name)


def _powers(s: Lowering, x: int, e: Tensor, name: str) -> int:
    """Different exponents for different elements: each exponent for those that have it, put together again."""
    exponents = e.unique().tolist()
    if len(exponents) > MOST_EXPONENTS:
        raise CannotLower("many different exponents")
    places = torch.arange(math.prod(s.shape(x))).reshape(s.shape(x)).expand(e.shape).reshape(-1)
    parts, order, ones = [], [], torch.zeros(e.shape, dtype=torch.float64)
    for k, exponent in enumerate(exponents):
        mine = (e.reshape(-1) == exponent).nonzero()[:, 0]
        if exponent == 0:
            ones = (e == 0).to(torch.float64)
            continue
        some = gathered(s, x, places[mine], f"{name}/base{k}")
        parts.append(powered(s, some, exponent, f"{name}/power{k}"))
        order.append(mine)
    if not parts:
        raise CannotLower("a power of zero, which does not depend on the input")
    joined = parts[0] if len(parts) == 1 else s.emit(Concat(0), parts, (sum(map(len, order)),), f"{name}/joined")
    index = torch.full((e.numel(),), -1)
    index[torch.cat(order)] = torch.arange(len(torch.cat(order)))
    return shifted(s, gathered(s, joined, index.reshape(e.shape), f"{name}/placed"), ones, name)


def powered(s: Lowering, x: int, e: float, name: str) -> int:
    if e == 1:
        return x
    if e == 0:
        raise CannotLower("a power of zero, which does not depend on the input")
    if e < 0:
        return reciprocal_of(s, powered(s, x, -e, f"{name}/power"), name)
    op = Square() if e == 2 else Sqrt() if e == 0.5 else Power(e)
    x = x if e.is_integer() else bounded(s, x, name)
    return s.emit(op, [x], s.shape(x), name)


def rsqrt(s: Lowering, call: Call) -> int:
    x, name = s.the_node(call.args["self"]), call.names[0]
    return reciprocal_of(s, root_of(s, x, f"{name}/root"), name)


def root(s: Lowering, call: Call) -> int:
    return root_of(s, s.the_node(call.args["self"]), call.names[0])


def reciprocal(s: Lowering, call: Call) -> int:
    return reciprocal_of(s, s.the_node(call.args["self"]), call.names[0])


def elu(s: Lowering, call: Call) -> int:
    """scale (relu(x) + alpha (exp(input_scale min(x, 0)) - 1)); CELU has input_scale 1 / alpha."""
    x, name = s.the_node(call.args["self"]), call.names[0]
    alpha = scalar(s, call.args["alpha"])
    scale, inner = scalar(s, call.args.get("scale", 1.0)), scalar(s, call.args.get("input_scale", 1 / alpha))
    shape = s.shape(x)
    positive = relu_of(s, x, f"{name}/positive")
    negative = s.emit(Add((1.0, -1.0)), [x, positive], shape, f"{name}/negative")
    negative = scaled(s, negative, torch.tensor(inner, dtype=torch.float64), f"{name}/scaled")
    grown = s.emit(Exp(), [negative], shape, f"{name}/exp")
    less = shifted(s, grown, torch.tensor(-1.0, dtype=torch.float64), f"{name}/less")
    total = s.emit(Add((1.0, alpha)), [positive, less], shape, name if scale == 1 else f"{name}/sum")
    return scaled(s, total, torch.tensor(scale, dtype=torch.float64), name)


def softplus(s: Lowering, call: Call) -> int:
    """log(1 + exp(beta x)) / beta; torch's switch to x above its threshold must be below the type's resolution."""
    x, name, beta = s.the_node(call.args["self"]), call.names[0], scalar(s, call.args["beta"])
    if call.args["threshold"] < SOFTPLUS_THRESHOLD[s.dtype]:
        raise CannotLower(f"with threshold = {call.args['threshold']}")
    if beta == 1:
        return s.emit(Softplus(), [x], s.shape(x), name)
    up = scaled(s, x, torch.tensor(beta, dtype=torch.float64), f"{name}/scaled")
    out = s.emit(Softplus(), [up], s.shape(x), f"{name}/softplus")
    r, exact = inverse(torch.tensor(beta, dtype=torch.float64))
    return scaled(s, out, r, name, exact)


def mish(s: Lowering, call: Call) -> int:
    x, name = s.the_node(call.args["self"]), call.names[0]
    soft = s.emit(Softplus(), [x], s.shape(x), f"{name}/softplus")
    return multiplied(s, x, s.emit(Tanh(), [soft], s.shape(x), f"{name}/tanh"), name)


def hard_swish(s: Lowering, call: Call) -> int:
    x, name = s.the_node(call.args["self"]), call.names[0]
    return multiplied(s, x, hard_sigmoid_of(s, x, f"{name}/gate"), name)


def gelu(s: Lowering, call: Call) -> int:
    """x Phi(x), or its tanh form x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    x, name = s.the_node(call.args["self"]), call.names[0]
    shape = s.shape(x)
    if call.args["approximate"] != "tanh":
        return s.emit(Gelu(), [x], shape, name)
    cube = s.emit(Power(3.0), [x], shape, f"{name}/cube")
    inner = s.emit(Add((1.0, 0.044715)), [x, cube], shape, f"{name}/sum")
    factor = torch.tensor(math.sqrt(2 / math.pi), dtype=torch.float64)
    inner = scaled(s, inner, factor, f"{name}/scaled", exact=False)
    gate = s.emit(Tanh(), [inner], shape, f"{name}/tanh")
    half = s.param(torch.tensor(0.5, dtype=torch.float64), f"{name}.half")
    share = s.emit(ScaleShift(half, half), [gate], shape, f"{name}/gate")
    return multiplied(s, x, share, name)


def compare(above: bool, at_zero: float) -> Translator:
    """x > y and its relatives as a step of the difference: 1 where true, 0 where false."""

    def run(s: Lowering, call: Call) -> int:
        first, second = call.args["self"], call.args["other"]
        if not above:
            first, second = second, first
        gap = combine(s, first, second, -1.0, f"{call.names[0]}/difference")
        return s.emit(Heaviside(at_zero), [gap], call.shapes[0], call.names[0])

    return run


def equal(s: Lowering, call: Call) -> int:
    """x = y: x >= y and y >= x, which are never both false."""
    name, shape = call.names[0], call.shapes[0]
    gap = combine(s, call.args["self"], call.args["other"], -1.0, f"{name}/difference")
    back = s.emit(Add((-1.0,)), [gap], s.shape(gap), f"{name}/turned")
    steps = [s.emit(Heaviside(1.0), [g], s.shape(g), f"{name}/{k}") for g, k in ((gap, "above"), (back, "below"))]
    both = s.emit(Add((1.0, 1.0)), steps, s.shape(gap), f"{name}/both")
    return reshaped(s, shifted(s, both, torch.tensor(-1.0, dtype=torch.float64), name), shape or (1,), name)


def unequal(s: Lowering, call: Call) -> int:
    same = equal(s, replace(call, names=(f"{call.names[0]}/equal",)))
    return signed_shift(s, same, -1.0, torch.tensor(1.0, dtype=torch.float64), call.names[0])


def exclusive_or(s: Lowering, call: Call) -> int:
    """x + y - 2 x y, or 1 - x where y is a constant that is true."""
    x, y, name = call.args["self"], call.args["other"], call.names[0]
    if s.node(x) is None:
        x, y = y, x
    a = s.the_node(x)
    if s.node(y) is None:
        c = operand(s, y)
        return shifted(s, scaled(s, a, 1 - 2 * c, f"{name}/signed"), c, name)
    gap = combine(s, x, y, -1.0, f"{name}/difference")
    return relu_of(s, gap, name, -1.0)


def where(s: Lowering, call: Call) -> int | Sequence[int | None]:
    """Selection: by a constant it moves numbers, by a value c (0 or 1) it is y + c (x - y)."""
    condition, x, y, name = call.args["condition"], call.args["self"], call.args["other"], call.names[0]
    c = s.node(condition)
    if c is None:
        return move(s, call)
    if s.infinite(x) is not None or s.infinite(y) is not None:
        raise CannotLower("of numbers that are always minus infinity")
    if s.node(x) is None and s.node(y) is None:
        high, low = operand(s, x), operand(s, y)
        return shifted(s, scaled(s, c, high - low, f"{name}/scaled", exact=s.dtype == torch.float32), low, name)
    gap = combine(s, x, y, -1.0, f"{name}/difference")
    chosen = multiplied(s, c, gap, f"{name}/chosen")
    b = s.node(y)
    if b is None:
        return shifted(s, chosen, operand(s, y), name)
    return s.emit(Add((1.0, 1.0)), [chosen, b], call.shapes[0], name)


def same_numbers(s: Lowering, call: Call) -> int:
    """Whole numbers within the range of an integer type, as numbers of that type."""
    return s.the_node(call.args["self"])


def logical_not(s: Lowering, call: Call) -> int:
    x = s.the_node(call.args["self"])
    return signed_shift(s, x, -1.0, torch.tensor(1.0, dtype=torch.float64), call.names[0])


def layer_norm(s: Lowering, call: Call) -> list[int | None]:
    """(x - mean) / sqrt(var + eps) weight + bias over the last dims."""
    a, x, name = call.args, s.the_node(call.args["input"]), call.names[0]
    shape = s.shape(x)
    dims = tuple(range(len(shape) - len(a["normalized_shape"]), len(shape)))
    out = normalised(s, x, dims, scalar(s, a["eps"]), name)
    return [_weighted(s, out, a["weight"], a["bias"], (), name), None, None]


def group_norm(s: Lowering, call: Call) -> list[int | None]:
    a, x, name = call.args, s.the_node(call.args["input"]), call.names[0]
    shape, groups = s.shape(x), a["group"]
    flat = reshaped(s, x, (shape[0], groups, math.prod(shape[1:]) // groups), f"{name}/groups")
    out = reshaped(s, normalised(s, flat, (2,), scalar(s, a["eps"]), f"{name}/normalised"), shape, f"{name}/back")
    return [_weighted(s, out, a["weight"], a["bias"], [1] * (len(shape) - 2), name), None, None]


def _weighted(s: Lowering, x: int, weight: Any, bias: Any, tail: Sequence[int], name: str) -> int:
    for parameter, apply in ((weight, scaled), (bias, shifted)):
        if parameter is not None:
            c = constant(parameter)
            x = apply(s, x, c.reshape(*c.shape, *tail), name)
    return x


def normalised(s: Lowering, x: int, dims: tuple[int, ...], eps: float, name: str) -> int:
    """(x - mean) / sqrt(mean of squares + eps) over ``dims``."""
    shape = s.shape(x)
    small = tuple(1 if i in dims else n for i, n in enumerate(shape))
    mean = s.emit(Mean(dims, True), [x], small, f"{name}/mean")
    centred = s.emit(Add((1.0, -1.0)), [x, mean], shape, f"{name}/centred")
    squares = s.emit(Square(), [centred], shape, f"{name}/squares")
    var = s.emit(Mean(dims, True), [squares], small, f"{name}/variance")
    var = shifted(s, var, torch.tensor(eps, dtype=torch.float64), f"{name}/positive")
    deviation = root_of(s, var, f"{name}/deviation")
    out = multiplied(s, centred, reciprocal_of(s, deviation, f"{name}/reciprocal"), f"{name}/quotient")
    # Of numbers with the sum zero and the mean square v, none is larger than sqrt((n - 1) v) (Samuelson 1968).
    most = math.sqrt(math.prod(shape[d] for d in dims) - 1) * (1 + ROUNDED)
    return within(s, out, -most, most, name)


READS_INFINITY = frozenset(
    [*MOVEMENT, "add", "maximum", "fmax", "amax", "_softmax", "_safe_softmax", "_log_softmax", "where"]
)
"""Functions whose translators know of elements that are minus infinity (``Lowering.minus_infinity``)."""

NONLINEAR: dict[str, Translator] = {
    "relu": unary(Relu),
    "leaky_relu": leaky_relu,
    "abs": absolute,
    "_prelu_kernel": prelu,
    "prelu": prelu,
    "maximum": extremum(1.0),
    "minimum": extremum(-1.0),
    "fmax": extremum(1.0),
    "fmin": extremum(-1.0),
    "clamp": clamp,
    "clamp_min": clamp,
    "clamp_max": clamp,
    "hardtanh": clamp,
    "threshold": threshold,
    "hardsigmoid": hard_sigmoid,
    "amax": reduce_extremum(1.0),
    "amin": reduce_extremum(-1.0),
    "max_pool2d_with_indices": max_pool,
    "max_pool3d_with_indices": max_pool,
    "mul": mul,
    "div": div,
    "sigmoid": unary(Sigmoid),
    "tanh": unary(Tanh),
    "exp": unary(Exp),
    "log": unary(Log),
    "sqrt": root,
    "square": unary(Square),
    "erf": unary(Erf),
    "softplus": softplus,
    "pow": power,
    "rsqrt": rsqrt,
    "reciprocal": reciprocal,
    "elu": elu,
    "celu": elu,
    "silu": unary(Silu),
    "sin": unary(Sin),
    "cos": unary(Cos),
    "sign": unary(Sign),
    "floor": unary(Floor),
    "ceil": unary(Ceil),
    "round": unary(Round),
    "gt": compare(True, 0.0),
    "ge": compare(True, 1.0),
    "lt": compare(False, 0.0),
    "le": compare(False, 1.0),
    "where": where,
    "eq": equal,
    "ne": unequal,
    "logical_xor": exclusive_or,
    "bitwise_xor": exclusive_or,
    "as_integers": same_numbers,
    "logical_not": logical_not,
    "logical_and": mul,
    "bitwise_and": mul,
    "bitwise_not": logical_not,
    "bitwise_or": extremum(1.0),
    "logical_or": extremum(1.0),
    "_softmax": softmax,
    "_safe_softmax": softmax,
    "_log_softmax": log_softmax,
    "mish": mish,
    "hardswish": hard_swish,
    "gelu": gelu,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
}
