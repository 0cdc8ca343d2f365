"""Slope and split-multiplier optimisation (alpha-CROWN, beta-CROWN).

Alpha: Xu et al., *Fast and complete*, ICLR 2021. Beta: Wang et al., *Beta-CROWN*, NeurIPS 2021.

A step is a backward walk and a forward sweep (``climb.py``); ``paces.py`` has the schedule and the learning rates, and
``repeated.py`` replays steps on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from verifier.bounds.climb import Climb, Optimised, Parameters, Splits, sweep
from verifier.bounds.crown import (
    BoundState,
    Relevant,
    Specification,
    hidden_rows,
    lower_bounds,
    open_elements,
    preactivations,
    relaxations,
    row_cost,
    tight_by_ibp,
    tighten,
    with_room,
)
from verifier.bounds.engine import PLAIN, Engine
from verifier.bounds.paces import Paces, Schedule
from verifier.bounds.repeated import Repeated
from verifier.bounds.worth import DriedUp, looked_at
from verifier.core.backend import Chunk, Cost
from verifier.core.errors import DeadlineExceeded
from verifier.core.interval import Interval
from verifier.core.inventory import RowState
from verifier.graph import traverse
from verifier.graph.graph import Graph
from verifier.graph.linear_forms import Form
from verifier.graph.op import ParamSpec
from verifier.proof.writer import Section

__all__ = [
    "SHARES",
    "Optimised",
    "Parameters",
    "Schedule",
    "Splits",
    "alpha_cost",
    "alpha_hidden",
    "alpha_rows",
    "initial_parameters",
    "optimise",
    "sweep",
]


Stop = Callable[[int, Tensor], bool]


def initial_parameters(
    graph: Graph, bounds: Mapping[int, Interval], rows: int, before: int
) -> tuple[Parameters, dict[int, dict[str, ParamSpec]]]:
    """CROWN's own choices, (B, S, *shape) per parameter, and their limits."""
    values: Parameters = {}
    specs: dict[int, dict[str, ParamSpec]] = {}
    for node, op in traverse.nonlinear(graph.nodes, last=before - 1):
        found = dict(op.parameters([bounds[i] for i in node.inputs]))
        if found:
            specs[node.index] = found
            values[node.index] = {
                name: s.initial.expand(s.initial.shape[0], rows, *s.initial.shape[2:]).clone()
                for name, s in found.items()
            }
    return values, specs


def optimise(
    engine: Engine,
    state: BoundState,
    start: Mapping[int, Form],
    parameters: Parameters,
    schedule: Schedule,
    splits: Splits | None = None,
    settled: Stop | None = None,
) -> Optimised:
    """Maximise every row's lower bound over relaxation parameters and split multipliers, in float32.

    Where time runs out the best values so far are returned.

    Args:
        state: its bounds stay as they are.
        start: forms whose rows are bounded, float32.
        parameters: initial values, (B, S, *shape); emptied.
        settled: like the schedule's ``stop``, for rows that other ranks do not have. What is returned is what was found
            when it said so; only the steps themselves go on, until all ranks are settled.
    """
    climb = Climb(engine.using(PLAIN).unhurried(), state, start, parameters, splits or Splits())
    device = engine.backend.device
    paces = Paces(schedule, device, engine.recorder is not None or device.type == "cuda")
    repeat = Repeated(climb, paces.now, engine.recorder)
    early: Optimised | None = None
    cut = False
    for step in range(schedule.iterations + 1):
        last = step == schedule.iterations
        paces.set(step)
        done = not last and repeat.step(schedule.iterations - step)
        if not done:
            climb.bound()
        cut = not last and engine.deadline.expired()
        if last or cut:
            break
        if looked_at(step):
            best = climb.best.clone() if early is None else early.lower
            if schedule.stop is not None and schedule.stop(step, best):
                break
            if settled is not None:
                if early is None and settled(step, best):
                    early = climb.result() if engine.backend.size == 1 else climb.result().apart()
                if engine.backend.agree(float(early is None)) == 0.0:
                    break
        if not done:
            climb.rise(paces.now)
    return early or replace(climb.result(), cut=cut)


# Numbers per row and nonlinear element: values, best ones, gradients, two moments, coefficients and planes.
_KEPT = 9


def alpha_cost(graph: Graph, index: int) -> Cost:
    """What optimising one row that starts from a node costs; its steps are not counted."""
    walk = row_cost(graph, 1, torch.float32, index)
    sizes = sum(node.size for node, _ in traverse.nonlinear(graph.nodes, last=index))
    return Cost(walk.nbytes + 4 * _KEPT * sizes, 3 * walk.flops)


# What is kept per row is divided among so many ranks, however few rows it is worth dealing for speed alone.
SHARES = 8


def alpha_hidden(
    engine: Engine,
    state: BoundState,
    schedule: Schedule,
    relevant: Relevant | None = None,
    anytime: bool = False,
    missed: list[int] | None = None,
) -> BoundState:
    """Tighten every pre-activation by optimising its own rows (layerwise), in order, on one box.

    Certified states re-evaluate the best slopes in float64 with rounding errors accounted for, and keep that value.

    Args:
        relevant: elements that matter, see :func:`verifier.bounds.relevance.relevant`; default all.
        anytime: when time runs out, the bounds of the nodes that are left stay as they are.
        missed: takes the nodes that are left then, undecided or not.

    Raises:
        DeadlineExceeded: time ran out, unless ``anytime``.
    """
    graph = engine.graph
    exact = engine.certifying().unhurried()
    nodes = preactivations(graph)
    if state.proof is not None:
        state.proof.claim(state.bounds)
    for place, index in enumerate(nodes):
        if tight_by_ibp(graph, graph.nodes[index], state.bounds):
            continue
        elements = open_elements(engine, index, state.bounds[index], relevant)
        if elements.shape[0] == 0:
            continue
        try:
            _optimise_node(engine, exact, state, index, elements, schedule)
        except DeadlineExceeded:
            if not anytime:
                raise
            if missed is not None:
                missed += nodes[place:]
            break
    return state


def _optimise_node(
    engine: Engine, exact: Engine, state: BoundState, index: int, elements: Tensor, schedule: Schedule
) -> None:
    """Optimised rows of some elements of one node, intersected into the state.

    Args:
        exact: the engine that certifies them.
    """
    graph, backend = engine.graph, engine.backend
    node = graph.nodes[index]
    positions, here = backend.local_index(index, elements)
    rows = 2 * elements.shape[0]
    low, up = backend.gather_features(index, torch.stack(state.bounds[index]))
    widths = (up - low).flatten(1)[0, elements].repeat(2)
    parts = []
    total = RowState()
    for chunk in backend.row_chunks(rows, alpha_cost(graph, index), SHARES):
        engine.deadline.check("alpha-CROWN")
        form = hidden_rows(positions, node.shape, chunk, torch.float32, here)
        values, _ = initial_parameters(graph, state.bounds, chunk.size, index + 1)
        dry = DriedUp(schedule.iterations, widths[chunk.start : chunk.stop])
        found = optimise(engine, state, {index: form}, values, schedule, settled=dry)
        lower = found.lower
        total += found.state
        if state.certified:
            form = hidden_rows(positions, node.shape, chunk, exact.dtype, here)
            planes = relaxations(graph, state.bounds, exact.dtype, found.parameters, index + 1)
            lower, walk = lower_bounds(exact, state, {index: form}, planes)
            lower = with_room(lower, walk, state.proof)
            if state.proof is not None:
                _write(state, state.proof, index, elements, chunk, lower, found.parameters)
        parts.append((chunk, lower))
    backend.usage.note_rows(total)
    tighten(state, index, positions, backend.gather_rows(rows, parts), here)


def _write(
    state: BoundState,
    proof: Section,
    index: int,
    elements: Tensor,
    chunk: Chunk,
    lower: Tensor,
    slopes: Parameters,
) -> None:
    """Have a chunk of rows (1, R) in a proof, and their bounds in the state; no other chunk rests on them."""
    rows = lower.new_full((1, 2 * elements.shape[0]), -torch.inf)
    rows[:, chunk.start : chunk.stop] = lower[:, : chunk.stop - chunk.start]
    tighten(state, index, elements, rows)
    proof.rows(index, elements, state.bounds[index], slopes, chunk.start)


def alpha_rows(engine: Engine, state: BoundState, spec: Specification, schedule: Schedule) -> Optimised:
    """alpha-CROWN bounds of specification rows on one box, float32 (certify with ``crown_rows``)."""
    graph = engine.graph
    values, _ = initial_parameters(graph, state.bounds, spec.y.shape[1], len(graph.nodes))
    return optimise(engine, state, spec.forms(engine.backend, graph.output, torch.float32), values, schedule)
