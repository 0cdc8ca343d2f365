"""Exact tensor parallelism: every value is cut along one dim into a block per rank, and so are the weights behind it.

``cut_graph`` turns a network into the graph that one rank works on: node shapes are those of the rank's blocks and ops
work on blocks, so the bounds engine runs on it as on any graph. Elementwise ops and ops along other dims need nothing
else. A Linear or a convolution holds the parameters of its own outputs only: it reads gathered inputs, and its
transpose gives partial sums of full width that are exchanged and added in the order of the ranks, so that no bound is
replaced by a looser one. Every other affine op is evaluated whole, with all of its (small) parameters.

Blocks are equal; the last ones may reach beyond the value. What lies there repeats the value's last entry, so that it
is always as sane as a real one, and has zero coefficients, so that it never matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.core.backend import Chunk, Cost, Group
from verifier.core.errors import UnsupportedError
from verifier.core.handles import Handle, WeightStore
from verifier.core.interval import Interval
from verifier.graph.graph import Graph, Node
from verifier.graph.linear_forms import Dense, Form, OneHot, dense
from verifier.graph.op import AffineOp, Crossing, Op, Params, Shape
from verifier.parallel.distributed import AGREEMENTS, DistributedBackend
from verifier.parallel.group import Solo
from verifier.parallel.stores import Resident

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """How a value is cut: along ``dim``, into blocks of ``block`` entries. Tensors are (*lead, *shape).

    Attributes:
        shape: the whole value's.
        dim: 0 for a value without dims, which counts as one entry.
        ranks: number of blocks.
    """

    shape: Shape
    dim: int
    ranks: int

    @property
    def size(self) -> int:
        """Entries along the dim."""
        return self.shape[self.dim] if self.shape else 1

    @property
    def block(self) -> int:
        return -(-self.size // self.ranks)

    @property
    def part(self) -> Shape:
        """The shape of a block."""
        return (*self.shape[: self.dim], self.block, *self.shape[self.dim + 1 :]) if self.shape else ()

    def span(self, rank: int) -> tuple[int, int]:
        """First entry of a rank's block and how many it has of the value's own."""
        start = min(rank * self.block, self.size)
        return start, min(self.block, self.size - start)

    def take(self, value: Tensor, rank: int, repeat: bool) -> Tensor:
        """The block of a rank; beyond the value its last entry again, or zero."""
        flat = self._flat(value)
        start, count = self.span(rank)
        block = flat.narrow(-2, start, count)
        missing = self.block - count
        if missing:
            edge = flat.narrow(-2, self.size - 1, 1) if repeat else torch.zeros_like(flat.narrow(-2, 0, 1))
            block = torch.cat([block, edge.expand(*edge.shape[:-2], missing, edge.shape[-1])], -2)
        return block.reshape((*self._lead(value), *self.part))

    def embed(self, block: Tensor, rank: int) -> Tensor:
        """A value that is zero outside a rank's block."""
        lead = block.shape[: block.dim() - len(self.part)]
        start, count = self.span(rank)
        flat = block.reshape((*lead, self._before, self.block, self._after)).narrow(-2, 0, count)
        return F.pad(flat, (0, 0, start, self.size - start - count)).reshape((*lead, *self.shape))

    def join(self, blocks: Tensor) -> Tensor:
        """All blocks, (ranks, *lead, *part), to the value."""
        lead = blocks.shape[1 : blocks.dim() - len(self.part)]
        flat = blocks.reshape((self.ranks, *lead, self._before, self.block, self._after)).movedim(0, -3)
        flat = flat.reshape((*lead, self._before, self.ranks * self.block, self._after))
        return flat.narrow(-2, 0, self.size).reshape((*lead, *self.shape))

    def blocks(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`join`: (ranks, *lead, *part), contiguous, zero beyond the value."""
        flat, missing = self._flat(value), self.ranks * self.block - self.size
        if missing:
            flat = F.pad(flat, (0, 0, 0, missing))
        flat = flat.reshape((*flat.shape[:-2], self.ranks, self.block, self._after)).movedim(-3, 0)
        return flat.reshape((self.ranks, *self._lead(value), *self.part)).contiguous()

    def place(self, elements: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Flat positions in the value to those in a rank's block, and whether they are in it (if not: position 0)."""
        after, entry = elements % self._after, elements // self._after
        before, entry = entry // self.size, entry % self.size
        mine = entry // self.block == rank
        position = (before * self.block + entry - rank * self.block) * self._after + after
        return torch.where(mine, position, 0), mine

    @property
    def _before(self) -> int:
        return math.prod(self.shape[: self.dim])

    @property
    def _after(self) -> int:
        return math.prod(self.shape[self.dim + 1 :])

    def _lead(self, value: Tensor) -> torch.Size:
        return value.shape[: value.dim() - len(self.shape)]

    def _flat(self, value: Tensor) -> Tensor:
        return value.reshape((*self._lead(value), self._before, self.size, self._after))


def _natural(shape: Shape, ranks: int) -> Layout:
    """Cut along the first dim that has more than one entry, for want of a better one the last."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    return Layout(shape, wide[0] if wide else max(0, len(shape) - 1), ranks)


# ------------------------------------------------------------------------------------------------------------ exchange


def _ordered_sum(terms: Tensor) -> Tensor:
    """(P, *shape) summed over the ranks, in their order: the same bits everywhere and every time."""
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    return total


def _gathered(group: Group, layout: Layout, block: Tensor) -> Tensor:
    """The value from every rank's block, (*lead, *part); all ranks get equal bits."""
    return layout.join(group.all_gather(block.contiguous()))


@dataclass(frozen=True)
class Exchanged(AffineOp):
    """An affine op that reads whole inputs and gives this rank's block of the output.

    Attributes:
        op: what computes; with ``own`` its outputs are the block, and its parameters those of the block; otherwise it
            is the op of the whole network.
    """

    op: AffineOp
    group: Group = field(compare=False, repr=False)
    inputs: tuple[Layout, ...]
    output: Layout
    own: bool

    @property
    def handles(self) -> tuple[Handle, ...]:
        return self.op.handles

    @property
    def kind(self) -> str:
        return self.op.kind

    @property
    def streamable(self) -> tuple[Handle, ...]:
        return self.op.streamable

    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._mine(self.op.forward(self._gathered(xs), p))

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        return self._mine(self.op.linear(self._gathered(xs), p))

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        return self._mine(self.op.spread(self._gathered(rs), p))

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        return self._mine(self.op.magnitude(self._gathered(ms), p))

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        both = self._gathered([torch.stack((x.lower, x.upper)) for x in xs])
        found = self.op.interval([Interval(x[0], x[1]) for x in both], p)
        return Interval(self._mine(found.lower), self._mine(found.upper))

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """Own outputs: partial sums over them, exchanged and added. The whole op: on gathered coefficients."""
        shapes = [layout.shape for layout in self.inputs]
        if not self.own:
            parts = self.op.transpose(_gathered(self.group, self.output, a), p, shapes)
            return tuple(
                layout.take(part, self.group.rank, repeat=False)
                for layout, part in zip(self.inputs, parts, strict=True)
            )
        return self._assembled(list(self.op.transpose(a, p, shapes)))

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """Single elements of own outputs, other ranks adding zeros."""
        if not self.own or not isinstance(form, OneHot):
            return None
        crossing = self.op.window_backward(form, p, [layout.shape for layout in self.inputs], total)
        if crossing is None:
            return None
        parts = self._assembled([dense(part)[0] for part in crossing.parts])
        return crossing._replace(parts=[Dense(part[None]) for part in parts])

    def _assembled(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """The sum of what the transposes of all ranks' own outputs give, one (N, *whole shape_i) per input; the list is
        emptied."""
        out = []
        for layout in self.inputs:
            # Popped, so that no more than two tensors of full width are alive.
            received = self.group.all_to_all(layout.blocks(parts.pop(0)))
            out.append(_ordered_sum(received))
        return tuple(out)

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        return self.op.bias_dot(a if self.own else self.output.embed(a, self.group.rank), p)

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        return self.op.forward_terms([layout.shape for layout in self.inputs], self._out_shape)

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        """A sum over own outputs, and with it the sum over the ranks: no term passes through more roundings."""
        terms = self.op.backward_terms([layout.shape for layout in self.inputs], self._out_shape)
        return terms + self.group.size if self.own else terms

    @property
    def _out_shape(self) -> Shape:
        return self.output.part if self.own else self.output.shape

    def _gathered(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [_gathered(self.group, layout, x) for x, layout in zip(xs, self.inputs, strict=True)]

    def _mine(self, y: Tensor) -> Tensor:
        return y if self.own else self.output.take(y, self.group.rank, repeat=True)


# --------------------------------------------------------------------------------------------------------------- graph


@dataclass(frozen=True)
class _Cut:
    """Where this rank's parameter comes from, and how it is cut; None: not at all."""

    source: Handle
    layout: Layout | None


@dataclass(frozen=True)
class CutGraph(Graph):
    """One rank's part of a network; indices and names are the network's. It has no parameters: see :meth:`blocks`.

    Attributes:
        group: the ranks that hold the other parts.
        layouts: by node index.
        cuts: where this rank's parameters come from.
        network: the network, without its parameters.
    """

    group: Group = field(kw_only=True, compare=False, repr=False)
    layouts: tuple[Layout, ...] = field(kw_only=True)
    cuts: Mapping[Handle, _Cut] = field(kw_only=True, repr=False)
    network: Graph = field(kw_only=True)

    def blocks(self, source: Handle, tensor: Tensor) -> Iterator[tuple[Handle, Tensor]]:
        """This rank's parameters that come from one of the network's, cut where the whole tensor is: on the host."""
        for handle, cut in self.cuts.items():
            if cut.source == source:
                # A copy of its own, since a view would keep the whole alive.
                block = None if cut.layout is None else cut.layout.take(tensor, self.group.rank, repeat=True).clone()
                yield handle, tensor if block is None else block

    @cached_property
    def whole(self) -> Graph:
        return _Network(self.network.nodes, self.network.output, cut=self)


@dataclass(frozen=True)
class _Network(Graph):
    """The network as its users see it, evaluated by all ranks together on their parts."""

    cut: CutGraph = field(kw_only=True)

    def forward(self, x: Tensor, store: WeightStore, keep: Sequence[int] | None = None) -> Tensor | dict[int, Tensor]:
        """See :meth:`Graph.forward`; points, equal on all ranks, and values are whole. There are no gradients."""
        cut = self.cut
        with torch.no_grad():
            out = cut.forward(cut.layouts[0].take(x, cut.group.rank, repeat=True), store, keep)
            if isinstance(out, Tensor):
                return _gathered(cut.group, cut.layouts[cut.output], out)
            return {i: _gathered(cut.group, cut.layouts[i], v) for i, v in sorted(out.items())}


def cut_graph(graph: Graph, group: Group) -> CutGraph:
    """The part of a network that one rank of the group works on.

    Raises:
        UnsupportedError: a nonlinear op mixes elements of different ranks.
    """
    ranks = group.size
    layouts = [_natural(graph.nodes[0].shape, ranks)]
    nodes = [replace(graph.nodes[0], shape=layouts[0].part)]
    cuts: dict[Handle, _Cut] = {}
    for node in graph.nodes[1:]:
        op, layout = _cut_node(graph, node, layouts, group, cuts)
        layouts.append(layout)
        nodes.append(replace(node, op=op, shape=layout.part))
    network = Graph(graph.nodes, graph.output)
    return CutGraph(tuple(nodes), graph.output, group=group, layouts=tuple(layouts), cuts=cuts, network=network)


def _cut_node(
    graph: Graph, node: Node, layouts: Sequence[Layout], group: Group, cuts: dict[Handle, _Cut]
) -> tuple[Op, Layout]:
    inputs = tuple(layouts[i] for i in node.inputs)
    split = node.op.split([x.dim for x in inputs], graph.in_shapes(node), node.shape, group.size)
    if split is None:
        if not isinstance(node.op, AffineOp):
            raise UnsupportedError(
                f"{node.op.kind} '{node.name}' mixes elements that tensor parallelism keeps on different ranks; use "
                "parallel.backend fsdp or single"
            )
        output = _natural(node.shape, group.size)
        op, own = _with_cuts(node.op, (None,) * len(node.op.handles), group, cuts), False
    else:
        output, own = Layout(node.shape, split.dim, group.size), True
        op = _with_cuts(split.op, split.cut, group, cuts)
        if not split.whole:
            return op, output
    assert isinstance(op, AffineOp)
    return Exchanged(op, group, inputs, output, own), output


def _with_cuts(op: Op, dims: Sequence[int | None], group: Group, cuts: dict[Handle, _Cut]) -> Op:
    """The op with its handles replaced by those of this rank's blocks."""
    names = [f.name for f in fields(op) if isinstance(getattr(op, f.name), Handle)]  # type: ignore[arg-type]
    new: dict[str, Handle] = {}
    for name, dim in zip(names, dims, strict=True):
        source = getattr(op, name)
        layout = None if dim is None else Layout(source.shape, dim, group.size)
        handle = source
        if layout is not None:
            handle = Handle(f"{source.name} [dim {dim}, block {group.rank}]", layout.part, source.dtype)
        cuts[handle] = _Cut(source, layout)
        new[name] = handle
    return replace(op, **new) if new else op  # type: ignore[type-var]


# ------------------------------------------------------------------------------------------------------------- backend


class TensorParallel(DistributedBackend):
    """One rank of a group that splits features. Groups may deal rows among each other.

    Args:
        graph: this rank's part of the network.
        weights: a filled store of :meth:`CutGraph.blocks`.
        team: the ranks with the same part in groups that share the work; default this group works alone.
        sharded: deal rows to the groups; otherwise every group computes all of them.
    """

    def __init__(
        self,
        graph: CutGraph,
        device: torch.device,
        weights: WeightStore,
        chunk_bytes: int,
        team: Group | None = None,
        sharded: bool = True,
    ) -> None:
        super().__init__(team or Solo(), device, weights, chunk_bytes, sharded)
        self.graph = graph
        self._group = graph.group

    @property
    def rank(self) -> int:
        return super().rank * self._group.size + self._group.rank

    @property
    def size(self) -> int:
        return super().size * self._group.size

    def row_chunks(self, n_rows: int, row: Cost, fewest: int = 1) -> Sequence[Chunk]:
        # Partial sums have the width of the whole value.
        return super().row_chunks(n_rows, row.times(self._group.size), fewest)

    def broadcast_result(self, work: Callable[[], T]) -> T:
        # To the first ranks of all groups, and from there to the others.
        return self._group.broadcast_object(super().broadcast_result(work) if self._group.rank == 0 else None)

    def agree(self, value: float, op: str = "max") -> float:
        return super().agree(AGREEMENTS[op]([v for (v,) in self._group.numbers([value])]), op)

    @property
    def summands(self) -> int:
        return self._group.size

    def total(self, partial: Tensor) -> Tensor:
        return _ordered_sum(self._group.all_gather(partial.contiguous()))

    def elements(self, index: int, mask: Tensor) -> Tensor:
        return self.gather_features(index, mask.to(torch.uint8)).flatten().nonzero()[:, 0]

    def local_index(self, index: int, elements: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.graph.layouts[index].place(elements, self._group.rank)

    def gather_features(self, index: int, value: Tensor) -> Tensor:
        return _gathered(self._group, self.graph.layouts[index], value)

    def local_part(self, index: int, value: Tensor) -> Tensor:
        return self.graph.layouts[index].take(value, self._group.rank, repeat=True).contiguous()

    def coefficients(self, index: int, value: Tensor) -> Tensor:
        return self.graph.layouts[index].take(value, self._group.rank, repeat=False).contiguous()


def tensor_parallel(graph: Graph, group: Group, device: torch.device, chunk_bytes: int = 256 << 20) -> TensorParallel:
    """The backend of one rank from a network whose parameters are on this host; they are resident on the device."""
    part = cut_graph(graph, group)
    weights = Resident(device)
    for source, tensor in graph.parameters.items():
        for handle, block in part.blocks(source, tensor):
            weights.put(handle, block)
    return TensorParallel(part, device, weights, chunk_bytes)
