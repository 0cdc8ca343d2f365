"""Bounds of a whole network on one box, for ``verifier bounds`` and ``compute_bounds``: plain and certified values.

The plain values are what each method computes in float32 before certification, so that two runs can be compared bit for
bit; the certified ones re-evaluate the same relaxations in float64 with every rounding error accounted for and are
rounded outward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from verifier.bounds.alpha import SHARES, Parameters, Schedule, alpha_cost, alpha_hidden, alpha_rows
from verifier.bounds.crown import (
    BoundState,
    Specification,
    crown_hidden,
    crown_rows,
    exact_by_ibp,
    initial_state,
    plain_state,
    preactivations,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.core.backend import ParallelBackend
from verifier.core.interval import Interval
from verifier.core.inventory import RowState
from verifier.core.numerics import outward
from verifier.graph.graph import Graph

Method = Literal["ibp", "crown", "alpha-crown"]

_STEPS = Schedule(10)


@dataclass(frozen=True)
class NetworkBounds:
    """Bounds by node name, each float32 of the node's shape.

    Attributes:
        plain: before certification; none when neither they nor slopes are wanted.
        certified: valid in exact arithmetic; the same nodes, or none when they are not wanted.
        slopes: relaxation parameters of the output rows after optimisation, by node and parameter name.
    """

    plain: dict[str, Interval]
    certified: dict[str, Interval]
    slopes: dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """Which bounds of a network, and how they are computed.

    Attributes:
        intermediate: of every pre-activation too.
        hidden, final: how alpha-CROWN optimises the hidden nodes (layerwise) and the output rows.
        hidden_rows: bound hidden nodes by CROWN rows; otherwise by interval arithmetic alone.
        plain: the values in float32 before certification; ``slopes``: their optimised slopes of the output rows.
        certified: those in float64 with every rounding error accounted for, a second run of the method.
    """

    method: Method
    intermediate: bool = False
    hidden: Schedule = _STEPS
    final: Schedule = _STEPS
    hidden_rows: bool = True
    plain: bool = True
    slopes: bool = True
    certified: bool = True


def compute_graph_bounds(engine: Engine, box: Interval, wanted: Wanted) -> NetworkBounds:
    """Lower and upper bounds of every output element, and of every pre-activation when that is wanted.

    Args:
        box: float32 (*input_shape) or flat.
    """
    graph, backend = engine.graph, engine.backend
    engine = replace(engine, deadline=backend.shared_deadline(engine.deadline)).certifying()
    shape = (1, *graph.whole.input_shape)
    own = Interval(*(backend.local_part(0, b.reshape(shape).to(backend.device)) for b in box))
    names = _names(graph, wanted.intermediate)
    kept: Parameters = {}

    def bounds_of(state: BoundState) -> dict[str, Interval]:
        return {graph.nodes[i].name: _one(backend, i, state.bounds[i]) for i in names}

    plain: dict[str, Interval] = {}
    if wanted.plain or wanted.slopes:
        state, kept = _run(engine.using(PLAIN), plain_state(engine, own), wanted)
        plain = bounds_of(state)
        del state  # the certified run needs the room
    certified: dict[str, Interval] = {}
    if wanted.certified:
        alone = replace(wanted, slopes=False)
        certified = bounds_of(_run(engine, initial_state(engine, own), alone)[0])
    return NetworkBounds(
        plain,
        certified,
        {
            f"{graph.nodes[i].name}.{k}": backend.gather_features(i, v[0])
            for i, group in kept.items()
            for k, v in group.items()
        },
    )


def _one(backend: ParallelBackend, index: int, bounds: Interval) -> Interval:
    """The whole node's bounds on the one box, on the CPU; what is not a number is no bound."""
    low, up = backend.gather_features(index, torch.stack((bounds.lower[0], bounds.upper[0])))
    inf = float("inf")
    return Interval(low.cpu().nan_to_num(-inf, inf, -inf), up.cpu().nan_to_num(inf, inf, -inf))


def _names(graph: Graph, intermediate: bool) -> Sequence[int]:
    return sorted({*preactivations(graph), graph.output}) if intermediate else [graph.output]


def _run(engine: Engine, state: BoundState, wanted: Wanted) -> tuple[BoundState, Parameters]:
    """The method on one state; the output node's bounds are put into the state."""
    if wanted.method == "ibp":
        return state, {}
    graph = engine.graph
    state = crown_hidden(engine, state, nodes=None if wanted.hidden_rows else ())
    if wanted.method == "alpha-crown" and wanted.hidden_rows:
        state = alpha_hidden(engine, replace(state, bounds=dict(state.bounds)), wanted.hidden)
    if exact_by_ibp(graph, graph.nodes[graph.output]):
        return state, {}
    return _output(engine, state, wanted)


def _output(engine: Engine, state: BoundState, wanted: Wanted) -> tuple[BoundState, Parameters]:
    """Rows +e and -e of every output element."""
    graph, backend, method = engine.graph, engine.backend, wanted.method
    output = graph.whole.nodes[graph.output]
    n = output.size
    device = backend.device
    parts, groups = [], []
    total = RowState()
    fewest = SHARES if method == "alpha-crown" else 1
    for chunk in backend.row_chunks(2 * n, alpha_cost(graph, graph.output), fewest):
        rows = torch.zeros((chunk.size, n), dtype=torch.float64, device=device)
        for i, row in enumerate(range(chunk.start, chunk.stop)):
            rows[i, row % n] = 1.0 if row < n else -1.0
        spec = Specification(rows.reshape(1, chunk.size, *output.shape))
        parameters: Parameters | None = None
        if method == "alpha-crown":
            found = alpha_rows(engine, state, spec, wanted.final)
            parameters, value = found.parameters, found.lower
            total += found.state
            if wanted.slopes:
                groups.append((chunk, parameters))
        if method != "alpha-crown" or state.certified:
            value, _ = crown_rows(engine, state, spec, parameters)
        parts.append((chunk, value))
    backend.usage.note_rows(total)
    lower = backend.gather_rows(2 * n, parts)
    both = torch.stack((lower[:, :n], -lower[:, n:])).reshape(2, 1, *output.shape)
    found = outward(Interval(*backend.local_part(graph.output, both)))
    out = replace(state, bounds={**state.bounds, graph.output: state.bounds[graph.output].intersect(found)})
    slopes: Parameters = {}
    for i in groups[0][1] if groups else {}:
        slopes[i] = {k: backend.gather_rows(2 * n, [(c, g[i][k]) for c, g in groups]) for k in groups[0][1][i]}
    return out, slopes
