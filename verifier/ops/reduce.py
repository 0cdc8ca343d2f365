"""Sums and averages. Dims are the value's own, without N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.graph.linear_forms import Form, OneHot, Patches, is_image, one_window, patches
from verifier.graph.op import AffineOp, Crossing, Params, Shape, Split
from verifier.ops.layout import kept_dim, merge_lead, reduce_count, tuple_of


class _Reduction(AffineOp):
    """A linear map with non-negative weights, so that |W| m is the op itself."""

    plain_sums = True

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(xs, p)

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(rs, p)


@dataclass(frozen=True)
class Sum(_Reduction):
    """Sum over ``dims``."""

    dims: tuple[int, ...]
    keepdim: bool = False

    @property
    def exact_weights(self) -> bool:
        return True

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        dim = kept_dim(dims[0], self.dims, in_shapes[0], self.keepdim)
        return None if dim is None else Split(dim, self, (), False)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].sum(_after_batch(self.dims), keepdim=self.keepdim)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (_spread_back(a, self.dims, in_shapes[0]),)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(ms, p)

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return reduce_count(out_shape, in_shapes[0])

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Mean(_Reduction):
    """Mean over ``dims``."""

    dims: tuple[int, ...]
    keepdim: bool = False

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        dim = kept_dim(dims[0], self.dims, in_shapes[0], self.keepdim)
        return None if dim is None else Split(dim, self, (), False)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].mean(_after_batch(self.dims), keepdim=self.keepdim)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        count = math.prod(in_shapes[0][d] for d in self.dims)
        return (_spread_back(a / count, self.dims, in_shapes[0]),)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return ms[0].sum(_after_batch(self.dims), keepdim=self.keepdim)

    def run_rate(self, in_shapes: Sequence[Shape], out_shape: Shape) -> float:
        """The error of the sum is divided as well."""
        return 2 * super().run_rate(in_shapes, out_shape) / reduce_count(out_shape, in_shapes[0])

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return reduce_count(out_shape, in_shapes[0]) + 1

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 2  # a GPU multiplies by the rounded reciprocal


@dataclass(frozen=True)
class AvgPool(_Reduction):
    """Average pooling as in torch over the last ``len(kernel)`` dims; value shape (..., C, *space)."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = (0,)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        n = len(self.kernel)
        object.__setattr__(self, "stride", tuple_of(self.stride or self.kernel, n))
        object.__setattr__(self, "padding", tuple_of(self.padding, n))

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        return Split(dims[0], self, (), False) if dims[0] < len(out_shape) - len(self.kernel) else None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        x, n = xs[0], len(self.kernel)
        flat = merge_lead(x, n + 1)
        options = (self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        if n == 1:
            if self.divisor_override is not None:
                raise ValueError("average pooling over one dim has no divisor_override")
            y = F.avg_pool1d(flat, *options)
        elif n == 2:
            y = F.avg_pool2d(flat, *options, self.divisor_override)
        else:
            y = F.avg_pool3d(flat, *options, self.divisor_override)
        return y.reshape(*x.shape[: x.ndim - n - 1], *y.shape[1:])

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        # Partial sums come before the division: bound them by the undivided sum.
        return self.forward(ms, p) * max(math.prod(self.kernel), self.divisor_override or 1)

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Windows grow by the kernel, where the image has no padding."""
        (shape,) = in_shapes
        if len(self.kernel) != 2 or any(self.padding) or self.ceil_mode or not is_image(shape):
            return None
        if isinstance(form, OneHot):
            form = one_window(form)
        if not isinstance(form, Patches):
            return None
        b, rows, channels, kh, kw = form.a.shape
        (sy, sx), (height, width) = self.stride, self.kernel
        share = form.a.reshape(-1, 1, kh, kw) / (self.divisor_override or height * width)
        a = F.conv_transpose2d(share, share.new_ones((1, 1, height, width)), stride=(sy, sx))
        part = patches(a.reshape(b, rows, channels, *a.shape[2:]), form.top * sy, form.left * sx, shape)
        return Crossing(form, [part], None, self.backward_terms(in_shapes, form.shape))

    def run_rate(self, in_shapes: Sequence[Shape], out_shape: Shape) -> float:
        """The error of the sum is divided as well."""
        undivided = max(math.prod(self.kernel), self.divisor_override or 1)
        return 2 * super().run_rate(in_shapes, out_shape) / undivided

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return math.prod(self.kernel) + 1

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return math.prod(-(-k // s) for k, s in zip(self.kernel, self.stride, strict=True)) + 1


def _after_batch(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(d + 1 if d >= 0 else d for d in dims)


def _spread_back(a: Tensor, dims: Sequence[int], shape: Shape) -> Tensor:
    """Transpose of a sum over ``dims``: repeat (N, *reduced) over the dims that went."""
    reduced = {d % len(shape) for d in dims}
    kept = [1 if i in reduced else s for i, s in enumerate(shape)]
    return a.reshape(a.shape[0], *kept).expand(a.shape[0], *shape)
