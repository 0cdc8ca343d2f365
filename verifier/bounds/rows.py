"""Interval bounds of rows over the outputs, from those of the output itself."""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.bounds.crown import BoundState, Specification
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import gamma, underflow
from verifier.graph.graph import Graph


def rows_by_intervals(graph: Graph, backend: ParallelBackend, state: BoundState, spec: Specification) -> Tensor:
    """Lower bounds (B, S), float64; a margin accounts for rounding errors, and for those of a checker of proofs."""
    out, box = (
        Interval(*backend.gather_features(i, torch.stack(state.bounds[i]))).to(torch.float64) for i in (graph.output, 0)
    )
    y = spec.y.flatten(2)
    low, up = out.lower.flatten(1)[:, None], out.upper.flatten(1)[:, None]
    value = (y.clamp(min=0) * low + y.clamp(max=0) * up).sum(-1)
    size = (y.abs() * out.magnitude().flatten(1)[:, None]).sum(-1)
    box_terms = 0
    if spec.x is not None:
        box_terms = box.lower[0].numel()
        x = spec.x.flatten(2)
        value = value + (x.clamp(min=0) * box.lower.flatten(1) + x.clamp(max=0) * box.upper.flatten(1)).sum(-1)
        size = size + (x.abs() * box.magnitude().flatten(1)).sum(-1)
    terms = y.shape[-1] + box_terms + 4
    # Bounds are float32, so that a product which underflows costs no more than this for any of them.
    lost = terms * 2.0**130 * underflow(torch.float64)
    room = 0.0 if state.proof is None else 1e-9 * size
    return value - size * gamma(terms, torch.float64) - lost - room
