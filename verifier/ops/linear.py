"""Products with a constant matrix: Linear (last dim) and MatMulConstant (batched, either side)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core import sums
from verifier.core.handles import Blocks, Handle
from verifier.core.numerics import underflow
from verifier.core.runtime import rate
from verifier.graph.linear_forms import Dense, Form, OneHot
from verifier.graph.op import AffineOp, Crossing, Params, Shape, Split, folded_terms
from verifier.ops.layout import reduce_count, sum_rest, unbroadcast

# Most bytes of |W| that are made at once; a multiple of any reasonable row, and small beside a layer worth sharding.
_BLOCK_BYTES = 4 << 20


def absolute_product(x: Tensor, weight: Tensor | Blocks, bias: Tensor | None) -> Tensor:
    """x |W|^T + |b| without ever holding a second copy of a large W: |W| is made in blocks of whole rows.

    The cut depends on the weight's shape and dtype alone, so that equal layers give equal kernel calls everywhere.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).
    """
    if isinstance(weight, Blocks):
        y = _through(x, weight, magnitudes=True)
        return y if bias is None else y + bias.abs()
    out, width = weight.shape
    rows = max(1, _BLOCK_BYTES // max(1, width * weight.element_size()))
    if rows >= out:
        return sums.linear(x, weight.abs(), None if bias is None else bias.abs())
    y = x.new_empty((*x.shape[:-1], out))
    for i in range(0, out, rows):
        part = slice(i, min(i + rows, out))
        y[..., part] = sums.linear(x, weight[part].abs(), None if bias is None else bias[part].abs())
    return y


@dataclass(frozen=True)
class Linear(AffineOp):
    """y = x W^T + b on the last dim.

    Attributes:
        weight: (out, in).
        bias: (out,).
        bias_magnitude: (out,), sum of the magnitudes that were folded into the bias; given when parameters were folded.
        folded: roundings behind one stored parameter; FOLDED_TERMS when left out with a ``bias_magnitude``.
        reach: by which factor numbers between the steps that were folded can differ from those of the op itself.
        run: roundings of a float32 run besides those of this op: the network itself computes the same otherwise.
    """

    weight: Handle
    bias: Handle | None = None
    bias_magnitude: Handle | None = None
    folded: int = 0
    reach: float = 1.0
    run: int = 0

    plain_sums = True

    @property
    def exact_weights(self) -> bool:
        return self.folded == 0 and self.bias_magnitude is None

    def reads_all(self, mask: Tensor) -> bool:
        return True

    @property
    def streamable(self) -> tuple[Handle, ...]:
        return (self.weight,)

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        return Split(len(out_shape) - 1, self, (0,) * len(self.handles), whole=True)

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        if isinstance(p[0], Blocks):
            y = _through(xs[0], p[0])
            return y + p[1] if self.bias is not None else y
        return sums.linear(xs[0], p[0], p[1] if self.bias is not None else None)

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return _through(xs[0], p[0])

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (_back(a, p[0]),)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        if self.bias is None:
            return None
        return sum_rest(sums.dot(a, p[1]))

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Single elements pick rows of the weight: no product is needed."""
        if not isinstance(form, OneHot):
            return None
        (shape,), out = in_shapes, p[0].shape[0]
        a = _pick_rows(p[0], form.index % out) * form.values[:, None]
        count = math.prod(shape[:-1])
        if count > 1:
            wide = a.new_zeros((a.shape[0], count, a.shape[1]))
            wide[torch.arange(a.shape[0], device=a.device), form.index // out] = a
            a = wide
        constant = None if self.bias is None else (p[1][form.index % out] * form.values)[None]
        part = Dense(a.reshape(1, -1, *shape))
        return Crossing(form, [part], constant, self.backward_terms(in_shapes, form.shape))

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return absolute_product(rs[0], p[0], None)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        y = absolute_product(ms[0], p[0], p[-1] if self.bias is not None else None)
        return torch.add(y, ms[0].sum(-1, keepdim=True), alpha=underflow(y.dtype))

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.weight.shape[1] + 1 + folded_terms(self.folded, self.bias_magnitude)

    def run_rate(self, in_shapes: Sequence[Shape], out_shape: Shape) -> float:
        return rate(self.forward_terms(in_shapes, out_shape) + self.run)

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.weight.shape[0] + folded_terms(self.folded, self.bias_magnitude)


def _through(x: Tensor, w: Tensor | Blocks, magnitudes: bool = False) -> Tensor:
    """x W^T (or x |W|^T); in blocks a sum of the blocks' products."""
    if isinstance(w, Tensor):
        return sums.linear(x, w.abs() if magnitudes else w)
    out, start = None, 0
    dtype = torch.float64 if sums.is_long(w.shape[1], x.dtype) else x.dtype
    for block in w:
        part = sums.linear(x[..., start : start + block.shape[1]], block.abs() if magnitudes else block)
        out = part.to(dtype) if out is None else out.add_(part)
        start += block.shape[1]
    assert out is not None
    return out.to(x.dtype)


def _back(a: Tensor, w: Tensor | Blocks) -> Tensor:
    """a W; in blocks their products side by side."""
    if isinstance(w, Tensor):
        return sums.product(a, w)
    out = a.new_empty((*a.shape[:-1], w.shape[1]))
    start = 0
    for block in w:
        out[..., start : start + block.shape[1]] = sums.product(a, block)
        start += block.shape[1]
    return out


def _pick_rows(w: Tensor | Blocks, index: Tensor) -> Tensor:
    """Rows of a matrix, (n, m)."""
    return w[index] if isinstance(w, Tensor) else torch.cat([block[index] for block in w], 1)


@dataclass(frozen=True)
class MatMulConstant(AffineOp):
    """y = x @ W, or W @ x when ``left``, with torch.matmul's broadcasting over the leading dims of the value.

    Attributes:
        weight: (..., k, m), or (..., n, k) when ``left``; at least two dims. The value has at least two dims as well.
    """

    weight: Handle
    left: bool = False

    plain_sums = True

    @property
    def exact_weights(self) -> bool:
        return True

    def reads_all(self, mask: Tensor) -> bool:
        return True

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        plain = not self.left and len(self.weight.shape) == 2
        return Split(len(out_shape) - 1, self, (1,), whole=True) if plain else None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._product(xs[0], p[0])

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._product(xs[0], p[0])

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        w = p[0].transpose(-1, -2)
        out = torch.matmul(w, a) if self.left else torch.matmul(a, w)
        return (unbroadcast(out, in_shapes[0]),)

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self._product(rs[0], p[0].abs())

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self._product(ms[0], p[0].abs() + underflow(p[0].dtype))

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.weight.shape[-1] if self.left else self.weight.shape[-2]

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        lead = math.prod(out_shape[:-2]) if len(out_shape) > 2 else 1
        copies = reduce_count(in_shapes[0][:-2], out_shape[:-2]) if lead > 1 else 1
        return (self.weight.shape[-2] if self.left else self.weight.shape[-1]) + copies - 1

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        missing = w.ndim - (x.ndim - 1)
        if missing > 0:
            x = x.reshape(x.shape[0], *[1] * missing, *x.shape[1:])
        return torch.matmul(w, x) if self.left else torch.matmul(x, w)
