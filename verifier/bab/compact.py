"""A ReLU network on one box as dense matrices between the neurons that the root left undecided.

On the box inactive neurons are zero and active ones are linear, so that what is left of the network is

    z_l = b_l + W_l s + sum over k < l of M_lk h_k,     h_k = relu(z_k),     x = centre + radius s,  |s| <= 1,

with columns for the unstable neurons alone. The active neurons of a layer are either folded into the matrices of the
layers above, or kept as columns of their own, whichever makes the products cheaper. Rows of the cases are linear
functions of the same columns.

The matrices are rounded and serve the float32 search; what it proves with them is certified on the network itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bab.splits import Group, SplitSpace
from verifier.bounds.crown import Specification
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.numerics import rounded_up
from verifier.graph import traverse
from verifier.graph.graph import Graph, Node
from verifier.graph.op import AffineOp, NonlinearOp, Pieces

_RELU = Pieces((0.0,), (0.0, 1.0))
# A column costs about as much as this many multiplications: some twenty elementwise passes per optimiser step.
_COLUMN_WORK = 250
# Numbers of the widest tensor while rows are walked.
_WALK_NUMBERS = 1 << 23
# More numbers in the matrices than this are not worth it.
_MOST_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Layer:
    """The columns of one pre-activation and the matrices around them.

    Attributes:
        columns: range of kernel columns.
        sources: range of columns whose outputs feed it, empty when only the input does.
        weight: (columns, sources).
        consumers: range of columns that read its outputs.
        back: (consumers, columns).
        reads_input: whether the input feeds it directly.
        in_rows: whether rows of the cases mention its outputs.
        kept: how many of its last columns are active neurons.
    """

    columns: slice
    sources: slice
    weight: Tensor
    consumers: slice
    back: Tensor
    reads_input: bool
    in_rows: bool
    kept: int


@dataclass(frozen=True)
class Compact:
    """The network of one box, float32.

    Attributes:
        layers: in topological order.
        places: (U,) kernel column of every split column.
        kept: (T,) bool, active neurons that are columns.
        bias: (T,).
        slope, intercept: (T,) of the upper chord at the root; 1 and 0 where ``kept``.
        entry: range of columns that the input feeds.
        input_weight: (entry, n), scaled by the radius, of the input coordinates with a width.
        centre, radius: (n_in,) of the box; ``free``: (n,) positions of those coordinates.
        rows: (N * S, T) coefficients of the cases' rows on the layers' outputs.
        row_input: (N * S, n) on s, or None when no row needs it.
        row_constant: (N * S,), threshold subtracted.
    """

    layers: tuple[Layer, ...]
    places: Tensor
    kept: Tensor
    bias: Tensor
    slope: Tensor
    intercept: Tensor
    entry: slice
    input_weight: Tensor
    centre: Tensor
    radius: Tensor
    free: Tensor
    rows: Tensor
    row_input: Tensor | None
    row_constant: Tensor

    @property
    def rows_span(self) -> slice:
        """The range of columns that rows of the cases mention."""
        read = [layer.columns for layer in self.layers if layer.in_rows]
        return slice(read[0].start, read[-1].stop) if read else slice(0, 0)

    @property
    def size(self) -> int:
        return int(self.bias.shape[0])

    @property
    def multiplications(self) -> int:
        """Of one pass, backward or forward, for one row."""
        return self.input_weight.numel() + sum(layer.weight.numel() for layer in self.layers)


@dataclass(frozen=True)
class _Cut:
    """What becomes of one ReLU node: ``columns`` (n,) flat positions that are columns; ``passed`` (size,) 1 where the
    neuron is folded, or None."""

    group: Group
    columns: Tensor
    passed: Tensor | None


def compact(
    graph: Graph,
    backend: ParallelBackend,
    box: Interval,
    space: SplitSpace,
    spec: Specification,
    thresholds: Tensor,
) -> Compact | None:
    """The compact network, or None when the graph is not made for it: other nonlinearities than ReLU, shared
    pre-activations, infinite bounds, weights on several ranks, or matrices that would be too large.

    Args:
        spec, thresholds: rows of the cases (N, S, ...) and (N, S).
    """
    if spec.x is not None or not space.size or backend.size > 1:
        return None
    cuts = _cuts(graph, space)
    if cuts is None or _numbers(graph, cuts) > _MOST_NUMBERS:
        return None
    return _Builder(graph, backend, box, cuts).build(space, spec, thresholds)


def size(graph: Graph, backend: ParallelBackend, space: SplitSpace) -> tuple[int, int] | None:
    """Columns of the compact network and numbers in its matrices, without building it; None when there is none."""
    cuts = _cuts(graph, space) if space.size and backend.size == 1 else None
    if cuts is None or _numbers(graph, cuts) > _MOST_NUMBERS:
        return None
    folded = frozenset(i for i, c in cuts.items() if c.passed is not None)
    counts = {i: (c.columns.numel(), 1) for i, c in cuts.items()}
    # Kept neurons are columns already; where none are folded there is nothing to read through.
    direct = {i: _direct_sources(graph, graph.nodes[i].inputs[0]) for i in counts}
    width, reach = _reach(graph, counts, direct, folded)
    for i in counts:
        width[i] = counts[i][0]
    return sum(width[i] for i in counts), sum(width[i] * sum(width[k] for k in reach[i]) for i in counts)


def _numbers(graph: Graph, cuts: Mapping[int, _Cut]) -> int:
    """Numbers in the matrices if every layer read the input and all layers below."""
    columns = sum(c.columns.numel() for c in cuts.values())
    return columns * (columns // 2 + graph.nodes[0].size)


def _cuts(graph: Graph, space: SplitSpace) -> dict[int, _Cut] | None:
    """How every ReLU node is cut, by node index."""
    groups = {g.value: g for g in space.groups}
    relus = [node for node, _ in traverse.nonlinear(graph.nodes)]
    if any(op.pieces != _RELU for _, op in traverse.nonlinear(graph.nodes)):
        return None
    values = [n.inputs[0] for n in relus]
    if len(set(values)) < len(values) or not all(
        bool(torch.isfinite(g.lower).all() and torch.isfinite(g.upper).all()) for g in space.groups
    ):
        return None
    nothing = torch.zeros(0, dtype=torch.int64, device=space.lower.device)
    none = torch.zeros(0, device=space.lower.device)
    active: dict[int, Tensor] = {}
    for node in relus:
        # Unstable neurons have a negative lower bound, and a zero lower bound means active.
        active[node.index] = (space.bounds[node.inputs[0]].lower.reshape(-1) >= 0).nonzero()[:, 0]
    owned = {n.index: groups.get(n.inputs[0]) or Group(n.inputs[0], n.index, nothing, 0, 0, none, none) for n in relus}
    folded = _folding(graph, {i: (g.elements.numel(), active[i].numel()) for i, g in owned.items()})
    cuts: dict[int, _Cut] = {}
    for node in relus:
        g, alive = owned[node.index], active[node.index]
        if node.index not in folded:
            cuts[node.index] = _Cut(g, torch.cat([g.elements, alive]), None)
            continue
        mask = torch.zeros(node.size, dtype=torch.float64, device=space.lower.device)
        mask[alive] = 1.0
        cuts[node.index] = _Cut(g, g.elements, mask if alive.numel() else None)
    return cuts


def _folding(graph: Graph, counts: Mapping[int, tuple[int, int]]) -> frozenset[int]:
    """ReLU nodes whose active neurons are folded: a choice that no single change makes cheaper.

    Args:
        counts: node index to the numbers of unstable and of active neurons.
    """
    direct = {i: _direct_sources(graph, graph.nodes[i].inputs[0]) for i in counts}
    last = _direct_sources(graph, graph.output)

    def work(folded: frozenset[int]) -> float:
        width, reach = _reach(graph, counts, direct, folded)
        total = sum(width[i] * (_COLUMN_WORK + sum(width[k] for k in reach[i])) for i in counts)
        return total + sum(width[k] for k in _seen(last, reach, counts, folded))

    best = frozenset(counts)
    for start in (best, frozenset()):
        choice, cost = start, work(start)
        improved = True
        while improved:
            improved = False
            for i in counts:
                other = choice ^ {i}
                if (w := work(other)) < cost:
                    choice, cost, improved = other, w, True
        if cost < work(best):
            best = choice
    return best


def _reach(
    graph: Graph,
    counts: Mapping[int, tuple[int, int]],
    direct: Mapping[int, frozenset[int]],
    folded: frozenset[int],
) -> tuple[dict[int, int], dict[int, frozenset[int]]]:
    """Columns of every ReLU node (the input counts as node 0), and the nodes whose columns its matrices read."""
    width, reach = {0: graph.nodes[0].size}, {}
    for i, (unstable, active) in sorted(counts.items()):
        reach[i] = _seen(direct[i], reach, counts, folded)
        width[i] = unstable if i in folded else unstable + active
    return width, reach


def _seen(
    sources: frozenset[int],
    reach: Mapping[int, frozenset[int]],
    counts: Mapping[int, tuple[int, int]],
    folded: frozenset[int],
) -> frozenset[int]:
    """Sources, and what folded neurons among them read."""
    return sources.union(*(reach[i] for i in sources if i in folded and counts[i][1]))


def _direct_sources(graph: Graph, index: int) -> frozenset[int]:
    """ReLU nodes, or the input, that a node reads through affine ops alone."""

    def ends(node: Node) -> bool:
        return node.index == 0 or isinstance(node.op, NonlinearOp)

    return frozenset(i for i in traverse.upstream(graph.nodes, [index], ends) if ends(graph.nodes[i]))


class _Builder:
    """Walks rows of every layer back to the columns below it, in float64."""

    def __init__(self, graph: Graph, backend: ParallelBackend, box: Interval, cuts: Mapping[int, _Cut]) -> None:
        self.graph, self.backend, self.cuts = graph, backend, cuts
        low, up = box.lower.double().reshape(-1), box.upper.double().reshape(-1)
        self.centre, self.radius = (low + up) / 2, (up - low) / 2
        self.free = (self.radius > 0).nonzero()[:, 0]
        self.order = [i for i in sorted(cuts) if cuts[i].columns.numel()]
        self.columns: dict[int, slice] = {}
        stop = 0
        for i in self.order:
            start, stop = stop, stop + cuts[i].columns.numel()
            self.columns[i] = slice(start, stop)
        self.total = stop

    def build(self, space: SplitSpace, spec: Specification, thresholds: Tensor) -> Compact:
        device = self.backend.device
        matrix = torch.zeros((self.total, self.total), device=device)
        entry = torch.zeros((self.total, self.free.numel()), device=device)
        bias = torch.zeros(self.total, device=device)
        sources: dict[int, list[int]] = {}
        for i in self.order:
            cut, place = self.cuts[i], self.columns[i]
            node = self.graph.nodes[cut.group.value]
            step = max(1, _WALK_NUMBERS // max(n.size for n in self.graph.nodes))
            for first in range(0, cut.columns.numel(), step):
                part = cut.columns[first : first + step]
                start = torch.zeros((part.numel(), node.size), dtype=torch.float64, device=device)
                start[torch.arange(part.numel(), device=device), part] = 1.0
                found, direct, constant = self._walk(node.index, start)
                at = slice(place.start + first, place.start + first + part.numel())
                for k, a in found.items():
                    matrix[at, self.columns[k]] = a.float()
                entry[at], bias[at] = direct.float(), constant.float()
                sources[i] = sorted(found)
        rows, row_input, row_constant, read = self._rows(spec, thresholds)
        return self._assemble(space, matrix, entry, bias, sources, (rows, row_input, row_constant), read)

    def _rows(self, spec: Specification, thresholds: Tensor) -> tuple[Tensor, Tensor | None, Tensor, set[int]]:
        n, s = thresholds.shape
        start = spec.y.expand(n, s, *spec.y.shape[2:]).reshape(n * s, -1)
        found, direct, constant = self._walk(self.graph.output, start)
        rows = torch.zeros((n * s, self.total), device=self.backend.device)
        for k, a in found.items():
            rows[:, self.columns[k]] = a.float()
        row_input = direct.float() if bool((direct != 0).any()) else None
        return rows, row_input, -rounded_up(thresholds.reshape(-1) - constant, torch.float32), set(found)

    def _walk(self, index: int, start: Tensor) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """Rows (R, size) over one node as functions of the columns below.

        Returns:
            ReLU node index to (R, columns), coefficients (R, n) on s, constants (R,).
        """
        graph = self.graph
        pending = traverse.Backward(graph.nodes, {index: start.reshape(-1, *graph.nodes[index].shape)})
        found: dict[int, Tensor] = {}
        constant = start.new_zeros(start.shape[0])
        for node, a in pending:
            if isinstance(node.op, AffineOp):
                shapes = graph.in_shapes(node)
                with self.backend.weights.fetch(node.op.handles, torch.float64) as p:
                    parts = node.op.transpose(a, p, shapes)
                    dot = node.op.bias_dot(a, p)
                if dot is not None:
                    constant = constant + dot
                for i, part in zip(node.inputs, parts, strict=True):
                    pending.push(i, part.reshape(-1, *graph.nodes[i].shape), torch.add)
                continue
            cut, flat = self.cuts[node.index], a.flatten(1)
            if cut.columns.numel():
                found[node.index] = flat[:, cut.columns]
            if cut.passed is not None:
                pending.push(node.inputs[0], (flat * cut.passed).reshape(a.shape), torch.add)
        at_input = pending.at_input()
        if at_input is None:
            at_input = start.new_zeros((start.shape[0], self.centre.numel()))
        flat = at_input.flatten(1)
        return found, (flat * self.radius)[:, self.free], constant + flat @ self.centre

    def _assemble(
        self,
        space: SplitSpace,
        matrix: Tensor,
        entry: Tensor,
        bias: Tensor,
        sources: Mapping[int, Sequence[int]],
        rows: tuple[Tensor, Tensor | None, Tensor],
        read: set[int],
    ) -> Compact:
        layers: list[Layer] = []
        fed = [i for i in self.order if bool((entry[self.columns[i]] != 0).any())]
        places = torch.zeros(space.size, dtype=torch.int64, device=bias.device)
        active = torch.ones(self.total, dtype=torch.bool, device=bias.device)
        slope, intercept = torch.ones_like(bias), torch.zeros_like(bias)
        for i in self.order:
            at, g = self.columns[i], self.cuts[i].group
            source = self._span(sources[i])
            consumer = self._span([k for k in self.order if i in sources[k]])
            weight = matrix[at, source].contiguous()
            kept = at.stop - at.start - g.elements.numel()
            layers.append(
                Layer(at, source, weight, consumer, matrix[consumer, at].contiguous(), i in fed, i in read, kept)
            )
            split = slice(at.start, at.start + g.elements.numel())
            places[g.start : g.stop] = torch.arange(split.start, split.stop, device=bias.device)
            active[split] = False
            slope[split] = g.upper / (g.upper - g.lower)
            intercept[split] = -g.lower * slope[split]
        span = self._span(fed)
        return Compact(
            tuple(layers),
            places,
            active,
            bias,
            slope,
            intercept,
            span,
            entry[span].contiguous(),
            self.centre.float(),
            self.radius.float(),
            self.free,
            *rows,
        )

    def _span(self, nodes: Sequence[int]) -> slice:
        """The range of columns from the first to the last of some nodes."""
        if not nodes:
            return slice(0, 0)
        return slice(min(self.columns[i].start for i in nodes), max(self.columns[i].stop for i in nodes))
