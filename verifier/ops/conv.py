"""Convolution and transposed convolution in one, two or three dims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.core.handles import Handle
from verifier.core.numerics import underflow
from verifier.graph.linear_forms import Dense, Form, OneHot, Patches, is_image, patches, windowed
from verifier.graph.op import AffineOp, Crossing, Params, Shape, Split, folded_terms
from verifier.ops.layout import merge_lead, sum_rest, tuple_of

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class Conv(AffineOp):
    """Cross-correlation over the last ``dims`` dims; value shape (..., C, *space). Its kernels may be Winograd or FFT.

    Ints are allowed for stride, padding, dilation and output_padding and become tuples of length ``dims``.

    Attributes:
        weight: (out, in / groups, *kernel); transposed: (in, out / groups, *kernel).
        bias: (out,).
        bias_magnitude: (out,), sum of the magnitudes that were folded into the bias; given when parameters were folded.
        padding: symmetric zero padding.
        output_padding: only for transposed.
        folded: roundings behind one stored parameter; FOLDED_TERMS when left out with a ``bias_magnitude``.
        reach: by which factor numbers between the steps that were folded can differ from those of the op itself.
    """

    weight: Handle
    bias: Handle | None = None
    bias_magnitude: Handle | None = None
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    dilation: tuple[int, ...] = (1,)
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    dims: int = 2
    folded: int = 0
    reach: float = 1.0

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation"):
            object.__setattr__(self, name, tuple_of(getattr(self, name), self.dims))
        object.__setattr__(self, "output_padding", tuple_of(self.output_padding or 0, self.dims))

    seeks_windows = True

    def reads_all(self, mask: Tensor) -> bool:
        """Of all outputs it is not asked what strides and paddings leave out."""
        return bool(mask.all())

    @property
    def kind(self) -> str:
        return "ConvTranspose" if self.transposed else "Conv"

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        """By output channel."""
        if self.groups != 1:
            return None
        cut = (1 if self.transposed else 0, *[0] * (len(self.handles) - 1))
        return Split(len(out_shape) - self.dims - 1, self, cut, whole=True)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._conv(xs[0], p[0], p[1] if self.bias is not None else None)

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._conv(xs[0], p[0], None)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        shape = in_shapes[0]
        flat = merge_lead(a, self.dims + 1)
        if self.transposed:
            out = _CONV[self.dims](flat, p[0], None, self.stride, self.padding, self.dilation, self.groups)
            for d in range(self.dims):
                out = out.narrow(d + 2, 0, shape[d - self.dims])
        else:
            kernel = self.weight.shape[2:]
            extra = tuple(
                shape[d - self.dims]
                - (flat.shape[d + 2] - 1) * self.stride[d]
                + 2 * self.padding[d]
                - self.dilation[d] * (kernel[d] - 1)
                - 1
                for d in range(self.dims)
            )
            out = _TRANSPOSED[self.dims](flat, p[0], None, self.stride, self.padding, extra, self.groups, self.dilation)
        return (out.reshape(a.shape[0], *shape),)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        if self.bias is None:
            return None
        per_channel = a.flatten(-self.dims).sum(-1)  # (N, ..., C)
        return sum_rest(per_channel @ p[1])

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Single elements become windows of the kernel; windows grow by it, in one transposed convolution of all."""
        (shape,) = in_shapes
        if not self._windowed(shape):
            return None
        if isinstance(form, Dense):
            form = windowed(form)
        (sy, sx), (py, px) = self.stride, self.padding
        constant = None
        if isinstance(form, OneHot):
            height, width = form.shape[-2:]
            channel = form.index // (height * width)
            top, left = form.index % (height * width) // width, form.index % width
            a = (p[0][channel] * form.values[:, None, None, None])[None]
            if self.bias is not None:
                constant = (p[1][channel] * form.values)[None]
        elif isinstance(form, Patches):
            top, left = form.top, form.left
            a = F.conv_transpose2d(form.a.flatten(0, 1), p[0], stride=(sy, sx)).unflatten(0, form.a.shape[:2])
            if self.bias is not None:
                constant = (form.a * p[1][:, None, None]).flatten(2).sum(-1, dtype=total)
        else:
            return None
        part = patches(a, top * sy - py, left * sx - px, shape)
        return Crossing(form, [part], constant, self.backward_terms(in_shapes, form.shape))

    def _windowed(self, in_shape: Shape) -> bool:
        """Whether windows can cross this convolution."""
        plain = self.dims == 2 and not self.transposed and self.groups == 1 and all(d == 1 for d in self.dilation)
        return plain and is_image(in_shape)

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self._conv(rs[0], p[0].abs(), None)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        weight = p[0].abs() + underflow(p[0].dtype)
        return self._conv(ms[0], weight, p[-1].abs() if self.bias is not None else None)

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        fan = self.weight.shape[0] // self.groups if self.transposed else self.weight.shape[1]
        return fan * self._taps + 1 + self._folded

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        fan = self.weight.shape[1] if self.transposed else self.weight.shape[0] // self.groups
        return fan * self._taps + self._folded

    @property
    def _taps(self) -> int:
        return math.prod(self.weight.shape[2:])

    @property
    def _folded(self) -> int:
        return folded_terms(self.folded, self.bias_magnitude)

    def _conv(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        lead = x.shape[: x.ndim - self.dims - 1]
        flat = merge_lead(x, self.dims + 1)
        if self.transposed:
            y = _TRANSPOSED[self.dims](
                flat, w, b, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        else:
            y = _CONV[self.dims](flat, w, b, self.stride, self.padding, self.dilation, self.groups)
        return y.reshape(*lead, *y.shape[1:])
