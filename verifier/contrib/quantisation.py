"""Quantised numbers: QuantizeLinear, DequantizeLinear, MatMulInteger, ConvInteger, QLinearMatMul and QLinearConv.

Integers are whole numbers here, within the range of their type at all times: what is quantised is cut off there, and
sums of products have room in int32 (which is checked). Quotients are exact ones, as the standard defines them, rounded
half to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.core.errors import UnsupportedOpError
from verifier.frontend.converters import Attributes, Function
from verifier.frontend.recorded import as_integers
from verifier.frontend.windows import auto_pad
from verifier.testing import Node

_TYPES = {2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16}
_WIDE = torch.float64


def _along(t: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point as it broadcasts: one number, one per slice of an axis, or one per block of it."""
    if t.dim() == 0 or t.numel() == 1:
        return t.reshape(())
    if block:
        d = axis % x.dim()
        return t.repeat_interleave(block, d).narrow(d, 0, x.shape[d])
    shape = [1] * x.dim()
    shape[axis] = -1
    return t.reshape(shape)


def _cut(x: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rounded, moved by the zero point and cut off at the ends of the type's range."""
    if dtype not in _TYPES.values():
        raise NotImplementedError(f"quantisation to {str(dtype).removeprefix('torch.')}")
    y = torch.round(x)
    if zero is not None:
        y = y + zero.to(x.dtype)
    ends = torch.iinfo(dtype)
    return as_integers(torch.minimum(torch.maximum(y, y.new_tensor(ends.min)), y.new_tensor(ends.max)), dtype)


def _quantize(a: Attributes) -> Function:
    axis, block, to = a.get("axis", 1), a.get("block_size", 0), a.get("output_dtype", 0)
    if to and to not in _TYPES:
        raise NotImplementedError(f"QuantizeLinear to element type {to}")
    if a.get("precision", 0) not in (0, 1):
        raise NotImplementedError("QuantizeLinear with a precision of its own")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        dtype = zero.dtype if zero is not None else _TYPES.get(to, torch.uint8)
        point = None if zero is None else _along(zero, x, axis, block)
        return _cut(x / _along(scale, x, axis, block), point, dtype)

    return run


def _dequantize(a: Attributes) -> Function:
    axis, block = a.get("axis", 1), a.get("block_size", 0)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        if x.dtype not in (*_TYPES.values(), torch.int32):
            raise NotImplementedError(f"DequantizeLinear of {str(x.dtype).removeprefix('torch.')}")
        y = x.to(scale.dtype)
        if zero is not None:
            y = y - _along(zero, x, axis, block).to(scale.dtype)
        return y * _along(scale, x, axis, block)

    return run


def _centred(x: Tensor, zero: Tensor | None, dim: int) -> Tensor:
    """Whole numbers minus their zero point, one or one per slice of a dim."""
    y = x.to(_WIDE)
    if zero is None:
        return y
    point = zero.to(_WIDE)
    if point.dim() == 1 and point.numel() > 1:
        shape = [1] * x.dim()
        shape[dim] = -1
        point = point.reshape(shape)
    return y - (point if point.dim() > 1 else point.reshape(()) if point.numel() == 1 else point)


def _check_room(terms: int, offset: Tensor | None = None) -> None:
    """Sums of products of two numbers of 9 bits have room in int32, with what is added to them."""
    more = 0 if offset is None else int(offset.to(torch.int64).abs().max())
    if terms * 255 * 255 + more > 2**31 - 1:
        raise UnsupportedOpError("a sum of integer products that may not have room in int32")


def _matmul_integer(a: Attributes) -> Function:
    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        _check_room(x.shape[-1])
        out = torch.matmul(_centred(x, x_zero, -2), _centred(w, w_zero, -1))
        return as_integers(out, torch.int32)

    return run


def _convolved(a: Attributes, x: Tensor, w: Tensor) -> Tensor:
    rank = w.dim() - 2
    _check_room(w[0].numel())
    step, spread = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    both = auto_pad(a.get("auto_pad", "NOTSET"), x.shape[2:], w.shape[2:], step, spread, a.get("pads", [0] * 2 * rank))
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    wide = F.pad(x, [p for pair in reversed(both) for p in pair])
    return conv(wide, w, None, step, 0, spread, a.get("group", 1))


def _conv_integer(a: Attributes) -> Function:
    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        return as_integers(_convolved(a, _centred(x, x_zero, 1), _centred(w, w_zero, 0)), torch.int32)

    return run


def _qlinear_matmul(a: Attributes) -> Function:
    def run(x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, ws: Tensor, wz: Tensor, ys: Tensor, yz: Tensor) -> Tensor:
        _check_room(x.shape[-1])
        if ws.numel() > 1 or xs.numel() > 1:
            raise NotImplementedError("QLinearMatMul with scales of rows or columns")
        out = torch.matmul(_centred(x, xz, -2), _centred(w, wz, -1))
        factor = xs.to(_WIDE).reshape(()) * ws.to(_WIDE).reshape(()) / ys.to(_WIDE).reshape(())
        return _cut(out * factor, yz, yz.dtype)

    return run


def _qlinear_conv(a: Attributes) -> Function:
    def run(
        x: Tensor, xs: Tensor, xz: Tensor, w: Tensor, ws: Tensor, wz: Tensor, ys: Tensor, yz: Tensor, b: Any = None
    ) -> Tensor:
        out = _convolved(a, _centred(x, xz, 1), _centred(w, wz, 0))
        column = [-1, *[1] * (w.dim() - 2)]
        if b is not None:
            _check_room(w[0].numel(), b)
            out = out + b.to(_WIDE).reshape(column)
        factor = xs.to(_WIDE).reshape(()) * ws.to(_WIDE) / ys.to(_WIDE).reshape(())
        return _cut(out * (factor.reshape(column) if factor.numel() > 1 else factor.reshape(())), yz, yz.dtype)

    return run


CONVERTERS = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QLinearConv": _qlinear_conv,
}
_SCALE, _ZERO = np.array(0.125, dtype=np.float32), np.array(7, dtype=np.uint8)
NODES = [
    Node("QuantizeLinear", (1, 6), (_SCALE, _ZERO), {}, 13, (-20.0, 20.0), out_type=2),
    Node("QuantizeLinear", (1, 6), (_SCALE, np.array(-3, dtype=np.int8)), {}, 13, (-20.0, 20.0), out_type=3),
    Node(
        "QuantizeLinear",
        (1, 3, 2),
        (np.array([0.25, 0.5, 1], dtype=np.float32), np.array([1, 2, 3], dtype=np.uint8)),
        {"axis": 1},
        13,
        (-20.0, 20.0),
        out_type=2,
    ),
]
