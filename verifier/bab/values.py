"""The space of value splits: which elements of which nodes can be split, and what a domain's clamps mean for bounds.

A domain holds two float32 numbers per column, between which the value of that element lies on the domain. Both children
of a split hold the same float32 number, one as its upper and one as its lower clamp, so that they cover their parent
whatever real number the value is: the exact one, or that of a float32 run, for which the root's bounds hold as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bounds import ibp
from verifier.bounds.clamped import Columns
from verifier.bounds.crown import BoundState
from verifier.bounds.engine import PLAIN, Engine
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import outward
from verifier.graph import traverse
from verifier.graph.graph import Graph
from verifier.graph.op import Cuts

# Relative to its magnitude and the root's width, a clamp is not split when it is narrower.
_NARROWEST = 1e-5


@dataclass(frozen=True)
class Reader:
    """A nonlinear node that reads the values of some columns."""

    node: int
    place: int


@dataclass(frozen=True)
class Group:
    """The columns of one node.

    Attributes:
        columns: where they are.
        readers: nodes whose planes gain from splits, the columns' owner among them.
        points: that are worth a try, from all readers.
        anywhere: whether every point is.
    """

    columns: Columns
    readers: tuple[Reader, ...]
    points: tuple[float, ...]
    anywhere: bool


@dataclass(frozen=True)
class ValueSpace:
    """All columns of a box. U columns.

    Attributes:
        lower, upper: float32 (U,), the root's bounds.
        anywhere: bool (U,), whether a column may be split at any point.
        points: float32 (U, m), points that are worth a try; NaN where there are fewer.
        multiplied: bool (U,), whether multipliers can add to what the clamps say; not for the input, whose box is cut.
        bounds: root bounds of every node, (1, *shape).
    """

    groups: tuple[Group, ...]
    lower: Tensor
    upper: Tensor
    anywhere: Tensor
    points: Tensor
    multiplied: Tensor
    bounds: Mapping[int, Interval]

    @property
    def size(self) -> int:
        return int(self.lower.shape[0])

    @property
    def columns(self) -> tuple[Columns, ...]:
        return tuple(g.columns for g in self.groups)

    def splittable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """bool (B, U): columns of domains with clamps (B, U) that have a point inside to be split at."""
        size = torch.maximum(lower.abs(), upper.abs()) + (self.upper - self.lower)
        wide = self.anywhere & (upper - lower > _NARROWEST * size)
        kinks = ((self.points > lower[..., None]) & (self.points < upper[..., None])).any(-1)
        return wide | (~self.anywhere & kinks)

    def domain_bounds(self, engine: Engine, state: BoundState, lower: Tensor, upper: Tensor) -> dict[int, Interval]:
        """Bounds of every node on domains with clamps (B, U), float32 (B or 1, *shape): the root's, clamped, and what
        follows from the clamps by interval arithmetic across ops without parameters.

        They are certified where the root's are. Where a domain has no point, a lower bound may lie above the upper one.
        """
        graph, out = engine.graph, dict(self.bounds)
        by_value = {g.columns.value: g.columns for g in self.groups}
        inner = engine.certifying() if state.certified else engine.using(PLAIN)
        magnitudes = state.magnitudes.copy()
        changed: set[int] = set()
        if 0 in by_value:
            out[0] = _clamped(out[0], by_value[0], lower, upper)
            changed.add(0)
        for node in traverse.forward(graph.nodes, last=graph.output):
            if (not node.op.handles or node.op.elementwise) and changed.intersection(node.inputs):
                wide = {i: _batched(out[i].to(inner.dtype), lower.shape[0]) for i in node.inputs}
                for i in node.inputs:
                    magnitudes.note_value(i, wide[i])
                ibp.step(inner, node, wide, magnitudes)
                out[node.index] = out[node.index].intersect(outward(wide[node.index]))
                changed.add(node.index)
            if node.index in by_value:
                out[node.index] = _clamped(out[node.index], by_value[node.index], lower, upper)
                changed.add(node.index)
        return out


def _batched(bounds: Interval, count: int) -> Interval:
    """For so many domains."""
    return Interval(*(end.expand(count, *end.shape[1:]) for end in bounds))


def _clamped(known: Interval, columns: Columns, lower: Tensor, upper: Tensor) -> Interval:
    """Bounds (B, *shape) intersected with the clamps of some elements."""
    some = slice(columns.start, columns.stop)
    ends = []
    for end, clamp, tighter in ((known.lower, lower, torch.maximum), (known.upper, upper, torch.minimum)):
        flat = end.flatten(1).expand(lower.shape[0], -1).clone()
        flat[:, columns.elements] = tighter(flat[:, columns.elements], clamp[:, some])
        ends.append(flat.reshape(-1, *columns.shape))
    return Interval(*ends)


def empty(bounds: Mapping[int, Interval], count: int) -> Tensor:
    """(count,) bool: domains on which some node has no value, so that they have no point."""
    device = bounds[0].lower.device
    out = torch.zeros(count, dtype=torch.bool, device=device)
    for b in bounds.values():
        if b.lower.shape[0] == count:
            out = out | (b.lower > b.upper).flatten(1).any(1)
    return out


def applies(graph: Graph, backend: ParallelBackend) -> bool:
    """Whether values are split at all: a network with some op that splits of ReLUs leave as it is, on one rank."""
    nodes = [op for _, op in traverse.nonlinear(graph.nodes)]
    return backend.size == 1 and any(op.cuts is not None and not op.splits_at_zero for op in nodes)


def value_space(graph: Graph, bounds: Mapping[int, Interval]) -> ValueSpace:
    """Columns of everything that ops which gain from splits read and that the root's bounds (1, *shape) leave open."""
    needed = traverse.upstream(graph.nodes, [graph.output])
    readers: dict[int, list[tuple[Reader, Cuts]]] = {}
    for node, op in traverse.nonlinear(graph.nodes, last=graph.output):
        if node.index in needed and op.cuts is not None:
            for place, value in enumerate(node.inputs):
                readers.setdefault(value, []).append((Reader(node.index, place), op.cuts))
    groups: list[Group] = []
    lows, ups, start = [], [], 0
    for value, found in sorted(readers.items()):
        points = tuple(sorted({float(p) for _, cuts in found for p in cuts.points if _exact(p)}))
        anywhere = any(cuts.anywhere for _, cuts in found)
        low, up = (end.flatten() for end in bounds[value])
        open_ = torch.isfinite(low) & torch.isfinite(up) & (up > low)
        if not anywhere:
            kinks = torch.zeros_like(open_)
            for p in points:
                kinks |= (low < p) & (up > p)
            open_ &= kinks
        elements = open_.nonzero()[:, 0]
        if not elements.numel():
            continue
        stop, owner = start + int(elements.numel()), found[0][0]
        columns = Columns(value, graph.nodes[value].shape, elements, start, stop, owner.node, owner.place)
        groups.append(Group(columns, tuple(reader for reader, _ in found), points, anywhere))
        lows.append(low[elements])
        ups.append(up[elements])
        start = stop
    return _space(groups, lows, ups, bounds)


def _exact(point: float) -> bool:
    """Whether a point is a float32 number, as all split points are."""
    return math.isfinite(point) and float(torch.tensor(point, dtype=torch.float32)) == point


def _space(groups: list[Group], lows: list[Tensor], ups: list[Tensor], bounds: Mapping[int, Interval]) -> ValueSpace:
    device = bounds[0].lower.device
    none = torch.zeros(0, device=device)
    most = max((len(g.points) for g in groups), default=0)
    sizes = [g.columns.stop - g.columns.start for g in groups]
    anywhere = [torch.full((n,), g.anywhere, device=device) for n, g in zip(sizes, groups, strict=True)]
    multiplied = [torch.full((n,), g.columns.value != 0, device=device) for n, g in zip(sizes, groups, strict=True)]
    points = [
        torch.tensor([*g.points, *[math.nan] * (most - len(g.points))], device=device).reshape(1, most).expand(n, most)
        for n, g in zip(sizes, groups, strict=True)
    ]
    return ValueSpace(
        tuple(groups),
        torch.cat([none, *lows]),
        torch.cat([none, *ups]),
        torch.cat([none.bool(), *anywhere]),
        torch.cat([torch.zeros((0, most), device=device), *points]),
        torch.cat([none.bool(), *multiplied]),
        bounds,
    )
