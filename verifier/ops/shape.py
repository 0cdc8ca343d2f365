"""Ops that only move numbers. Dims and shapes are the value's own, without N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.linear_forms import Form, OneHot
from verifier.graph.op import AffineOp, Crossing, Params, Shape, Split


class StructuralOp(AffineOp):
    """An affine op whose every output is one input or zero: bounds move along with the values, without rounding."""

    moves = True
    plain_sums = True

    @property
    def exact_weights(self) -> bool:
        return True

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(xs, p)

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(rs, p)

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self.forward(ms, p)

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return Interval(self.forward([x.lower for x in xs], p), self.forward([x.upper for x in xs], p))

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 0

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return 0


@dataclass(frozen=True)
class Reshape(StructuralOp):
    """The same numbers in C order under another shape."""

    shape: Shape

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        """Where blocks of the input are blocks of the output: contiguous after the same leading dims."""
        shape = in_shapes[0]
        if not shape or not out_shape:
            return None
        n, lead = shape[dims[0]], math.prod(shape[: dims[0]])
        for dim, m in enumerate(out_shape):
            if math.prod(out_shape[:dim]) == lead and (m == n or (n % ranks == 0 and m % ranks == 0 and m > 1)):
                block = (*out_shape[:dim], -(-m // ranks), *out_shape[dim + 1 :])
                return Split(dim, replace(self, shape=block), (), False)
        return None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].reshape(xs[0].shape[0], *self.shape)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return (a.reshape(a.shape[0], *in_shapes[0]),)

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Single elements have the same flat positions."""
        if not isinstance(form, OneHot):
            return None
        return Crossing(form, [OneHot(form.index, form.values, in_shapes[0])], None, 0)


@dataclass(frozen=True)
class Permute(StructuralOp):
    """Output dim i is input dim ``dims[i]``."""

    dims: tuple[int, ...]

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        n = len(self.dims)
        return Split([d % n for d in self.dims].index(dims[0]), self, (), False) if n else None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return xs[0].permute(0, *(d % len(self.dims) + 1 for d in self.dims))

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        n = len(self.dims)
        inverse = sorted(range(n), key=lambda i: self.dims[i] % n)
        return (a.permute(0, *(d + 1 for d in inverse)),)


@dataclass(frozen=True)
class Concat(StructuralOp):
    """Values joined along ``dim``."""

    dim: int

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        apart = set(dims) - {self.dim % len(out_shape)}
        return Split(dims[0], self, (), False) if apart == set(dims) and len(apart) == 1 else None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return torch.cat(tuple(xs), self.dim + 1 if self.dim >= 0 else self.dim)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return a.split([s[self.dim] for s in in_shapes], self.dim + 1 if self.dim >= 0 else self.dim)


@dataclass(frozen=True)
class Gather(StructuralOp):
    """Output element j is flat input element ``index[j]``, or zero where the index is -1.

    Serves slice, select, index, pad, expand, split, flip, nearest upsampling, ...

    Attributes:
        index: int64, ``shape`` or flat; entries in [-1, input size).
        shape: output shape.
        inverse: int64 (input size, r), see :func:`inverse_index`: which outputs read each input. With it the transpose
            is a gather (and a sum over r), which is deterministic on every device; without it, an index_add.
    """

    index: Handle
    shape: Shape
    inverse: Handle | None = None

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        flat = F.pad(xs[0].flatten(1), (0, 1))
        index = p[0].flatten()
        index = torch.where(index < 0, flat.shape[1] - 1, index)
        return flat.index_select(1, index).reshape(xs[0].shape[0], *self.shape)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        flat, size = a.flatten(1), math.prod(in_shapes[0])
        if self.inverse is not None:
            padded = F.pad(flat, (0, 1))
            reads = torch.where(p[1] < 0, padded.shape[1] - 1, p[1])
            out = padded.index_select(1, reads.flatten()).reshape(a.shape[0], *reads.shape).sum(-1)
        else:
            index = p[0].flatten()
            out = a.new_zeros((a.shape[0], size + 1)).index_add_(1, torch.where(index < 0, size, index), flat)
            out = out[:, :size]
        return (out.reshape(a.shape[0], *in_shapes[0]),)

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return (self.inverse.shape[1] if self.inverse is not None else math.prod(out_shape)) - 1


def inverse_index(index: Tensor, size: int) -> Tensor:
    """Which outputs read each input of a :class:`Gather`.

    Args:
        index: int64 map from outputs to inputs, -1 for zero fill.
        size: number of input elements.

    Returns:
        int64 (size, r): for every input the flat outputs that read it, filled up with -1; r >= 1.
    """
    flat = index.flatten()
    outputs = torch.nonzero(flat >= 0).flatten()
    inputs = flat[outputs]
    order = torch.argsort(inputs, stable=True)
    inputs, outputs = inputs[order], outputs[order]
    counts = torch.bincount(inputs, minlength=size)
    first = torch.cumsum(counts, 0) - counts
    table = torch.full((size, max(1, int(counts.max()) if size else 1)), -1, dtype=torch.int64)
    table[inputs, torch.arange(len(inputs)) - first[inputs]] = outputs
    return table
