"""Root bounds of one box: IBP, CROWN, alpha-CROWN, in this order, until every case is refuted or nothing is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from verifier.bab import refine
from verifier.bab.relu_split import CaseRows
from verifier.bounds.alpha import Parameters, Schedule, alpha_hidden, alpha_rows
from verifier.bounds.crown import (
    BoundState,
    NoisyRuns,
    Specification,
    crown_hidden,
    crown_rows,
    initial_state,
    open_elements,
    preactivations,
)
from verifier.bounds.engine import PLAIN, ROUNDED_64, Engine, recorder
from verifier.bounds.ibp import may_overflow
from verifier.bounds.relevance import relevant
from verifier.bounds.rows import rows_by_intervals
from verifier.bounds.touch import touched
from verifier.bounds.walk import minimiser
from verifier.bounds.worth import CONFIRMED, Forecast
from verifier.config import Config
from verifier.core.backend import ParallelBackend
from verifier.core.claims import Claims, Covered, Semantics, real_part
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.numerics import finite_lower, proved
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.proof.writer import Proof
from verifier.solver.strategy import hidden_iterations


@dataclass
class Cut:
    """What time has cut from root bounds.

    Attributes:
        hidden: undecided hidden nodes that have interval bounds alone, as time ran out before their rows.
        slopes: hidden nodes whose slopes were not optimised for the same reason.
        rows: whether the optimisation of the property's rows was ended by the clock.
    """

    hidden: int = 0
    slopes: int = 0
    rows: bool = False

    def __bool__(self) -> bool:
        return bool(self.hidden or self.slopes or self.rows)


@dataclass
class Noted:
    """What is known of one box while its root bounds are computed, for the record of a query that ends meanwhile.

    Attributes:
        method: the method that runs.
        worst: the worst bound of an open case minus its threshold, so far; None before the first one, infinite when no
            case is open.
        listener: told of every new worst bound that is finite.
    """

    method: str = ""
    worst: float | None = None
    cut: Cut = field(default_factory=Cut)
    listener: Callable[[float], None] = lambda worst: None

    def tighter(self, worst: float) -> None:
        """A bound that a method has found."""
        self.worst = worst if self.worst is None else max(self.worst, worst)
        if math.isfinite(self.worst):
            self.listener(self.worst)


@dataclass
class Root:
    """What the root leaves.

    Attributes:
        state: bounds of the box.
        open: indices of the cases that are not refuted.
        gap: per open case its best bound minus threshold, float64.
        candidates: (n, n_in) minimisers of the open rows.
        rows: the open cases with their root slopes, for the search.
        method: the last method that ran.
        covered: what the bounds of the refuted cases hold for.
        real: among the open cases those that are refuted for the network in real arithmetic.
        cut: what time has cut.
        claims: what its bounds are made to hold for.
        steps: of the optimiser that hidden nodes are worth and that were put off (:func:`deepen`).
        advance: how far searches have come that refine its hidden bounds.
    """

    state: BoundState
    open: np.ndarray
    gap: np.ndarray
    candidates: np.ndarray
    rows: CaseRows | None
    method: str
    covered: Covered
    real: np.ndarray
    cut: Cut = field(default_factory=Cut)
    claims: Claims = field(default_factory=Claims)
    steps: int = 0
    advance: refine.Advance = field(default_factory=refine.Advance)


# Where the error of a run has a larger part in the width of hidden bounds, and these are not enough, the network is
# bounded in real arithmetic.
_NOISIEST = 0.01


@dataclass(frozen=True)
class RootContext:
    """What the root bounds of every box of a query work with.

    Attributes:
        graph: the network.
        backend: for the bounds, which all ranks compute together.
        search: the backend that will split neurons, which decides how much is worth doing here.
        limit: the query's time limit in seconds, for the strategy.
        deadline: when it expires, what is left of hidden bounds stays as it is: the root ends soon, whatever it has.
        query: when this one expires, nothing is wanted any more; default never.
        proof: where it is written down how cases are refuted.
        report: told of every method that begins.
        noted: what is known so far.
        claims: what bounds are made to hold for (default: the real network); where runs would cost much, the network in
            real arithmetic comes first.
        puts_off: leave the slopes of hidden nodes to :func:`deepen`.
    """

    graph: Graph
    backend: ParallelBackend
    search: ParallelBackend
    config: Config
    limit: float
    deadline: Deadline
    report: Callable[[str], None] = lambda method: None
    noted: Noted = field(default_factory=Noted)
    claims: Claims = field(default_factory=Claims)
    query: Deadline = field(default_factory=Deadline)
    puts_off: bool = False
    proof: Proof | None = None

    @cached_property
    def engine(self) -> Engine:
        """For bounds that hold for the claims; plain ones when proofs are not to be certified."""
        arithmetic = ROUNDED_64 if self.config.numerics.certify else PLAIN
        repeats = recorder(self.backend, self.config.bab.cuda_graphs)
        return Engine(self.graph, self.backend, self.deadline, replace(arithmetic, run=self.claims.run), repeats)


def bound_root(context: RootContext, problem: Problem, cases: np.ndarray) -> Root:
    """Bound all cases of one box.

    Args:
        cases: indices of cases that share one box.

    Raises:
        DeadlineExceeded: the query's time is over.
    """
    shared = context.backend.shared_deadline
    context = replace(context, deadline=shared(context.deadline), query=shared(context.query))
    try:
        root = _bound_root(context, problem, cases)
    except NoisyRuns:
        root = _bound_root(replace(context, claims=Claims()), problem, cases)
    root.cut = context.noted.cut
    return root


def deepen(context: RootContext, problem: Problem, root: Root, cases: np.ndarray) -> Root:
    """Root bounds from optimised slopes of hidden nodes, where these were put off.

    Args:
        cases: indices of those that are open.

    Returns:
        a root of these cases; its cover is that of the cases that it closes.

    Raises:
        DeadlineExceeded: the query's time is over.
    """
    shared = context.backend.shared_deadline
    context = replace(context, deadline=shared(context.deadline), query=shared(context.query), claims=root.claims)
    table = _RowTable(context.graph, problem, cases, root.claims, context.backend.device)
    never = torch.full((1, table.spec.y.shape[1]), -torch.inf, dtype=torch.float64, device=context.backend.device)
    state, found = _deepened(context, root.state, table, root.steps, _RowBounds(never, torch.zeros_like(never)))
    assert found.minimisers is not None
    minimisers = context.backend.gather_features(0, found.minimisers)
    return replace(table.root(state, replace(found, minimisers=minimisers), "alpha-crown"), cut=context.noted.cut)


def _deepened(
    context: RootContext, state: BoundState, table: _RowTable, steps: int, found: _RowBounds
) -> tuple[BoundState, _RowBounds]:
    """Bounds of hidden nodes from optimised slopes, and of the rows with them.

    Args:
        found: bounds of the rows so far.
    """
    engine, alpha = context.engine, context.config.bounds.alpha
    matters, missed = relevant(engine, {context.graph.output: table.spec.y}), list[int]()
    context.report("alpha-CROWN of hidden nodes")
    schedule = Schedule(steps, alpha.learning_rate, decay=alpha.decay)
    state = replace(state, bounds=dict(state.bounds))
    state = alpha_hidden(engine, state, schedule, matters, anytime=True, missed=missed)
    context.noted.cut.slopes = _undecided(engine, state, missed, matters)
    context.query.check("alpha-CROWN")
    found = _alpha(context, state, table, found)
    table.touch(engine, state)
    return state, found


def _bound_root(context: RootContext, problem: Problem, cases: np.ndarray) -> Root:
    graph, backend, config, claims = context.graph, context.backend, context.config, context.claims
    engine = context.engine
    box = _box(graph, backend, problem, int(problem.case_box[cases[0]]))
    table = _RowTable(graph, problem, cases, claims, backend.device)
    method = config.bounds.method

    context.report("IBP")
    state = initial_state(engine, box, context.proof)
    noise: list[float] | None = [] if claims.semantics is Semantics.BOTH else None
    table.covered.overflow = claims.run is not None and may_overflow(state.magnitudes, backend)
    if table.covered.overflow and claims.semantics is Semantics.BOTH:
        table.claims = Claims()
        context = replace(context, claims=Claims())
        engine = context.engine
        state = initial_state(engine, box)
    lower = rows_by_intervals(graph, backend, state, table.spec)
    table.write_intervals(state, lower)
    context.noted.tighter(table.worst(lower))
    if method == "ibp":
        table.touch(engine, state)
        return table.root(state, _RowBounds(lower, torch.zeros_like(lower)), "ibp")
    context.report("CROWN")
    rows = hidden_by_rows(config)
    matters = relevant(engine, {graph.output: table.spec.y})
    missed: list[int] = []
    state = crown_hidden(engine, state, None if rows else (), matters, noise, anytime=True, missed=missed)
    context.noted.cut.hidden = _undecided(engine, state, missed, matters)
    context.query.check("CROWN")
    lower, walk = crown_rows(engine, state, table.spec)
    table.write(state, lower, None)
    context.noted.tighter(table.worst(lower))
    found = _RowBounds(lower, walk.error)
    candidates = backend.gather_features(0, minimiser(walk, box.to(torch.float64)))
    table.touch(engine, state)
    if noise and max(noise) > _NOISIEST and not table.refuted(lower).all():
        raise NoisyRuns(max(noise))
    if method == "crown" or table.refuted(lower).all():
        return table.root(state, replace(found, minimisers=candidates.float()), "crown")

    context.report("alpha-CROWN")
    found, put_off = _alpha(context, state, table, found), 0
    if rows and not table.refuted(found.lower).all():
        steps = _hidden_steps(context, state, matters)
        if context.puts_off:
            put_off = steps
        elif steps:
            state, found = _deepened(context, state, table, steps, found)
    assert found.minimisers is not None
    found = replace(found, minimisers=backend.gather_features(0, found.minimisers))
    return replace(table.root(state, found, "alpha-crown"), steps=put_off)


def _undecided(engine: Engine, state: BoundState, nodes: list[int], matters: Mapping[int, Tensor] | None) -> int:
    """How many of some hidden nodes have elements that are undecided and matter."""
    return sum(open_elements(engine, i, state.bounds[i], matters).shape[0] > 0 for i in nodes)


def hidden_by_rows(config: Config) -> bool:
    """Whether hidden nodes are bounded by CROWN rows and not by interval arithmetic alone."""
    return config.parallel.backend != "tp" or config.parallel.tp_intermediate == "crown"


def _hidden_steps(context: RootContext, state: BoundState, matters: Mapping[int, Tensor] | None) -> int:
    """Optimiser steps that the hidden nodes are worth; none where the neuron search tightens them better."""
    graph, engine, config = context.graph, context.engine, context.config
    count = {i: 2 * open_elements(engine, i, state.bounds[i], matters).shape[0] for i in preactivations(graph)}
    steps = hidden_iterations(graph.whole, count, context.limit, engine.backend.device.type, config)
    searched = config.bab.enabled and config.bab.max_domains is None and config.bab.branching != "input"
    free = config.bounds.alpha.intermediate_iterations == "auto"
    alone = context.search.size == 1
    refined = searched and free and alone and refine.affordable(graph, context.search, state, context.limit)
    return 0 if refined else steps


@dataclass(frozen=True)
class _RowBounds:
    """Bounds of the rows of one box. S rows.

    Attributes:
        lower: (1, S).
        error: of a run, which ``lower`` allows for.
        slopes: of the relaxations, by node, when they were optimised.
        minimisers: (1, S, *input shape) of the relaxed rows.
    """

    lower: Tensor
    error: Tensor
    slopes: Parameters | None = None
    minimisers: Tensor | None = None


def _alpha(context: RootContext, state: BoundState, table: _RowTable, before: _RowBounds) -> _RowBounds:
    """Optimise all rows of the table and certify the best slopes; keeps the tighter of old and new bounds.

    The minimisers are this rank's part of them.
    """
    engine, alpha = context.engine, context.config.bounds.alpha
    schedule = Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay, stop=_Enough(table, alpha.iterations))
    found = alpha_rows(engine, state, table.spec, schedule)
    engine.backend.usage.note_rows(found.state)
    context.noted.cut.rows |= found.cut
    sure, lower, error = found.lower.double(), before.lower.double(), before.error
    if state.certified:
        sure, walk = crown_rows(engine, state, table.spec, found.parameters)
        table.write(state, sure, found.parameters)
        error = torch.where(sure > lower, walk.error, error.double())
    best = torch.fmax(lower, sure)
    context.noted.tighter(table.worst(best))
    return _RowBounds(best, error, found.parameters, found.candidate)


# What slopes can still gain does not matter where it is less than the first share of what they have gained, or the
# second share of the distance to a threshold.
_OF_GAIN, _OF_GAP = 1e-4, 0.02


class _Enough:
    """Ends an optimisation of rows: all cases are refuted, or what the rows of the open ones can still gain is next to
    nothing, or so far from closing any case that a search has to do it anyway.

    Args:
        steps: of the optimisation.
    """

    def __init__(self, table: _RowTable, steps: int) -> None:
        self.table, self.forecast = table, Forecast(steps)
        self.first: Tensor | None = None
        self.confirmed = 0

    def __call__(self, step: int, best: Tensor) -> bool:
        open_ = self.table.open_rows(best.double())
        if not open_.any():
            return True
        lower = best[0].double().cpu()
        self.first = lower if self.first is None else self.first
        self.forecast.note(step, lower)
        useless = torch.fmax(_OF_GAIN * (lower - self.first), _OF_GAP * (self.table.thresholds.cpu() - lower))
        left = self.forecast.linear if self.forecast.series is None else self.forecast.series
        again = left is not None and self._none(left, useless, open_)
        self.confirmed = self.confirmed + 1 if again else 0
        return self.confirmed >= CONFIRMED

    @staticmethod
    def _none(left: Tensor, useless: Tensor, open_: Tensor) -> bool:
        """Whether what is left is of no use to any of some rows; rows without a bound may still get one."""
        return bool((((left <= useless) & torch.isfinite(useless)) | ~open_).all())


def _box(graph: Graph, backend: ParallelBackend, problem: Problem, index: int) -> Interval:
    """This rank's part of a box, (1, *input_shape)."""
    shape = (1, *graph.whole.input_shape)
    low, up = (torch.from_numpy(b[index]).reshape(shape).to(backend.device) for b in (problem.lower, problem.upper))
    return Interval(backend.local_part(0, low), backend.local_part(0, up))


class _RowTable:
    """The distinct rows of the cases of one box, as a specification, and the way back from rows to cases."""

    def __init__(self, graph: Graph, problem: Problem, cases: np.ndarray, claims: Claims, device: torch.device) -> None:
        self.cases, self.claims = cases, claims
        self.covered = Covered()
        self.device = device
        self.n_in = problem.n_in
        whole = graph.whole
        rows = problem.case_rows[cases]
        if rows.shape[1] == 0:  # no case has a row: each is its whole box
            rows = np.full((len(cases), 1), -1, dtype=np.int64)
        used, inverse = np.unique(rows, return_inverse=True)
        self.case_rows = inverse.reshape(rows.shape)
        # Padding (-1) is a row that is never refuted: 0 <= 1 always holds.
        real = used >= 0
        y, d, strict = np.zeros((len(used), problem.n_out)), np.ones(len(used)), np.zeros(len(used), dtype=bool)
        y[real], d[real] = problem.row_y[used[real]], problem.row_d[used[real]]
        if problem.row_strict is not None:
            strict[real] = problem.row_strict[used[real]]
        x = None
        if problem.row_x is not None:
            x = np.zeros((len(used), problem.n_in))
            x[real] = problem.row_x[used[real]]
        self.spec = Specification(
            torch.from_numpy(y).reshape(1, len(used), *whole.output_shape).to(device),
            None if x is None else torch.from_numpy(x).reshape(1, len(used), *whole.input_shape).to(device),
        )
        self.thresholds = torch.from_numpy(d).to(device)
        self.strict = torch.from_numpy(strict).to(device) if strict.any() else None
        self.touched = np.zeros(len(cases), dtype=bool)
        self.written = np.zeros(len(cases), dtype=bool)

    def refuted(self, lower: Tensor) -> np.ndarray:
        """(N,) bool: cases with a refuted row, or with rows that only touch their thresholds (:meth:`touch`)."""
        rows = proved(lower[0].double(), self.thresholds, self.strict).cpu().numpy()
        touched = self.touched if self.claims.semantics is not Semantics.FLOAT32 else False
        return np.any(rows[self.case_rows], axis=1) | touched

    def write_intervals(self, state: BoundState, lower: Tensor) -> None:
        """Have the cases in the proof that the intervals of the outputs refute."""
        new, _ = self._unwritten(state, lower)
        if state.proof is not None and new.any():
            state.proof.claim(state.bounds)
            state.proof.by_interval(self.cases[new])

    def write(self, state: BoundState, lower: Tensor, slopes: Parameters | None) -> None:
        """Have the cases in the proof that backward passes refute, with their bounds (1, S) and slopes."""
        new, place = self._unwritten(state, lower)
        if state.proof is not None and new.any():
            state.proof.claim(state.bounds)
            rows = self.case_rows[new, place[new]]
            state.proof.at_root(self.cases[new], place[new], slopes, rows)

    def _unwritten(self, state: BoundState, lower: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool: refuted cases that are not in the proof yet; and (N,), by which of its rows each is refuted."""
        rows = proved(lower[0].double(), self.thresholds, self.strict).cpu().numpy()[self.case_rows]
        new = rows.any(1) & ~self.written
        if state.proof is not None:
            self.written |= new
        return new, rows.argmax(1)

    def open_rows(self, lower: Tensor) -> Tensor:
        """(S,) bool on the CPU: rows of cases that are not refuted."""
        rows = torch.zeros(lower.shape[1], dtype=torch.bool)
        rows[torch.from_numpy(self.case_rows[~self.refuted(lower)].reshape(-1))] = True
        return rows

    def worst(self, lower: Tensor) -> float:
        """Of the open cases the least distance of a best bound (1, S) to its threshold; infinite when none is open."""
        gap = finite_lower(lower[0].double() - self.thresholds).cpu().numpy()
        open_ = gap[self.case_rows[~self.refuted(lower)]]
        return float(open_.max(1).min()) if open_.size else math.inf

    def touch(self, engine: Engine, state: BoundState) -> None:
        """Note the cases that exact bounds of their strict rows refute."""
        if self.strict is None:
            return
        pick = torch.from_numpy(self.case_rows).to(self.device)
        found = touched(engine, state.bounds, self._picked(pick), self.thresholds[pick], self.strict[pick])
        self.touched |= found.cpu().numpy()

    def _picked(self, rows: Tensor) -> Specification:
        """Rows by case, (N, S, ...)."""
        return Specification(self.spec.y[0][rows], None if self.spec.x is None else self.spec.x[0][rows])

    def root(self, state: BoundState, found: _RowBounds, method: str) -> Root:
        lower, error = found.lower, found.error
        gap = (lower[0].double() - self.thresholds).cpu().numpy()
        keep = ~self.refuted(lower)
        self._note(lower, error, ~keep)
        real = keep & self.refuted(real_part(lower.double(), error)) & (self.claims.semantics is Semantics.BOTH)
        index = self.case_rows[keep]
        points = np.zeros((0, self.n_in), np.float32)
        if found.minimisers is not None and keep.any():
            points = found.minimisers[0].reshape(found.minimisers.shape[1], -1).cpu().numpy()[np.unique(index)]
        rows = None
        if found.slopes is not None and keep.any():
            pick = torch.from_numpy(index).to(self.device)
            strict = None if self.strict is None else self.strict[pick]
            slopes = {i: {k: v[0][pick] for k, v in group.items()} for i, group in found.slopes.items()}
            numbers = torch.from_numpy(self.cases[keep]).to(self.device)
            rows = CaseRows(self._picked(pick), self.thresholds[pick], slopes, strict, numbers)
        worst = gap[index].max(1) if keep.any() else np.zeros(0)
        closed, kept = self.covered, self.cases[keep]
        return Root(state, kept, worst, points, rows, method, closed, self.cases[real], claims=self.claims)

    def _note(self, lower: Tensor, error: Tensor, closed: np.ndarray) -> None:
        """What the bounds of some cases (N,) cover."""
        pick = torch.from_numpy(self.case_rows[closed]).to(self.device)
        gap, best = (lower[0].double() - self.thresholds)[pick].max(1)
        errors = error.double().expand(1, lower.shape[1])[0][pick].gather(1, best[:, None])[:, 0]
        rests_on_real = closed if self.claims.run is None else closed & self.touched
        self.covered.note(gap, errors, int(rests_on_real.sum()))
