"""Networks with slopes to follow where derivatives say nothing: steps, and functions that are flat in floating point.

Values are those of the network, bit for bit; only gradients differ. Straight-through estimators: Bengio, Leonard,
Courville, *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation*, 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.graph import Graph
from verifier.graph.op import NonlinearOp, Op, Params

# Widths of smooth steps, as shares of the mean size of what a point feeds them; points take them in turn, so that a
# point always has the same one: narrow ones tell the truth about a small move, wide ones about a large one.
_SHARES = (0.25, 0.5, 0.125, 1.0)


def guided(graph: Graph) -> Graph:
    """The network with the slopes that its ops recommend for a search; itself where they recommend none."""
    probe = torch.zeros(1, 1)
    nodes = tuple(
        replace(node, op=_Guided(node.op))
        if isinstance(node.op, NonlinearOp) and node.op.guide(probe, torch.ones(1, 1)) is not None
        else node
        for node in graph.nodes
    )
    changed = any(a is not b for a, b in zip(nodes, graph.nodes, strict=True))
    return replace(graph, nodes=nodes) if changed else graph


@dataclass(frozen=True)
class _Guided(Op):
    """Another op, which is followed along its ``guide`` on the way back."""

    op: NonlinearOp

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        needed = torch.is_grad_enabled() and xs[0].requires_grad
        return _Followed.apply(xs[0], self.op) if needed else self.op.forward(xs, p)  # type: ignore[no-any-return]

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        return self.op.interval(xs, p)


class _Followed(torch.autograd.Function):
    """The op's values, with its guide in place of the derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, op: NonlinearOp) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(z)
        return op.forward((z,), ())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        slope = ctx.op.guide(z, _widths(z))
        assert slope is not None
        return gradients[0] * slope, None


def _widths(z: Tensor) -> Tensor:
    """(P, 1, ...): one width per point, relative to how large the entries of its z (P, *shape) are."""
    size = z.abs().reshape(z.shape[0], -1).mean(1).clamp(min=1e-6)
    share = size.new_tensor(_SHARES).repeat(-(-z.shape[0] // len(_SHARES)))[: z.shape[0]]
    return (size * share).view(-1, *([1] * (z.dim() - 1)))
