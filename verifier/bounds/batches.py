"""Bounds of many boxes of one network at once, for ``compute_bounds`` and ``certify``.

Every box is bounded as it would be alone: rows start at all elements that are undecided on some box, and what they
find counts on those boxes alone on which the element is undecided. Chunks of rows have a size that depends on the node
and on the number of boxes, never on which elements are undecided, so that the kernels get the same shapes whatever
boxes share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verifier.bounds.alpha import SHARES, Parameters, Schedule, alpha_cost, alpha_hidden, alpha_rows
from verifier.bounds.crown import (
    BoundState,
    Specification,
    certifies,
    crown_hidden,
    crown_rows,
    hidden_rows,
    initial_state,
    lower_bounds,
    plain_state,
    planes_between,
    preactivations,
    propagate_after,
    row_cost,
    tight_by_ibp,
    undecided,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.rows import rows_by_intervals
from verifier.bounds.walk import Walk
from verifier.core.backend import Chunk
from verifier.core.interval import Interval
from verifier.core.numerics import outward, unit_roundoff
from verifier.graph.graph import Graph
from verifier.graph.op import Relaxation

# Boxes of a batch, and rows of a chunk times boxes: as many as keep a matrix product busy.
MOST_BOXES = 64
_ROWS_TIMES_BOXES = 2048
# A node's rows are cut into at least so many chunks, since the last one is padded.
_LEAST_CHUNKS = 8
# Rows whose coefficients have to fit into a chunk's bytes.
_LEAST_ROWS = 16


@dataclass(frozen=True)
class Method:
    """How boxes are bounded.

    Attributes:
        name: ``ibp``, ``crown`` or ``alpha-crown``.
        certified: in float64 with every rounding error accounted for; otherwise in plain float32, which proves nothing.
        hidden, final: how alpha-CROWN optimises the hidden nodes (layerwise) and the rows.
        hidden_rows: bound hidden nodes by CROWN rows; otherwise by interval arithmetic alone.
    """

    name: str = "crown"
    certified: bool = True
    hidden: Schedule = field(default_factory=lambda: Schedule(10))
    final: Schedule = field(default_factory=lambda: Schedule(10))
    hidden_rows: bool = True


@dataclass(frozen=True)
class Linear:
    """Linear functions of the input that bound rows from below on their boxes.

    Attributes:
        a: (B, S, *input_shape); ``bias``: (B, S). Float64 when certified: the inequality holds in real arithmetic.
    """

    a: Tensor
    bias: Tensor


@dataclass(frozen=True)
class RowBounds:
    """What is known of the rows of a batch of boxes.

    Attributes:
        state: bounds of every node, as far as the method computes them.
        lower: (B, S), in the arithmetic's type.
        linear: None unless asked for.
    """

    state: BoundState
    lower: Tensor
    linear: Linear | None = None


def batch_size(graph: Graph, backend_bytes: int) -> int:
    """Boxes that are bounded together: counted from the network and the budget of a chunk alone."""
    each = _LEAST_ROWS * row_cost(graph, 1, torch.float64).nbytes
    return max(1, min(MOST_BOXES, backend_bytes // max(each, 1)))


def batches(count: int, most: int) -> Iterator[slice]:
    """Boxes cut into as few batches as possible, all but the last of one size."""
    if count:
        size = -(-count // -(-count // most))
        yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def bound_state(engine: Engine, box: Interval, method: Method) -> BoundState:
    """Bounds of the hidden nodes of every box.

    Args:
        box: float32 (B, *input_shape), of this rank's inputs. alpha-CROWN takes one box.

    Raises:
        DeadlineExceeded: time ran out.
    """
    engine = engine.certifying() if method.certified else engine.using(PLAIN)
    state = initial_state(engine, box) if method.certified else plain_state(engine, box)
    if method.name == "ibp" or not method.hidden_rows:
        return state
    if box.lower.shape[0] > 1:
        return _hidden(engine, state)
    state = crown_hidden(engine, state)
    if method.name == "alpha-crown":
        state = alpha_hidden(engine, replace(state, bounds=dict(state.bounds)), method.hidden)
    return state


def bound_rows(
    engine: Engine, state: BoundState, spec: Specification, method: Method, linear: bool = False
) -> RowBounds:
    """Lower bounds of rows on every box of a state.

    Args:
        spec: (B or 1, S, ...); ``alpha-crown`` takes one box.
        linear: the linear functions too.
    """
    graph, backend = engine.graph, engine.backend
    engine = engine.certifying()
    if not method.certified:  # few rows decide how near batches of different sizes come to each other
        engine = engine.using(replace(PLAIN, dtype=torch.float64))
    count, boxes = spec.y.shape[1], state.box.lower.shape[0]
    by_intervals = rows_by_intervals(graph, backend, state, spec)
    if method.name == "ibp":
        plain = _constant(by_intervals, graph) if linear else None
        return RowBounds(state, by_intervals, plain)
    alpha = method.name == "alpha-crown"
    cost = alpha_cost(graph, graph.output) if alpha else row_cost(graph, boxes, engine.dtype)
    values, functions = [], []
    for chunk in backend.row_chunks(count, cost, SHARES if alpha else 1):
        engine.deadline.check("the bounds of the outputs")
        rows = _padded(spec, chunk)
        parameters: Parameters | None = None
        if alpha:
            parameters = alpha_rows(engine, state, rows, method.final).parameters
        value, walk = crown_rows(engine, state, rows, parameters)
        values.append((chunk, value.double().expand(boxes, -1)))
        if linear:
            functions.append((chunk, _function(engine, state, walk)))
    lower = torch.fmax(backend.gather_rows(count, values), by_intervals)
    if not linear:
        return RowBounds(state, lower)
    a = backend.gather_rows(count, [(c, f.a) for c, f in functions])
    bias = backend.gather_rows(count, [(c, f.bias) for c, f in functions])
    return RowBounds(state, lower, Linear(a, bias))


def _padded(spec: Specification, chunk: Chunk) -> Specification:
    """The rows of a chunk; zeros after the last one."""

    def part(rows: Tensor) -> Tensor:
        found = rows[:, chunk.start : chunk.stop]
        missing = chunk.size - found.shape[1]
        return (
            found if not missing else torch.cat([found, found.new_zeros(found.shape[0], missing, *found.shape[2:])], 1)
        )

    return Specification(part(spec.y), None if spec.x is None else part(spec.x))


def _constant(lower: Tensor, graph: Graph) -> Linear:
    """Bounds as linear functions without a slope."""
    return Linear(lower.new_zeros(*lower.shape, *graph.whole.input_shape), lower)


def _function(engine: Engine, state: BoundState, walk: Walk) -> Linear:
    """What a walk ends with, as whole rows; the constant is moved down by whatever was rounded on the way."""
    boxes = state.box.lower.shape[0]
    a = engine.backend.gather_features(0, walk.a)
    constant = walk.constant
    if engine.rounding:
        u = unit_roundoff(engine.dtype)
        constant = constant - (walk.rounding_error + walk.error) * (1 + 8 * u)
        constant = constant - constant.abs() * 4 * u
    rows = a.shape[1]
    bias = constant.nan_to_num(-torch.inf, torch.inf, -torch.inf).expand(boxes, rows)
    return Linear(a.expand(boxes, *a.shape[1:]), bias)


# -- hidden nodes ------------------------------------------------------------------------------------------------


def _hidden(engine: Engine, state: BoundState) -> BoundState:
    """CROWN bounds of all pre-activations of many boxes: what ``crown_hidden`` does for one."""
    graph = engine.graph
    engine = engine if certifies(engine, state) else engine.using(PLAIN)
    out = replace(state, bounds=dict(state.bounds), magnitudes=state.magnitudes.copy(), certified=engine.rounding)
    planes: dict[int, Relaxation] = {}
    done = 0
    for index in preactivations(graph):
        propagate_after(engine, out, done, index)
        if tight_by_ibp(graph, graph.nodes[index], _Unknown(out.bounds)):
            continue
        visit = _Visit(engine, out, index)
        if not visit.open():
            continue
        planes.update(planes_between(graph, out.bounds, engine.dtype, done, index))
        visit.run(engine, planes)
        done = index
    propagate_after(engine, out, done, len(graph.nodes) - 1)
    return out


class _Unknown(dict[int, Interval]):
    """Bounds of which none counts as a known value, so that what is visited does not follow from a batch's boxes."""

    def __getitem__(self, index: int) -> Interval:
        low = super().__getitem__(index).lower[:1]
        return Interval(torch.zeros_like(low), torch.ones_like(low))


class _Visit:
    """Rows of one node, intersected into the state on the boxes on which an element is undecided."""

    def __init__(self, engine: Engine, out: BoundState, index: int) -> None:
        self.graph, self.backend = engine.graph, engine.backend
        self.out, self.index = out, index

    def open(self) -> bool:
        """Whether an element is undecided somewhere."""
        self.mask = undecided(self.graph, self.index, self.out.bounds[self.index])
        self.elements = self.backend.elements(self.index, self.mask.any(0))
        return self.elements.shape[0] > 0

    def run(self, engine: Engine, planes: Mapping[int, Relaxation]) -> None:
        """Rows of what is undecided by now."""
        if not self.open():
            return
        out, index = self.out, self.index
        boxes, rows = out.box.lower.shape[0], 2 * self.elements.shape[0]
        node = self.graph.nodes[index]
        positions, here = self.backend.local_index(index, self.elements)
        known = replace(out, magnitudes=out.magnitudes.to(engine.dtype)) if engine.rounding else out
        size = _chunk_rows(engine, boxes, index)
        parts = []
        for start in range(0, rows, size):
            engine.deadline.check("CROWN")
            chunk = Chunk(start, min(start + size, rows), size)
            form = hidden_rows(positions, node.shape, chunk, engine.dtype, here)
            value, _ = lower_bounds(engine, known, {index: form}, planes)
            parts.append(value.expand(boxes, -1)[:, : chunk.stop - chunk.start])
        self._note(torch.cat(parts, 1), positions, here)

    def _note(self, lower: Tensor, positions: Tensor, here: Tensor | None) -> None:
        old, n = self.out.bounds[self.index], positions.shape[0]
        found = outward(Interval(lower[:, :n], -lower[:, n:]))
        if here is not None:
            positions, found = positions[here], Interval(found.lower[:, here], found.upper[:, here])
        mask = self.mask.flatten(1)[:, positions]
        low, up = old.lower.flatten(1).clone(), old.upper.flatten(1).clone()
        low[:, positions] = torch.where(mask, torch.fmax(low[:, positions], found.lower), low[:, positions])
        up[:, positions] = torch.where(mask, torch.fmin(up[:, positions], found.upper), up[:, positions])
        shape = old.lower.shape
        self.out.bounds[self.index] = Interval(low.reshape(shape), up.reshape(shape))


def _chunk_rows(engine: Engine, boxes: int, index: int) -> int:
    """Rows of a chunk, whatever is undecided; a multiple of four."""
    graph, rows = engine.graph, 2 * engine.graph.nodes[index].size
    fitting = engine.backend.row_chunks(rows, row_cost(graph, boxes, engine.dtype, index))[0].size
    most = min(_ROWS_TIMES_BOXES // boxes, -(-rows // _LEAST_CHUNKS), fitting)
    return max(4, -(-most // 4) * 4)
