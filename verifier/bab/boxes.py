"""Bounds of many input boxes at once, and how boxes are halved.

Everything of a box is computed in one sweep over the network: interval arithmetic node by node, CROWN rows where a
relaxation would otherwise be loose, then the specification rows. The arithmetic is chosen by the caller: float32 or
float64, with or without every rounding error accounted for. Such a result is valid in exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from verifier.bab.domains import BoxDomains
from verifier.bab.forward import Forward
from verifier.bounds import ibp
from verifier.bounds.crown import (
    Specification,
    exact_by_ibp,
    hidden_rows,
    open_elements,
    preactivations,
    row_cost,
    undecided,
)
from verifier.bounds.engine import Engine
from verifier.bounds.walk import Magnitudes, Walk, backward, concretise
from verifier.core.arithmetic import full_precision
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, finite_lower, float32_proofs, outward, underflow
from verifier.graph.graph import Graph
from verifier.graph.op import AffineOp, NonlinearOp, Op, Relaxation

# Magnitudes are positive sums computed in the same arithmetic: their relative error must stay below the safety factor.
_FLOAT32_WIDTH = 1024


Hidden = Literal["interval", "linear", "crown"]


def float32_suffices(graph: Graph) -> bool:
    """Whether float32 has useful error bounds: plain inner products of moderate length and piecewise linear
    relaxations, in full precision.

    Convolutions may run as Winograd or FFT kernels in float32, which have no inner-product error bound.
    """
    plain = float32_proofs() and full_precision()
    return plain and all(
        node.size <= _FLOAT32_WIDTH and (node.index == 0 or _float32_suffices(node.op)) for node in graph.whole.nodes
    )


def _float32_suffices(op: Op) -> bool:
    """Whether float32 is exact enough: curves are evaluated with errors that would cost more than float64 does."""
    return op.plain_sums if isinstance(op, AffineOp) else isinstance(op, NonlinearOp) and op.pieces is not None


@dataclass(frozen=True)
class Bounded:
    """Specification rows of a batch of boxes.

    Attributes:
        lower: (B, S), NaN turned into -inf.
        walk: the rows as linear functions of the whole input, valid on the boxes.
        bounds: of every node, (B, *shape), in the arithmetic's dtype.
        elements: (n,) flat positions that had rows of their own, by node.
    """

    lower: Tensor
    walk: Walk
    bounds: dict[int, Interval]
    elements: dict[int, Tensor] = field(default_factory=dict)


def bound_boxes(
    engine: Engine,
    box: Interval,
    spec: Specification,
    hidden: Hidden = "crown",
    varying: Tensor | None = None,
    elements: Mapping[int, Tensor] | None = None,
    alone: bool = False,
) -> Bounded:
    """Lower bounds of specification rows on boxes, in the engine's arithmetic.

    Where ``elements`` are given the host reads no value, and shapes depend on those of the arguments alone, unless an
    op of the network looks at values.

    Args:
        box: float32 (B, *input_shape), this rank's part.
        hidden: how pre-activations are bounded besides interval arithmetic: not at all, by a linear sweep forward, or
            by CROWN rows where that matters.
        varying: (k,) coordinates in which the linear sweep is linear; default all.
        elements: by node, (n,) flat positions of the hidden rows; default those that are undecided on some box.
        alone: a box has the bounds that it would have by itself: hidden rows count where it leaves elements undecided.
    """
    graph, backend, dtype = engine.graph, engine.backend, engine.dtype
    box = box.to(dtype)
    bounds, magnitudes = ibp.start(box, engine.arithmetic.run)
    batch = box.lower.shape[0]
    wanted = set(preactivations(graph)) if hidden == "crown" else set()
    last = max(preactivations(graph), default=0)
    sweep = None
    if hidden == "linear":
        everything = torch.arange(graph.whole.nodes[0].size, device=backend.device)
        whole = Interval(*backend.gather_features(0, torch.stack(box)))
        sweep = Forward(engine, whole, everything if varying is None else varying, magnitudes)
    planes: dict[int, Relaxation] = {}
    used: dict[int, Tensor] = {}
    for node in graph.nodes[1:]:
        if backend.size == 1:  # ranks that work together ask equally often
            engine.deadline.check("branch and bound")
        ibp.step(engine, node, bounds, magnitudes)
        if isinstance(node.op, NonlinearOp):
            planes[node.index] = node.op.relax([bounds[i] for i in node.inputs])
        if sweep is not None and node.index <= last:
            ibp.replace(node, sweep.step(node, bounds), bounds, magnitudes)
        if node.index in wanted and not exact_by_ibp(graph, node):
            wide = bounds[node.index]
            some = open_elements(engine, node.index, wide) if elements is None else elements.get(node.index)
            if some is None:
                continue
            used[node.index] = some
            positions, here = backend.local_index(node.index, some)
            rows = 2 * some.shape[0]
            parts = []
            for chunk in backend.row_chunks(rows, row_cost(graph, batch, dtype, node.index)):
                engine.deadline.check("branch and bound")
                form = hidden_rows(positions, node.shape, chunk, dtype, here)
                walk = backward(engine, {node.index: form}, planes, magnitudes)
                value = finite_lower(concretise(engine, walk, box))
                parts.append((chunk, value.expand(batch, -1)))
            if parts:
                value = backend.gather_rows(rows, parts)
                if alone:
                    open_here = undecided(graph, node.index, wide).flatten(1)[:, positions].repeat(1, 2)
                    value = torch.where(open_here, value, -torch.inf)
                found = _scatter(bounds[node.index], positions, value, here)
                ibp.replace(node, found, bounds, magnitudes)
    walk = backward(engine.unhurried(), spec.forms(backend, graph.output, dtype), planes, magnitudes)
    if engine.rounding:
        walk.rounding_error = walk.rounding_error + _rounded_rows(engine, spec, magnitudes)
    lower = finite_lower(concretise(engine, walk, box)).expand(batch, -1)
    return Bounded(lower, replace(walk, a=backend.gather_features(0, walk.a)), bounds, used)


def _rounded_rows(engine: Engine, spec: Specification, magnitudes: Magnitudes) -> Tensor:
    """(B or 1, S): what rows lose when their float64 coefficients are rounded to the engine's dtype.

    The walk starts from the rounded row and accounts for what comes after that.
    """
    graph, backend, dtype = engine.graph, engine.backend, engine.dtype
    cost = torch.zeros((1, spec.y.shape[1]), dtype=torch.float64, device=backend.device)
    for index, rows in ((graph.output, spec.y), (0, spec.x)):
        if rows is not None and dtype != torch.float64:
            # Exact: the difference of a float64 number and the nearest float32 one is a float64 number.
            lost = (rows - rows.to(dtype).double()).abs()
            size = magnitudes.value[index].double().flatten(1)[:, :, None]
            part = backend.coefficients(index, lost).flatten(2)
            cost = cost + backend.total(torch.matmul(part, size).squeeze(-1)) + underflow(dtype)
    return cost.to(dtype) * ROUNDING_SAFETY


def _scatter(like: Interval, elements: Tensor, lower: Tensor, here: Tensor | None) -> Interval:
    """An interval that knows only some elements (those that are ``here``): (B, 2n) bounds of +e, then of -e.

    Rows that were summed in float64 are rounded outward.
    """
    n = elements.shape[0]
    inf = torch.full_like(like.lower, float("inf")).flatten(1)
    low, up = -inf, inf
    found = outward(Interval(lower[:, :n], -lower[:, n:]), low.dtype)
    least, most = found.lower, found.upper
    if here is not None:
        elements, least, most = elements[here], least[:, here], most[:, here]
    low[:, elements], up[:, elements] = least, most
    return Interval(low.reshape(like.lower.shape), up.reshape(like.lower.shape))


def halve(domains: BoxDomains, dim: Tensor) -> BoxDomains:
    """Both halves of every domain along one coordinate each; they share the midpoint, so nothing is lost.

    Args:
        dim: (B,) coordinate to cut; it must be cuttable (see :func:`midpoints`).

    Returns:
        2 B domains, lower halves first.
    """
    at = torch.arange(domains.count, device=dim.device)
    middle = midpoints(domains.box)[at, dim]
    low, up = domains.lower.clone(), domains.upper.clone()
    low[at, dim], up[at, dim] = middle, middle
    depth = domains.depth + 1
    left = replace(domains, upper=up, depth=depth)
    right = replace(domains, lower=low, depth=depth)
    return BoxDomains.cat([left, right])


def midpoints(box: Interval) -> Tensor:
    """Float32 midpoints; a coordinate without a float between its bounds has one of the bounds instead."""
    return (box.lower / 2 + box.upper / 2).clamp(box.lower, box.upper)


def cuttable(box: Interval) -> Tensor:
    """(D, k) bool: whether there is a float strictly between the bounds to cut at."""
    middle = midpoints(box)
    return (middle > box.lower) & (middle < box.upper)
