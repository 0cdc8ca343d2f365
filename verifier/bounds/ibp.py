"""Interval bound propagation, and the magnitudes that certificates charge rounding with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from verifier.bounds.walk import Charges
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import CHARGE_SAFETY, gamma, tiny, widen
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp


def propagate(
    graph: Graph,
    backend: ParallelBackend,
    box: Interval,
    known: Mapping[int, Interval] | None = None,
    rounding: bool = True,
) -> tuple[dict[int, Interval], Charges]:
    """Interval bounds of every node.

    Args:
        box: (B, *input_shape); its dtype decides the arithmetic.
        known: tighter bounds of some nodes, in the same dtype; intersected before they are used.
        rounding: widen every affine result by its rounding error, so that the bounds hold in exact arithmetic.

    Returns:
        bounds by node index, each (B, *shape), and the magnitudes for charges.
    """
    dtype = box.lower.dtype
    bounds: dict[int, Interval] = {0: box}
    value: dict[int, Tensor] = {0: box.magnitude()}
    partial: dict[int, Tensor] = {0: value[0]}
    for node in graph.nodes[1:]:
        xs = [bounds[i] for i in node.inputs]
        op = node.op
        with backend.weights.fetch(op.handles, dtype) as p:
            found = op.interval(xs, p)
            if isinstance(op, AffineOp):
                terms = op.forward_terms(graph.in_shapes(node), node.shape)
                # |W| m + |b|; the centre and radius form adds at most the same terms once more.
                sums = op.magnitude([value[i] for i in node.inputs], p) * CHARGE_SAFETY
                partial[node.index] = sums
                if rounding and terms:
                    found = widen(found.lower, found.upper, 4 * gamma(terms + 4, dtype) * sums + tiny(dtype))
        if known is not None and node.index in known:
            found = found.intersect(known[node.index])
        bounds[node.index] = found
        value[node.index] = torch.nan_to_num(found.magnitude(), nan=float("inf"))
        partial.setdefault(node.index, value[node.index])
    return bounds, Charges(value, partial)
