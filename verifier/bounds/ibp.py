"""Interval bound propagation (Gowal et al., 2018), and the magnitudes that rounding errors are bounded by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from verifier.bounds.engine import Engine
from verifier.bounds.walk import Magnitudes
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma, widen
from verifier.core.runtime import LARGEST, MOST_READ, RunModel
from verifier.graph import traverse
from verifier.graph.graph import Node
from verifier.graph.op import AffineOp, NonlinearOp, Op


def propagate(
    engine: Engine, box: Interval, known: Mapping[int, Interval] | None = None
) -> tuple[dict[int, Interval], Magnitudes]:
    """Interval bounds of every node, in the engine's arithmetic.

    Args:
        box: (B, *input_shape), of any dtype.
        known: tighter bounds of some nodes, in the engine's dtype; intersected before they are used.

    Returns:
        bounds by node index, each (B, *shape), and the magnitudes of their values and sums.
    """
    state = start(box.to(engine.dtype), engine.arithmetic.run)
    for node in traverse.forward(engine.graph.nodes):
        step(engine, node, *state)
        if known is not None and node.index in known:
            replace(node, known[node.index], *state)
    bounds, magnitudes = state
    return bounds, magnitudes


def start(box: Interval, run: RunModel | None = None) -> tuple[dict[int, Interval], Magnitudes]:
    """What is known before the first node."""
    magnitudes = Magnitudes({}, {}, run=run)
    magnitudes.note_value(0, box)
    magnitudes.partial[0] = magnitudes.value[0]
    return {0: box}, magnitudes


def step(engine: Engine, node: Node, bounds: dict[int, Interval], magnitudes: Magnitudes) -> None:
    """Interval bounds and magnitudes of one node from those of its inputs, added to ``bounds`` and ``magnitudes``.

    With rounding, an affine result is widened by its rounding error, so that the bounds hold in exact arithmetic.
    """
    graph, backend = engine.graph, engine.backend
    xs = [bounds[i] for i in node.inputs]
    op, dtype = node.op, xs[0].lower.dtype
    with backend.weights.fetch(op.handles, dtype) as p:
        if op.handles:
            backend.weights.prefetch(graph.later_handles[node.index])
        found = op.interval(xs, p)
        if isinstance(op, AffineOp):
            terms = op.forward_terms(graph.in_shapes(node), node.shape)
            # |W| m + |b|; the centre and radius form adds at most the same terms once more.
            sums = op.magnitude([magnitudes.value[i] for i in node.inputs], p) * ROUNDING_SAFETY
            magnitudes.note_partial(node.index, sums, node.inputs, backend)
            rate = op.run_rate(graph.in_shapes(node), node.shape) if magnitudes.run is not None else 0.0
            magnitudes.note_run(node.index, rate)
            if engine.rounding and terms:
                slack = (4 * gamma(terms + 4, dtype) + rate) * magnitudes.partial[node.index]
                found = widen(found.lower, found.upper, slack)
        elif magnitudes.run is not None:
            found = _noisy(node, op, magnitudes, xs, found)
    bounds[node.index] = found
    magnitudes.note_value(node.index, found)
    magnitudes.partial.setdefault(node.index, magnitudes.value[node.index])


def _noisy(node: Node, op: Op, magnitudes: Magnitudes, xs: Sequence[Interval], found: Interval) -> Interval:
    """The interval of a nonlinear node widened by the error of a run, which is noted in the magnitudes."""
    assert magnitudes.run is not None and isinstance(op, NonlinearOp)
    error = op.run_error(magnitudes.run, xs, found)
    if error is None:
        raise ValueError(f"nothing is known of float32 runs of {op.kind}")
    if not isinstance(error, Tensor):
        return found
    magnitudes.note_noise(node.index, error)
    return widen(found.lower, found.upper, magnitudes.noise[node.index])


def may_overflow(magnitudes: Magnitudes, backend: ParallelBackend) -> bool:
    """Whether float32's range may not suffice a run on some box; equal on all ranks.

    A value or a partial sum may leave it at its upper end, or the values that a node reads are so large that what its
    weights have lost at the lower end matters.
    """
    parts = [t.max() / LARGEST for t in magnitudes.partial.values()]
    parts += [magnitudes.fan[i].max() / MOST_READ for i in magnitudes.rates]
    worst = float(torch.stack(parts).max())  # NaN stays NaN
    return not backend.agree(worst if math.isfinite(worst) else math.inf, "max") <= 1.0


def replace(node: Node, tighter: Interval, bounds: dict[int, Interval], magnitudes: Magnitudes) -> None:
    """Intersect a node's bounds with other valid ones."""
    bounds[node.index] = bounds[node.index].intersect(tighter)
    magnitudes.note_value(node.index, bounds[node.index])
