"""Networks that end in a softmax, sigmoid or tanh: rows over what these are fed, which no saturation makes flat.

A row that compares two outputs of an increasing function, or one output with a constant, says the same of its inputs:
y_i <= y_j where z_i <= z_j. In floating point it does not: outputs far from the middle are equal, gradients zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verifier.core.handles import WeightStore
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp, NonlinearOp

# Nodes before the output among which the inputs of its last function are looked for.
_NEAR = 12
# Logarithms of outputs that float64 still holds, and how near two of them are when they are equal but for rounding.
_SMALLEST_LOG, _CLOSE = -600.0, 1e-6


@dataclass(frozen=True)
class Head:
    """The last function of a network, y = f(z).

    Attributes:
        node: index of z; it has as many elements as y, in the same order.
        group: outputs that belong together, those of one softmax; 1: every output is a function of one input.
        inverse: of f, of numbers; of a softmax that of one output, as a function of ``margins``.
        between: f's least and largest value.
        alone: no row is left over y, whose gradients are then nobody's business: where f overflows they are not even
            numbers.
    """

    node: int
    group: int
    inverse: Callable[[float], float]
    between: tuple[float, float]
    alone: bool = False

    def extended(self, z: Tensor, y: Tensor) -> Tensor:
        """(P, n_out) each to (P, 3 n_out): z, how far each z is ahead of the rest of its group, and y.

        A softmax has y_i <= d where the second is at most log(d / (1 - d)).
        """
        return torch.cat([z, self._margins(z) if self.group > 1 else z, y.detach() if self.alone else y], 1)

    def _margins(self, z: Tensor) -> Tensor:
        """z_i - log sum_{j != i} exp z_j, (P, n_out)."""
        rows = z.reshape(z.shape[0], -1, self.group)
        others = rows[..., None, :].expand(*rows.shape, self.group)
        same = torch.eye(self.group, dtype=torch.bool, device=z.device)
        return (rows - torch.logsumexp(others.masked_fill(same, -torch.inf), -1)).flatten(1)

    def rows(self, row_y: np.ndarray, d: np.ndarray, fixed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (M, n_out) over y, y-row . y <= d, as rows over :meth:`extended`.

        Args:
            fixed: (M,) bool, rows that stay as they are.

        Returns:
            rows (M, 3 n_out), thresholds (M,), and which of them are over z (M,) bool.
        """
        count, n = row_y.shape
        rows, level, moved = np.zeros((count, 3 * n)), d.copy(), np.zeros(count, dtype=bool)
        rows[:, 2 * n :] = row_y
        for m in np.flatnonzero(~fixed):
            at = np.flatnonzero(row_y[m])
            coefficients = row_y[m, at]
            pair = len(at) == 2 and coefficients.sum() == 0 and d[m] == 0
            if pair and (self.group == 1 or at[0] // self.group == at[1] // self.group):
                rows[m, at], moved[m] = coefficients, True
            elif len(at) == 1 and self.between[0] < d[m] / coefficients[0] < self.between[1]:
                rows[m, n + at], moved[m] = coefficients, True
                level[m] = coefficients[0] * self.inverse(d[m] / coefficients[0])
        rows[moved, 2 * n :] = 0
        return rows, level, moved


def _logit(y: float) -> float:
    return float(np.log(y) - np.log1p(-y))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)


def _is_softmax(z: Tensor, y: Tensor) -> bool:
    log = torch.log_softmax(z, -1)
    seen = log > _SMALLEST_LOG
    return bool((y[seen] > 0).all()) and _same(y[seen].log(), log[seen])


def _is_sigmoid(z: Tensor, y: Tensor) -> bool:
    return bool(((y >= 0) & (y <= 1)).all()) and _same(y, torch.sigmoid(z))


def _is_tanh(z: Tensor, y: Tensor) -> bool:
    return _same(y, torch.tanh(z))


_KINDS: Sequence[tuple[Callable[[Tensor, Tensor], bool], bool, Callable[[float], float], tuple[float, float]]] = (
    (_is_softmax, True, _logit, (0.0, 1.0)),
    (_is_sigmoid, False, _logit, (0.0, 1.0)),
    (_is_tanh, False, lambda y: float(np.arctanh(y)), (-1.0, 1.0)),
)


@torch.no_grad()
def find_head(graph: Graph, store: WeightStore, problem: Problem, device: torch.device) -> Head | None:
    """The last function of a network, found by its values at a few points of the first box: the nearest node that gives
    the outputs through one of the functions we know. A wrong guess costs effort, no more: candidates are replayed."""
    if not _curved(graph) or problem.witness_lower.shape[0] == 0:
        return None
    size, shape = graph.nodes[graph.output].size, graph.output_shape
    near = [n.index for n in graph.nodes[1 : graph.output] if n.size == size][-_NEAR:][::-1]
    if not near:
        return None
    low, up = problem.witness_lower[0].astype(np.float64), problem.witness_upper[0].astype(np.float64)
    share = np.random.default_rng(0).random((4, len(low)))
    x = torch.from_numpy(low * (1 - share) + up * share).to(device)
    values = graph.forward(x.reshape(len(x), *graph.input_shape), store, keep=(*near, graph.output))
    assert isinstance(values, dict)
    y = values[graph.output].reshape(len(x), *shape)
    if not bool(torch.isfinite(y).all()):
        return None
    for index in near:
        z = values[index].reshape(len(x), *shape)
        for matches, rows, inverse, between in _KINDS:
            group = shape[-1] if rows and shape else 1
            if (group > 1 or not rows) and bool(torch.isfinite(z).all()) and matches(z, y):
                return Head(index, group, inverse, between)
    return None


def _curved(graph: Graph) -> bool:
    """Whether the output is that of a function that is not piecewise linear, but for its shape."""
    node = graph.nodes[graph.output]
    while isinstance(node.op, AffineOp) and node.op.moves:
        node = graph.nodes[node.inputs[0]]
    return isinstance(node.op, NonlinearOp) and node.op.pieces is None
