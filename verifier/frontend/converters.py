"""Converters for the ONNX ops and versions that onnx2torch lacks or does not implement to the letter.

A rule is a factory: it reads a node's attributes once and returns a pure function of the node's input tensors. Absent
optional inputs arrive as ``None``. Our rules are total over the versions of an op: what changed between versions is
handled inside the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verifier.core.errors import ConfigError, InputError, UnsupportedOpError
from verifier.core.plugins import Plugin, answerable
from verifier.frontend.builder import broadcast
from verifier.frontend.windows import auto_pad, pool_windows
from verifier.ops.registry import OpSet, foreign_table, op_sets, our_table

if TYPE_CHECKING:
    from verifier.frontend.onnx2torch_loader import Converter

Function = Callable[..., Any]


@dataclass(frozen=True)
class Attributes:
    """A node's attributes, the version of its op and how many outputs it has."""

    values: dict[str, Any]
    version: int
    outputs: int

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        return value.to_torch() if type(value).__name__ == "OnnxTensor" else value


Converts = Callable[[Attributes], Function]
"""A converter: reads the attributes of a node of its operator, of any version, and gives a function of its inputs."""


Guard = Callable[[], AbstractContextManager[None]]
"""What a converter and its function run in."""


class Rule(nn.Module):
    """A converted node: calls ``function`` with ``None`` in the places of absent inputs."""

    def __init__(self, function: Function, present: Sequence[bool], guard: Guard = nullcontext) -> None:
        super().__init__()
        self.function = function
        self.present = tuple(present)
        self.guard = guard

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        with self.guard():
            return self.function(*(next(given) if here else None for here in self.present))


class Constant(nn.Module):
    """A stored tensor; a buffer, so that it follows the module's dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self) -> Any:
        return self.value


def ints(t: Any) -> list[int]:
    """A constant list of integers."""
    return [int(v) for v in t.reshape(-1)] if isinstance(t, Tensor) else [int(v) for v in t]


def pick(x: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """Entries of one dim by position."""
    return x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))


def _flatten(a: Attributes) -> Function:
    axis = a.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        k = axis + x.dim() if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:k]), math.prod(x.shape[k:]))

    return run


def _dropout(a: Attributes) -> Function:
    def run(x: Tensor, ratio: Any = None, training: Any = None) -> Any:
        if training is not None and bool(training):
            raise UnsupportedOpError("Dropout in training mode is random; export the network in evaluation mode")
        return x if a.outputs == 1 else (x, torch.ones(x.shape, dtype=torch.bool))

    return run


def _identity(a: Attributes) -> Function:
    return lambda x: x


def _slice(a: Attributes) -> Function:
    fixed = [a.get(k) for k in ("starts", "ends", "axes")]

    def run(x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
        starts = ints(fixed[0] if starts is None else starts)
        ends = ints(fixed[1] if ends is None else ends)
        axes = fixed[2] if axes is None else axes
        axes = list(range(len(starts))) if axes is None else ints(axes)
        steps = [1] * len(starts) if steps is None else ints(steps)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            size = x.shape[axis]
            if step == 0:
                raise ValueError("the step of Slice is 0")
            stop = None if step < 0 and end < -size else end
            chosen = range(size)[slice(start, stop, step)]
            if step == 1:
                x = x.narrow(axis, chosen.start if len(chosen) else 0, len(chosen))
            else:
                x = pick(x, axis, chosen)
        return x

    return run


def _clip(a: Attributes) -> Function:
    fixed = (a.get("min"), a.get("max"))

    def run(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
        low = fixed[0] if low is None else low
        high = fixed[1] if high is None else high
        if low is not None:
            x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))

    return run


def _batch_norm(a: Attributes) -> Function:
    epsilon = a.get("epsilon", 1e-5)
    if a.get("training_mode", 0) or a.outputs != 1 or (a.version < 7 and not a.get("is_test", 0)):
        raise NotImplementedError("BatchNormalization in training mode")
    if a.get("spatial", 1) != 1:
        raise NotImplementedError("BatchNormalization with spatial=0")

    def run(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, scale, bias, training=False, eps=epsilon)

    return run


def _cast_types() -> dict[int, torch.dtype]:
    return {
        1: torch.float32,
        2: torch.uint8,
        3: torch.int8,
        5: torch.int16,
        6: torch.int32,
        7: torch.int64,
        9: torch.bool,
        11: torch.float64,
    }


def _cast(a: Attributes) -> Function:
    types = _cast_types()
    to = a.get("to")
    if to not in types:
        raise NotImplementedError(f"Cast to element type {to}")
    return lambda x: x.to(types[to])


def _cast_like(a: Attributes) -> Function:
    return lambda x, like: x.to(like.dtype)


def _pad(a: Attributes) -> Function:
    mode = a.get("mode", "constant")
    fixed = a.get("pads", a.get("paddings"))
    value = a.get("value", 0.0)

    def run(x: Tensor, pads: Any = None, fill: Any = None, axes: Any = None) -> Tensor:
        flat = ints(fixed if pads is None else pads)
        dims = list(range(x.dim())) if axes is None else [i % x.dim() for i in ints(axes)]
        before, after = flat[: len(dims)], flat[len(dims) :]
        if mode == "constant":
            both = {d: (b, e) for d, b, e in zip(dims, before, after, strict=True)}
            order = [p for d in reversed(range(x.dim())) for p in both.get(d, (0, 0))]
            return F.pad(x, order, value=value if fill is None else fill.reshape(()).item())
        for d, b, e in zip(dims, before, after, strict=True):
            size = x.shape[d]
            x = pick(x, d, [_source(i, size, mode) for i in range(-b, size + e)])
        return x

    return run


def _source(i: int, size: int, mode: str) -> int:
    """Where a padded position of ``reflect``, ``edge`` or ``wrap`` padding reads from."""
    if mode == "edge":
        return min(max(i, 0), size - 1)
    if mode == "wrap":
        return i % size
    if mode != "reflect":
        raise NotImplementedError(f"Pad with mode '{mode}'")
    if size == 1:
        return 0
    i = abs(i) % (2 * size - 2)
    return i if i < size else 2 * size - 2 - i


def _conv(a: Attributes) -> Function:
    stride, dilation, groups = a.get("strides"), a.get("dilations"), a.get("group", 1)
    pads, mode = a.get("pads"), a.get("auto_pad", "NOTSET")

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.dim() - 2
        if rank not in (1, 2, 3):
            raise NotImplementedError(f"Conv over {rank} dims")
        step, spread = stride or [1] * rank, dilation or [1] * rank
        both = auto_pad(mode, x.shape[2:], w.shape[2:], step, spread, pads or [0] * 2 * rank)
        conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        if all(first == last for first, last in both):
            return conv(x, w, b, step, [first for first, _ in both], spread, groups)
        return conv(F.pad(x, [p for pair in reversed(both) for p in pair]), w, b, step, 0, spread, groups)

    return run


def _max_pool(a: Attributes) -> Function:
    kernel = a.get("kernel_shape")
    rank = len(kernel)
    stride, dilation = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    pads, mode = a.get("pads", [0] * 2 * rank), a.get("auto_pad", "NOTSET")
    ceil_mode = bool(a.get("ceil_mode", 0))
    if a.outputs != 1 or a.get("storage_order", 0):
        raise NotImplementedError("MaxPool with indices")

    def run(x: Tensor) -> Tensor:
        both = auto_pad(mode, x.shape[2:], kernel, stride, dilation, pads)
        for i in range(rank):
            windows = pool_windows(x.shape[2 + i], kernel[i], stride[i], both[i], dilation[i], ceil_mode)
            x = tree(torch.maximum, [pick(x, 2 + i, tap) for tap in windows])
        return x

    return run


def tree(combine: Callable[[Any, Any], Any], items: Sequence[Any]) -> Any:
    """Combine pairwise, in log2 levels."""
    items = list(items)
    while len(items) > 1:
        paired = [combine(items[i], items[i + 1]) for i in range(0, len(items) - 1, 2)]
        items = paired + items[len(items) - len(items) % 2 :]
    return items[0]


def _global_max_pool(a: Attributes) -> Function:
    return lambda x: x.amax(dim=list(range(2, x.dim())), keepdim=True)


def _global_average_pool(a: Attributes) -> Function:
    return lambda x: x.mean(dim=list(range(2, x.dim())), keepdim=True)


def _celu(a: Attributes) -> Function:
    """torch's own multiplies by a rounded 1 / alpha."""
    alpha = a.get("alpha", 1.0)

    def run(x: Tensor) -> Tensor:
        positive = F.relu(x)
        return positive + ((x - positive) / alpha).exp().sub(1).mul(alpha)

    return run


def _softplus(a: Attributes) -> Function:
    """torch's own becomes the identity at a threshold unless told otherwise."""
    return lambda x: F.softplus(x, threshold=math.inf)


def _selu(a: Attributes) -> Function:
    alpha, gamma = a.get("alpha", 1.67326319217681884765625), a.get("gamma", 1.05070102214813232421875)
    return lambda x: torch.ops.aten.elu(x, alpha, gamma)


def _unsqueeze(a: Attributes) -> Function:
    fixed = a.get("axes")

    def run(x: Tensor, axes: Any = None) -> Tensor:
        given = fixed if axes is None else ints(axes)
        rank = x.dim() + len(given)
        for axis in sorted(i % rank for i in given):
            x = x.unsqueeze(axis)
        return x

    return run


def _squeeze(a: Attributes) -> Function:
    fixed = a.get("axes")

    def run(x: Tensor, axes: Any = None) -> Tensor:
        given = fixed if axes is None else ints(axes)
        chosen = [i for i, n in enumerate(x.shape) if n == 1] if given is None else [i % x.dim() for i in given]
        if any(x.shape[i] != 1 for i in chosen):
            raise InputError(f"Squeeze of dims {chosen} of shape {list(x.shape)}, which are not 1")
        return x.reshape([n for i, n in enumerate(x.shape) if i not in chosen])

    return run


def _prelu(a: Attributes) -> Function:
    def run(x: Tensor, slope: Tensor) -> Tensor:
        aligned = [1] * (x.dim() - slope.dim()) + list(slope.shape)
        if slope.numel() == 1 or (x.dim() > 1 and slope.numel() == aligned[1] == x.shape[1]):
            return F.prelu(x, slope.reshape(-1))
        return F.relu(x) - slope * F.relu(-x)

    return run


def _reduce(apply: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Attributes], Function]:
    def rule(a: Attributes) -> Function:
        fixed, keep, noop = a.get("axes"), bool(a.get("keepdims", 1)), a.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Any = None) -> Tensor:
            given = fixed if axes is None else ints(axes)
            if not given:
                if noop:
                    return x
                given = range(x.dim())
            return apply(x, sorted(i % x.dim() for i in given), keep) if x.dim() else apply(x, [], keep)

        return run

    return rule


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for d in reversed(dims):
        x = x.prod(dim=d, keepdim=keep)
    return x


def _reshape(a: Attributes) -> Function:
    fixed, zero_is_zero = a.get("shape"), a.get("allowzero", 0)

    def run(x: Tensor, shape: Any = None) -> Tensor:
        wanted = ints(fixed if shape is None else shape)
        if not zero_is_zero:
            wanted = [x.shape[i] if s == 0 else s for i, s in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def _split(a: Attributes) -> Function:
    axis, fixed = a.get("axis", 0), a.get("split")
    parts = a.get("num_outputs", a.outputs)

    def run(x: Tensor, sizes: Any = None) -> Any:
        given = fixed if sizes is None else ints(sizes)
        if given is None:
            each = -(-x.shape[axis] // parts)
            given = [min(each, x.shape[axis] - i * each) for i in range(parts)]
        out = torch.split(x, list(given), dim=axis)
        return out[0] if a.outputs == 1 else out

    return run


def _fold(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Attributes], Function]:
    return lambda a: lambda *xs: tree(combine, xs)


def _mean(a: Attributes) -> Function:
    return lambda *xs: tree(torch.add, xs) / len(xs)


def _gemm(a: Attributes) -> Function:
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    flip_a, flip_b = a.get("transA", 0), a.get("transB", 0)

    def run(x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
        x, w = (x.t() if flip_a else x), (w.t() if flip_b else w)
        if c is None:
            out = torch.mm(x, w)
            return out if alpha == 1 else out * alpha
        return torch.addmm(c, x, w, beta=beta, alpha=alpha)

    return run


def _one_hot(a: Attributes) -> Function:
    axis = a.get("axis", -1)

    def run(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        n = int(depth.reshape(()))
        wrapped = torch.remainder(indices.to(torch.int64), n)
        hot = wrapped.unsqueeze(axis) == torch.arange(n).reshape(
            [-1 if i == axis % (indices.dim() + 1) else 1 for i in range(indices.dim() + 1)]
        )
        return torch.where(hot, values[1], values[0])

    return run


def _arg_extremum(largest: bool) -> Callable[[Attributes], Function]:
    def rule(a: Attributes) -> Function:
        axis, keep, last = a.get("axis", 0), bool(a.get("keepdims", 1)), a.get("select_last_index", 0)
        find = torch.argmax if largest else torch.argmin

        def run(x: Tensor) -> Tensor:
            if last:
                return x.shape[axis] - 1 - find(x.flip(axis), dim=axis, keepdim=keep)
            return find(x, dim=axis, keepdim=keep)

        return run

    return rule


def _gather(a: Attributes) -> Function:
    axis = a.get("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        flat = torch.remainder(indices.reshape(-1).to(torch.int64), x.shape[axis])
        k = axis % x.dim()
        if indices.dim() == 0:
            return x.select(k, int(flat[0]))
        return x.index_select(k, flat).reshape(*x.shape[:k], *indices.shape, *x.shape[k + 1 :])

    return run


def _depth_to_space(a: Attributes) -> Function:
    b, columns = a.get("blocksize"), a.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if columns:
            x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
        else:
            x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(n, c // (b * b), h * b, w * b)

    return run


def _space_to_depth(a: Attributes) -> Function:
    b = a.get("blocksize")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
        return x.reshape(n, c * b * b, h // b, w // b)

    return run


def _range(a: Attributes) -> Function:
    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        values = [t.reshape(()).item() for t in (start, limit, delta)]
        return torch.arange(*values, dtype=start.dtype)

    return run


def _trilu(a: Attributes) -> Function:
    keep = torch.triu if a.get("upper", 1) else torch.tril
    return lambda x, k=None: keep(x, 0 if k is None else int(k.reshape(())))


def _thresholded_relu(a: Attributes) -> Function:
    alpha = a.get("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def _gelu(a: Attributes) -> Function:
    return lambda x: F.gelu(x, approximate=a.get("approximate", "none"))


def _size(a: Attributes) -> Function:
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


def _shape(a: Attributes) -> Function:
    start, end = a.get("start", 0), a.get("end")
    return lambda x: torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _expand(a: Attributes) -> Function:
    return lambda x, shape: x.expand(broadcast(x.shape, ints(shape)))


def _constant_of_shape(a: Attributes) -> Function:
    value = a.get("value", torch.zeros(1))
    return lambda shape: torch.full(ints(shape), value.reshape(()).item(), dtype=value.dtype)


def _activations(a: Attributes, names: Sequence[str], default: Sequence[str]) -> list[Function]:
    table = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
    chosen = [n.lower() for n in names] if names else list(default)
    if any(n not in table for n in chosen) or a.get("clip") is not None:
        raise NotImplementedError(f"recurrent cell with activations {chosen} or clipping")
    return [table[n] for n in chosen]


class _Cell(NamedTuple):
    """One direction of a recurrent op: weights (gates * hidden, n) of the input and (gates * hidden, hidden) of the
    state, their biases one after the other (2 * gates * hidden,), and activations."""

    w: Tensor
    r: Tensor
    b: Tensor
    f: Sequence[Function]


class _Optional(NamedTuple):
    """What a recurrent op may be given besides its input and weights, in ONNX's order."""

    b: Any = None
    lengths: Any = None
    h0: Any = None
    c0: Any = None
    peepholes: Any = None


def _recurrent(kind: str) -> Callable[[Attributes], Function]:
    """LSTM, GRU and RNN, unrolled over time; gates in ONNX's order (i o f c, z r h)."""
    default = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}[kind]

    def rule(a: Attributes) -> Function:
        direction, hidden = a.get("direction", "forward"), a.get("hidden_size")
        ways = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
        acts = _activations(a, a.get("activations", []), default * len(ways))
        batch_first, after = a.get("layout", 0), a.get("linear_before_reset", 0)
        if a.get("input_forget", 0):
            raise NotImplementedError("LSTM with coupled gates")

        def step(x: Tensor, h: Tensor, c: Tensor, cell: _Cell) -> Any:
            w, r, b, f = cell
            wb, rb = b.chunk(2)
            if kind == "RNN":
                return f[0](x @ w.t() + h @ r.t() + (wb + rb)), c
            if kind == "LSTM":
                i, o, g, n = (x @ w.t() + h @ r.t() + (wb + rb)).chunk(4, -1)
                c = f[0](g) * c + f[0](i) * f[1](n)
                return f[0](o) * f[2](c), c
            wz, wh = w[: 2 * hidden], w[2 * hidden :]
            rz, rh = r[: 2 * hidden], r[2 * hidden :]
            z, s = f[0](x @ wz.t() + h @ rz.t() + (wb + rb)[: 2 * hidden]).chunk(2, -1)
            inner = s * (h @ rh.t() + rb[2 * hidden :]) if after else (s * h) @ rh.t() + rb[2 * hidden :]
            n = f[1](x @ wh.t() + wb[2 * hidden :] + inner)
            return n + z * (h - n), c

        def run(x: Tensor, w: Tensor, r: Tensor, *optional: Any) -> Any:
            b, lengths, h0, c0, peepholes = _Optional(*optional)
            if lengths is not None or peepholes is not None:
                raise NotImplementedError(f"{kind} with sequence lengths or peepholes")
            x = x.transpose(0, 1) if batch_first else x
            steps, batch = x.shape[0], x.shape[1]
            outputs, last_h, last_c = [], [], []
            for d, backwards in enumerate(ways):
                h = x.new_zeros(batch, hidden) if h0 is None else (h0[:, d] if batch_first else h0[d])
                c = x.new_zeros(batch, hidden) if c0 is None else (c0[:, d] if batch_first else c0[d])
                bias = b[d] if b is not None else torch.zeros(2 * w.shape[1], dtype=w.dtype)
                cell = _Cell(w[d], r[d], bias, acts[d * len(default) : (d + 1) * len(default)])
                seen: list[Tensor] = []
                for t in reversed(range(steps)) if backwards else range(steps):
                    h, c = step(x[t], h, c, cell)
                    seen.append(h)
                outputs.append(torch.stack(seen[::-1] if backwards else seen))
                last_h.append(h)
                last_c.append(c)
            y, hs, cs = torch.stack(outputs, 1), torch.stack(last_h), torch.stack(last_c)
            if batch_first:
                y, hs, cs = y.permute(2, 0, 1, 3), hs.transpose(0, 1), cs.transpose(0, 1)
            return (y, hs, cs)[: a.outputs] if a.outputs > 1 else y

        return run

    return rule


RULES: dict[str, Converts] = {
    "ArgMax": _arg_extremum(True),
    "ArgMin": _arg_extremum(False),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Celu": _celu,
    "Clip": _clip,
    "Conv": _conv,
    "ConstantOfShape": _constant_of_shape,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _flatten,
    "GRU": _recurrent("GRU"),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "Identity": _identity,
    "LSTM": _recurrent("LSTM"),
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Min": _fold(torch.minimum),
    "OneHot": _one_hot,
    "PRelu": _prelu,
    "Pad": _pad,
    "RNN": _recurrent("RNN"),
    "Range": _range,
    "ReduceL1": _reduce(lambda x, d, k: x.abs().sum(d, keepdim=k)),
    "ReduceL2": _reduce(lambda x, d, k: (x * x).sum(d, keepdim=k).sqrt()),
    "ReduceMax": _reduce(lambda x, d, k: x.amax(d, keepdim=k)),
    "ReduceMean": _reduce(lambda x, d, k: x.mean(d, keepdim=k)),
    "ReduceMin": _reduce(lambda x, d, k: x.amin(d, keepdim=k)),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(lambda x, d, k: x.sum(d, keepdim=k)),
    "ReduceSumSquare": _reduce(lambda x, d, k: (x * x).sum(d, keepdim=k)),
    "Reshape": _reshape,
    "Selu": _selu,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Softplus": _softplus,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _fold(torch.add),
    "ThresholdedRelu": _thresholded_relu,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

CONSTANTS_ONLY = frozenset(
    [
        *("Acos", "ArgMax", "ArgMin", "Asin", "Atan", "Constant", "ConstantOfShape", "CumSum", "EyeLike"),
        *("IsInf", "IsNaN"),
        *("Mod", "NonZero", "OneHot", "Range", "ReduceLogSumExp", "ReduceProd", "Shape", "Size"),
        *("Tan", "TopK"),
    ]
)
"""Operators that are evaluated where they depend on constants or shapes alone: nothing bounds them, unless a set of ops
has a converter for one, which replaces ours."""

ACCEPTS_NEWER = [
    "Abs",
    "Acos",
    "Add",
    "And",
    "Asin",
    "Atan",
    "Ceil",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Cos",
    "CumSum",
    "Div",
    "Einsum",
    "Elu",
    "Equal",
    "Erf",
    "Exp",
    "EyeLike",
    "Floor",
    "GatherElements",
    "GatherND",
    "Greater",
    "GreaterOrEqual",
    "HardSigmoid",
    "HardSwish",
    "InstanceNormalization",
    "LayerNormalization",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "Log",
    "LogSoftmax",
    "MatMul",
    "Mod",
    "Mul",
    "Neg",
    "Not",
    "Or",
    "Pow",
    "Reciprocal",
    "Relu",
    "Round",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softmax",
    "Sqrt",
    "Sub",
    "Tan",
    "Tanh",
    "Tile",
    "Transpose",
    "Where",
    "Xor",
]
"""Ops of onnx2torch whose later versions only added element types."""


@dataclass(frozen=True)
class Foreign:
    """A converter of another package, as it stands in onnx2torch's registry."""

    plugin: Plugin
    convert: Function

    def __call__(self, node: Any, graph: Any) -> Any:
        return self.convert(node, graph)


def since_versions() -> dict[str, list[int]]:
    """The versions of every standard operator."""
    from onnx import defs

    versions: dict[str, list[int]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    return versions


def adopt(tool: Converter) -> None:
    """Add the converters of other packages, in place of those that were added before.

    Raises:
        ConfigError: one is for an operator that has a converter, or that there is not; or it cannot be imported.
    """
    theirs, versions = check_converters(tool, op_sets()), since_versions()
    for key in [k for k, v in tool.registry.items() if isinstance(v, Foreign)]:
        del tool.registry[key]
    for op, (plugin, rule) in theirs.items():
        for version in versions[op]:
            guard = partial(answerable, plugin, f"its converter of '{op}'", (NotImplementedError,))
            convert = Foreign(plugin, _adapt(rule, version, tool, guard))
            tool.add_converter(operation_type=op, version=version)(convert)


def check_converters(tool: Converter, sets: Iterable[OpSet]) -> dict[str, tuple[Plugin, Converts]]:
    """The converters of sets of other packages, with whose they are.

    Raises:
        ConfigError: one is for an operator that has a converter, or that there is not.
    """
    versions = since_versions()
    ours = {k.operation_type for k, v in tool.registry.items() if k.domain == "" and not isinstance(v, Foreign)}
    found = foreign_table("converters", ours, sets)
    for op, (plugin, _) in found.items():
        if op not in versions:
            raise ConfigError(f"the {plugin} has a converter for '{op}', which is no operator of the ONNX standard")
    return found


def register(tool: Converter) -> None:
    """Add our converters to a privately loaded onnx2torch; they replace its own for the same op.

    Raises:
        ConfigError: a set of ops has one for an operator that has one already.
    """
    versions = since_versions()
    for op, rule in (*RULES.items(), *our_table("converters", RULES.keys() - CONSTANTS_ONLY).items()):
        for key in [k for k in tool.registry if k.operation_type == op and k.domain == ""]:
            del tool.registry[key]
        for version in versions.get(op, ()):
            tool.add_converter(operation_type=op, version=version)(_adapt(rule, version, tool))
    for key in [k for k in tool.registry if k.operation_type == "Constant"]:
        del tool.registry[key]
    for version in versions["Constant"]:
        tool.add_converter(operation_type="Constant", version=version)(_constant(tool))
    known = {(k.operation_type, k.version): v for k, v in tool.registry.items() if k.domain == ""}
    for op in ACCEPTS_NEWER:
        have = sorted(v for name, v in known if name == op)
        for version in versions.get(op, ()):
            if have and version > have[-1]:
                tool.add_converter(operation_type=op, version=version)(known[op, have[-1]])


def _adapt(rule: Converts, version: int, tool: Converter, guard: Guard = nullcontext) -> Function:
    def convert(node: Any, graph: Any) -> Any:
        names = node.input_values
        with guard():
            function = rule(Attributes(dict(node.attributes), version, sum(map(bool, node.output_values))))
        present = [bool(name) for name in names]
        mapping = tool.mapping(tuple(name for name in names if name), node.output_values)
        return tool.result(Rule(function, present, guard), mapping)

    return convert


def _constant(tool: Converter) -> Function:
    def convert(node: Any, graph: Any) -> Any:
        (key, value), *more = node.attributes.items()
        if more or key not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
            raise NotImplementedError(f"Constant of kind '{key}'")
        dtype = torch.float32 if "float" in key else torch.int64
        tensor = value.to_torch() if key == "value" else torch.tensor(value, dtype=dtype)
        return tool.result(Constant(tensor), tool.mapping((), node.output_values))

    return convert
