"""The bound formulas once more, in rational arithmetic: what a certificate must not exceed.

Only the planes of the relaxations are taken from the verifier (they are numbers, and their own soundness is tested with
the ops); the walk, the sums and the intervals are written out with fractions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from tests.bounds.nets import Case
from tests.support.device import DEVICE, array
from verifier.core.interval import Interval
from verifier.graph.graph import Node
from verifier.graph.op import AffineOp, Relaxation, UnaryPlanes

Exact = np.ndarray  # of Fraction


def exact(values: Tensor | np.ndarray) -> Exact:
    """Floats as the rational numbers that they are."""
    floats = array(values.double()) if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    return np.vectorize(Fraction, otypes=[object])(floats) if floats.size else floats.astype(object)


@dataclass(frozen=True)
class Matrix:
    """Entries of a sparse (n_out, n_in) matrix that are not zero: (output, input, value)."""

    entries: list[tuple[int, int, Fraction]]
    shape: tuple[int, int]

    def rows_times(self, a: Exact) -> Exact:
        """a W for rows a, (S, n_out) to (S, n_in)."""
        out = np.full((a.shape[0], self.shape[1]), Fraction(0), dtype=object)
        for j, i, w in self.entries:
            out[:, i] += a[:, j] * w
        return out

    def image(self, low: Exact, high: Exact) -> tuple[Exact, Exact]:
        """Least and largest values of W x for low <= x <= high."""
        least, most = (np.full(self.shape[0], Fraction(0), dtype=object) for _ in range(2))
        for j, i, w in self.entries:
            ends = (low[i], high[i]) if w > 0 else (high[i], low[i])
            least[j] += w * ends[0]
            most[j] += w * ends[1]
        return least, most


def affine_parts(case: Case, node: Node) -> tuple[list[Matrix], Exact]:
    """The matrix of every operand and the offset; images of unit vectors, so nothing is rounded."""
    assert isinstance(node.op, AffineOp)
    shapes = case.graph.in_shapes(node)
    with case.backend.weights.fetch(node.op.handles, torch.float64) as p:
        zeros = [torch.zeros(1, *s, dtype=torch.float64, device=DEVICE) for s in shapes]
        offset = exact(node.op.forward(zeros, p).flatten())
        matrices = []
        for k, shape in enumerate(shapes):
            n = zeros[k].numel()
            units = [torch.zeros(n, *s, dtype=torch.float64, device=DEVICE) for s in shapes]
            units[k] = torch.eye(n, dtype=torch.float64, device=DEVICE).reshape(n, *shape)
            columns = array(node.op.linear(units, p).flatten(1))
            entries = [(int(j), int(i), Fraction(columns[i, j])) for i, j in np.argwhere(columns)]
            matrices.append(Matrix(entries, (columns.shape[1], n)))
    return matrices, offset


def positive(a: Exact) -> Exact:
    return np.where(a > 0, a, Fraction(0))


def negative(a: Exact) -> Exact:
    return np.where(a < 0, a, Fraction(0))


def affine_image(case: Case, node: Node, inputs: list[Interval]) -> tuple[Exact, Exact]:
    """Exact interval of an affine node over the intervals (1, *shape) of its operands."""
    matrices, offset = affine_parts(case, node)
    low, high = offset.copy(), offset.copy()
    for matrix, box in zip(matrices, inputs, strict=True):
        least, most = matrix.image(exact(box.lower.flatten()), exact(box.upper.flatten()))
        low, high = low + least, high + most
    return low, high


def walk_bound(
    case: Case,
    start: Mapping[int, Exact],
    planes: Mapping[int, Relaxation],
    splits: Mapping[int, Tensor] | None = None,
) -> list[Fraction]:
    """Exact value of the backward bound.

    Args:
        start: node index to (S, n) coefficients.
        planes: unary planes of one domain, shared by all rows.
        splits: (1, 1, *in_shape), added to the coefficients on the input of a nonlinear node.
    """
    pending = dict(start)
    rows = next(iter(start.values())).shape[0]
    total = np.array([Fraction(0)] * rows)
    for node in reversed(case.graph.nodes[1:]):
        a = pending.pop(node.index, None)
        if a is None:
            continue
        if isinstance(node.op, AffineOp):
            matrices, offset = affine_parts(case, node)
            total = total + a @ offset
            parts = [matrix.rows_times(a) for matrix in matrices]
        else:
            plane = planes[node.index]
            assert isinstance(plane, UnaryPlanes)

            def flat(t: Tensor, node: Node = node) -> Exact:
                return exact(t.expand(1, 1, *node.shape).flatten())

            total = total + positive(a) @ flat(plane.lower_intercept) + negative(a) @ flat(plane.upper_intercept)
            part = positive(a) * flat(plane.lower_slope) + negative(a) * flat(plane.upper_slope)
            if splits is not None and node.index in splits:
                part = part + exact(splits[node.index].flatten())
            parts = [part]
        for i, part in zip(node.inputs, parts, strict=True):
            pending[i] = pending[i] + part if i in pending else part
    a = pending[0]
    l, u = exact(case.box.lower.flatten()), exact(case.box.upper.flatten())
    return list(total + positive(a) @ l + negative(a) @ u)
