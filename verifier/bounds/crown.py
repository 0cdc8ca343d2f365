"""CROWN: bounds of unstable neurons and of specification rows by the backward walk, without optimisation.

Zhang et al., NeurIPS 2018; on general graphs Xu et al., NeurIPS 2020.

A ``BoundState`` is what is known about a batch of boxes. Hidden nodes are visited in topological order; rows start only
at elements that the tighter of IBP and earlier knowledge leaves undecided, and what is found is intersected with it.

When proofs are certified the walk runs in float64 with every rounding error accounted for, and the results are rounded
outward to float32; otherwise it runs in plain float32.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verifier.bounds import ibp
from verifier.bounds.engine import PLAIN, ROUNDED_32, Engine
from verifier.bounds.walk import Magnitudes, Walk, backward, concretise
from verifier.core.arithmetic import full_precision
from verifier.core.backend import Chunk, Cost, ParallelBackend
from verifier.core.device import facts
from verifier.core.errors import DeadlineExceeded
from verifier.core.interval import Interval
from verifier.core.numerics import finite_lower, float32_proofs, outward
from verifier.graph import traverse
from verifier.graph.graph import Graph, Node
from verifier.graph.linear_forms import Dense, Form, OneHot
from verifier.graph.op import AffineOp, NonlinearOp, Relaxation
from verifier.proof.writer import Proof, Section

# Where the error of a run has so much of the width of hidden bounds, bounds that hold for runs lead nowhere.
_HOPELESS = 0.5


class NoisyRuns(Exception):
    """Bounds that hold for runs are much wider than those of the network itself.

    Args:
        share: of their width that the error of a run has.
    """


SlopeParameters = Mapping[int, Mapping[str, Tensor]]
Relevant = Mapping[int, Tensor]


@dataclass(frozen=True)
class BoundState:
    """Bounds of a batch of boxes, of this rank's part of every value.

    Attributes:
        box: float32 (B, *input_shape).
        bounds: node index to float32 (B, *shape); valid in exact arithmetic when ``certified``.
        magnitudes: float64 magnitudes for certificates (B, *shape), valid for every sub-box too.
        certified: whether every bound accounts for rounding errors.
        proof: where it is written down how bounds came about; None: nowhere.
    """

    box: Interval
    bounds: dict[int, Interval]
    magnitudes: Magnitudes
    certified: bool
    proof: Section | None = None


@dataclass(frozen=True)
class Specification:
    """Rows over the outputs (and perhaps the inputs) to be bounded from below.

    Attributes:
        y: float64 (B or 1, S, *output_shape), whole on every rank.
        x: float64 (B or 1, S, *input_shape) or None.
    """

    y: Tensor
    x: Tensor | None = None

    def forms(self, backend: ParallelBackend, output: int, dtype: torch.dtype) -> dict[int, Form]:
        out: dict[int, Form] = {output: Dense(backend.coefficients(output, self.y).to(dtype))}
        if self.x is not None:
            out[0] = Dense(backend.coefficients(0, self.x).to(dtype))
        return out

    def select(self, index: Tensor) -> Specification:
        """The rows of some domains."""
        x = None if self.x is None else (self.x if self.x.shape[0] == 1 else self.x[index])
        return replace(self, y=self.y if self.y.shape[0] == 1 else self.y[index], x=x)


def initial_state(engine: Engine, box: Interval, proof: Proof | None = None) -> BoundState:
    """IBP of every node, in float64 with rounding errors accounted for, rounded outward to float32.

    It counts as certified, and what follows from it is certified too, when the engine accounts for rounding errors.

    Args:
        box: float32 (B, *input_shape).
        proof: that gets a section for the box.
    """
    if proof is not None:
        return _written_state(engine, box, proof.section(box))
    found, magnitudes = ibp.propagate(engine.certifying(), box)
    bounds = {i: outward(b) for i, b in found.items()}
    return BoundState(box, bounds, magnitudes, engine.rounding)


def _written_state(engine: Engine, box: Interval, section: Section) -> BoundState:
    """IBP in which every node is bounded from what is written down of earlier ones, each with its room."""
    exact = engine.certifying()
    wide, magnitudes = ibp.start(box.to(exact.dtype), exact.arithmetic.run)
    bounds = {0: box}
    for node in traverse.forward(engine.graph.nodes):
        ibp.step(exact, node, wide, magnitudes)
        bounds[node.index] = _outward(wide[node.index], True)
        wide[node.index] = bounds[node.index].to(exact.dtype)
        magnitudes.note_value(node.index, wide[node.index])
    return BoundState(box, bounds, magnitudes, engine.rounding, section)


def _outward(bounds: Interval, room: bool) -> Interval:
    """In float32, rounded outward; with room for a reader of a proof that sums in another order."""
    found = outward(bounds)
    if not room:
        return found
    inf = torch.full((), float("inf"), dtype=found.lower.dtype, device=found.lower.device)
    return Interval(torch.nextafter(found.lower, -inf), torch.nextafter(found.upper, inf))


# Of what is written down, besides what rounding can cost: a part of the value, and of the constants behind it.
_ROOM, _ROOM_OF_PARTS = 2.0**-22, 1e-12


def with_room(value: Tensor, walk: Walk, proof: Section | None) -> Tensor:
    """Certified lower bounds (B, S) of a walk, low enough for a reader to find them too where they are written down."""
    if proof is None or value.dtype != torch.float64:
        return value
    return value - (_ROOM * value.abs() + 8 * walk.rounding_error + _ROOM_OF_PARTS * walk.constant.abs())


def plain_state(engine: Engine, box: Interval) -> BoundState:
    """IBP of every node in plain float32, which certifies nothing."""
    bounds, magnitudes = ibp.propagate(engine.using(PLAIN), box)
    return BoundState(box, bounds, magnitudes, certified=False)


def relaxations(
    graph: Graph,
    bounds: Mapping[int, Interval],
    dtype: torch.dtype,
    parameters: SlopeParameters | None = None,
    before: int | None = None,
    skip: Container[int] = (),
) -> dict[int, Relaxation]:
    """Planes of every nonlinear node with index below ``before``, except those in ``skip``."""
    out: dict[int, Relaxation] = {}
    for node, op in traverse.nonlinear(graph.nodes, last=None if before is None else before - 1):
        if node.index not in skip:
            xs = [bounds[i].to(dtype) for i in node.inputs]
            given = (parameters or {}).get(node.index)
            cast = {k: v.to(dtype) for k, v in given.items()} if given else None
            out[node.index] = op.relax(xs, cast)
    return out


def undecided(graph: Graph, index: int, bounds: Interval) -> Tensor:
    """Elements of a node whose bounds still matter to the relaxations that read it: (B, *shape) bool."""
    readers = [graph.nodes[i].op for i in graph.consumers[index]]
    pieces = [op.pieces for op in readers if isinstance(op, NonlinearOp)]
    if None in pieces:
        return bounds.upper > bounds.lower
    out = torch.zeros_like(bounds.lower, dtype=torch.bool)
    for point in sorted({point for found in pieces if found is not None for point in found.points}):
        out = out | ((bounds.lower < point) & (bounds.upper > point))
    return out


def open_elements(engine: Engine, index: int, bounds: Interval, relevant: Relevant | None = None) -> Tensor:
    """(n,) flat positions in the whole value of a node that are undecided on some box; the same on every rank.

    Args:
        relevant: nodes that matter, with their elements (*shape) bool that do; empty or None: all.
    """
    open_here = undecided(engine.graph, index, bounds).any(0)
    if relevant:
        open_here = open_here & relevant[index] if index in relevant else torch.zeros_like(open_here)
    return engine.backend.elements(index, open_here)


def preactivations(graph: Graph) -> tuple[int, ...]:
    """Nodes that nonlinear ops read, in topological order; the input itself is known."""
    seen = {i for node, _ in traverse.nonlinear(graph.nodes) for i in node.inputs}
    return tuple(sorted(i for i in seen if i != 0))


def exact_by_ibp(graph: Graph, node: Node) -> bool:
    """Whether interval arithmetic is already exact: one affine op on the input, moved numbers aside."""
    arithmetic = 0
    while node.index != 0:
        if not isinstance(node.op, AffineOp) or len(node.inputs) != 1:
            return False
        arithmetic += node.op.forward_terms(graph.in_shapes(node), node.shape) > 0
        node = graph.nodes[node.inputs[0]]
    return arithmetic <= 1


def tight_by_ibp(graph: Graph, node: Node, bounds: Mapping[int, Interval]) -> bool:
    """Whether rows of a hidden node cannot do better than interval arithmetic on what is known of earlier nodes.

    That holds where every element is a function of one element of a pre-activation that has rows of its own: planes
    lie on one side of the function, so their extremes over an interval are never inside its range.
    """
    if exact_by_ibp(graph, node):
        return True
    while node.index != 0:
        sources = node.inputs
        if isinstance(node.op, NonlinearOp):
            if len(sources) != 1 or not node.op.elementwise:
                return False
            if node.op.pieces is None:  # its input has rows for every element that has a width
                return True
        elif isinstance(node.op, AffineOp) and node.op.elementwise:
            if not node.op.handles:  # of a sum, what is known is an offset
                sources = [i for i in sources if not _is_known(bounds[i])]
        elif not (isinstance(node.op, AffineOp) and node.op.moves):
            return False
        if len(sources) != 1:
            return False
        node = graph.nodes[sources[0]]
    return True


# Relative; rounding leaves known values a width that is far below, and none that matters is.
_KNOWN = 1e-6


def _is_known(bounds: Interval) -> bool:
    """Whether a value is one number on every box, but for rounding."""
    return bool((bounds.upper - bounds.lower <= _KNOWN * (1 + bounds.magnitude())).all())


# Multiply-adds that the elementwise work on one coefficient of a walk is worth.
_ELEMENTWISE = 64.0


def row_cost(graph: Graph, batch: int, dtype: torch.dtype, index: int | None = None) -> Cost:
    """What a walk of one row from a node (default: the last) costs: at its widest it keeps coefficients alive, the next
    ones and two temporaries."""
    nodes = graph.nodes if index is None else graph.nodes[: index + 1]
    words = torch.finfo(dtype).bits // 32
    flops = sum(node.flops + _ELEMENTWISE * node.size for node in nodes)
    return Cost(4 * batch * max(n.size for n in nodes) * 4 * words, batch * words * flops)


def lower_bounds(
    engine: Engine,
    state: BoundState,
    start: Mapping[int, Form],
    planes: Mapping[int, Relaxation],
    splits: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Walk]:
    """One walk and its concretisation: (B, S) lower bounds in the engine's dtype, NaN turned into -inf."""
    magnitudes = state.magnitudes.to(engine.dtype) if engine.rounding else None
    walk = backward(engine, start, planes, magnitudes, splits)
    return finite_lower(concretise(engine, walk, state.box.to(engine.dtype))), walk


def hidden_rows(
    index: Tensor, shape: Sequence[int], chunk: Chunk, dtype: torch.dtype, here: Tensor | None = None
) -> OneHot:
    """A chunk of the 2n rows (+e for lower, -e for upper bounds), zero-padded to its size.

    Args:
        index: (n,) flat positions.
        here: (n,) bool, which of them are in this rank's part; None: all.
    """
    start, stop = chunk.start, chunk.stop
    both = torch.cat([index, index])[start:stop]
    sign = torch.ones(2 * index.shape[0], dtype=dtype, device=index.device)
    sign[index.shape[0] :].neg_()
    if here is not None:
        sign = sign * torch.cat([here, here])
    pad = chunk.size - (stop - start)
    values = torch.nn.functional.pad(sign[start:stop], (0, pad))
    return OneHot(torch.nn.functional.pad(both, (0, pad)), values, tuple(shape))


def tighten(state: BoundState, index: int, elements: Tensor, lower: Tensor, here: Tensor | None = None) -> None:
    """Intersect a node's bounds with found rows, in place in the state's dict.

    Args:
        elements: (n,) flat positions.
        lower: (B, 2n) lower bounds of +e, then of -e, any float dtype.
        here: (n,) bool, which of the elements are in this rank's part; None: all.
    """
    old = state.bounds[index]
    n = elements.shape[0]
    found = outward(Interval(lower[:, :n], -lower[:, n:]))
    if here is not None:
        elements, found = elements[here], Interval(found.lower[:, here], found.upper[:, here])
    low, up = old.lower.flatten(1).clone(), old.upper.flatten(1).clone()
    low[:, elements] = torch.fmax(low[:, elements], found.lower)
    up[:, elements] = torch.fmin(up[:, elements], found.upper)
    shape = old.lower.shape
    state.bounds[index] = Interval(low.reshape(shape), up.reshape(shape))


def crown_hidden(
    engine: Engine,
    state: BoundState,
    nodes: Sequence[int] | None = None,
    relevant: Relevant | None = None,
    noise: list[float] | None = None,
    anytime: bool = False,
    missed: list[int] | None = None,
) -> BoundState:
    """CROWN bounds of all pre-activations, tightening ``state``; intervals are propagated anew from every one of them.

    Proofs need float64 with rounding errors accounted for; in another arithmetic, plain float32 is used instead, and
    the state that comes back is not certified. Float32 that accounts for them helps on the way, where it has error
    bounds.

    Args:
        nodes: visit only these; default all pre-activations.
        relevant: elements that matter, see :func:`verifier.bounds.relevance.relevant`; default all.
        noise: takes, for every node, which share of the bounds' width the error of a run has.
        anytime: when time runs out, keep what was found; the nodes that are left have interval bounds.
        missed: takes the nodes that are left then, undecided or not.

    Raises:
        DeadlineExceeded: time ran out, unless ``anytime``.
        NoisyRuns: it has most of it somewhere; only with ``noise``.
    """
    graph = engine.graph
    engine = engine if certifies(engine, state) else engine.using(PLAIN)
    magnitudes = state.magnitudes.copy()
    out = replace(state, bounds=dict(state.bounds), magnitudes=magnitudes, certified=engine.rounding)
    planes: dict[int, Relaxation] = {}
    done = 0
    visited = preactivations(graph) if nodes is None else tuple(nodes)
    for place, index in enumerate(visited):
        propagate_after(engine, out, done, index)
        if out.proof is not None:
            out.proof.claim(out.bounds, index)
        node = graph.nodes[index]
        if tight_by_ibp(graph, node, out.bounds):
            continue
        elements = open_elements(engine, index, out.bounds[index], relevant)
        if elements.shape[0] == 0:
            continue
        planes.update(planes_between(graph, out.bounds, engine.dtype, done, index))
        try:
            if engine.rounding and float32_has_error_bounds(engine, index):
                # Most neurons are decided with room to spare: float32, its rounding errors included, is enough and
                # cheaper.
                narrow = planes_between(graph, out.bounds, torch.float32, 0, index)
                _visit(engine.using(ROUNDED_32), out, index, elements, narrow, noise)
                elements = open_elements(engine, index, out.bounds[index], relevant)
            _visit(engine, out, index, elements, planes, noise)
        except DeadlineExceeded:
            if not anytime:
                raise
            if missed is not None:
                missed += visited[place:]
            break
        done = index
    propagate_after(engine, out, done, len(graph.nodes) - 1)
    return out


def certifies(engine: Engine, state: BoundState) -> bool:
    return state.certified and engine.rounding and engine.dtype == torch.float64


def float32_has_error_bounds(engine: Engine, last: int | None = None) -> bool:
    """Whether float32 kernels obey the inner-product error bound, and long sums can be accumulated in float64, in walks
    that start at node ``last`` or before it (default: at any node).

    On the CPU convolutions run as direct kernels and products in full float32 unless the process lowered the
    precision; on a GPU convolutions may be Winograd or FFT, but float64 is fast there.
    """
    if not float32_proofs():
        return False
    plain = all(op.pieces is not None for _, op in traverse.nonlinear(engine.graph.nodes, last=last))
    return plain and facts(engine.backend.device).direct_float32 and full_precision()


def _visit(
    engine: Engine,
    out: BoundState,
    index: int,
    elements: Tensor,
    planes: Mapping[int, Relaxation],
    noise: list[float] | None,
) -> None:
    """CROWN rows of some elements of one node, intersected into the state."""
    graph, backend, dtype = engine.graph, engine.backend, engine.dtype
    batch, rows = out.box.lower.shape[0], 2 * elements.shape[0]
    positions, here = backend.local_index(index, elements)
    # Magnitudes are converted once for all chunks.
    known = replace(out, magnitudes=out.magnitudes.to(dtype)) if engine.rounding else out
    parts, errors = [], []
    for chunk in backend.row_chunks(rows, row_cost(graph, batch, dtype, index)):
        engine.deadline.check("CROWN")
        form = hidden_rows(positions, graph.nodes[index].shape, chunk, dtype, here)
        value, walk = lower_bounds(engine, known, {index: form}, planes)
        value = with_room(value, walk, out.proof)
        parts.append((chunk, value.expand(batch, -1)))
        if noise is not None:
            errors.append((chunk, walk.error.to(value.dtype).expand(batch, -1)))
    if parts:
        found = backend.gather_rows(rows, parts)
        if noise is not None:
            _note_noise(found, backend.gather_rows(rows, errors), noise)
        tighten(out, index, positions, found, here)
        if out.proof is not None:
            out.proof.rows(index, elements, out.bounds[index], None)


def _note_noise(found: Tensor, error: Tensor, noise: list[float]) -> None:
    """The share that the error of a run (B, 2n) has in the widths of rows (B, 2n)."""
    n = found.shape[1] // 2
    width = (-found[:, n:] - found[:, :n]).double()
    known = torch.isfinite(width)
    share = float(error.double().sum()) / max(float(width[known].sum()), 1e-300)
    noise.append(share)
    if not share <= _HOPELESS:
        raise NoisyRuns(share)


def propagate_after(engine: Engine, out: BoundState, first: int, last: int) -> None:
    """Interval bounds of the nodes after ``first`` up to ``last`` from what is known by now; float64 when certified."""
    engine = engine.certifying() if out.certified else engine.using(PLAIN)
    dtype = engine.dtype
    wide = {i: b.to(dtype) for i, b in out.bounds.items() if i <= first}
    magnitudes = out.magnitudes
    magnitudes.note_value(first, out.bounds[first].to(magnitudes.dtype))
    known = magnitudes.to(dtype)
    for node in traverse.forward(engine.graph.nodes, first, last):
        ibp.step(engine, node, wide, known)
        ibp.replace(node, out.bounds[node.index].to(dtype), wide, known)
        found = outward(wide[node.index])
        if out.proof is not None:  # what is written down already needs no more room
            found = _outward(wide[node.index], True).intersect(out.bounds[node.index])
        out.bounds[node.index] = found
        wide[node.index] = out.bounds[node.index].to(dtype)


def planes_between(
    graph: Graph, bounds: Mapping[int, Interval], dtype: torch.dtype, first: int, last: int
) -> dict[int, Relaxation]:
    """Planes of the nonlinear nodes with first <= index <= last: a walk passes through the node that it starts from."""
    return {
        node.index: op.relax([bounds[i].to(dtype) for i in node.inputs])
        for node, op in traverse.nonlinear(graph.nodes, first, last)
    }


def crown_rows(
    engine: Engine,
    state: BoundState,
    spec: Specification,
    parameters: SlopeParameters | None = None,
    splits: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Walk]:
    """Lower bounds (B, S) of specification rows, whatever the clock says; certified when the state is and the engine
    accounts for rounding errors in float64, which is the type of the rows."""
    graph, dtype = engine.graph, engine.dtype
    if not certifies(engine, state):
        engine = engine.using(replace(PLAIN, dtype=dtype))
    planes = relaxations(graph, state.bounds, dtype, parameters)
    cast = {i: s.to(dtype) for i, s in splits.items()} if splits else None
    start = spec.forms(engine.backend, graph.output, dtype)
    lower, walk = lower_bounds(engine.unhurried(), state, start, planes, cast)
    return with_room(lower, walk, state.proof), walk
