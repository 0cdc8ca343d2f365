"""What all ranks of a query do together: one request per phase, with what it needs and how it is run.

A request travels from rank 0 to the others (:mod:`verifier.solver.ranks`), and every rank runs it on its own state.
What a phase decides on (bounds, open domains) is equal on all ranks or is agreed on inside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch

from verifier.bab import input_split, refine, relu_split, value_split
from verifier.bab.bounder import CaseRows
from verifier.bab.context import Hunt, SearchContext
from verifier.bounds.alpha import Schedule
from verifier.bounds.api import Method, NetworkBounds, Wanted, compute_graph_bounds
from verifier.bounds.engine import Engine
from verifier.config import BabConfig, Config
from verifier.core.claims import Claims
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.inventory import Inventory, PeakKind, process_peak
from verifier.core.problem import Problem
from verifier.core.progress import Progress, SilentProgress
from verifier.core.result import Witness
from verifier.core.tracker import Peak, measured_peak
from verifier.parallel.world import World
from verifier.proof.writer import Proof
from verifier.solver.root import Noted, Root, RootContext, bound_root, deepen, hidden_by_rows
from verifier.solver.setup import Setup

T_co = TypeVar("T_co", covariant=True)

Accept = Callable[[np.ndarray], Witness | None]


def _refuse(x: np.ndarray) -> Witness | None:
    """Only rank 0 has the reference network; a search calls this nowhere else."""
    raise RuntimeError("a rank without the reference network cannot judge candidates")


@dataclass
class RankState:
    """One rank's part of a query.

    Attributes:
        problem: ``None`` when only bounds are wanted.
        setup: the network on this rank's device.
        accept: replays a candidate; rank 0 alone can.
        claims: what bounds are made to hold for.
        roots: the root bounds of the boxes, in the order in which they were computed.
        proof: where the proof is written down; the only rank's.
        weak: what searches have closed for the network in real arithmetic alone; None for one of which not all is here.
        hunt: looks for counterexamples between searches, where this rank is alone.
    """

    problem: Problem | None
    config: Config
    world: World
    setup: Setup
    deadline: Deadline = field(default_factory=Deadline)
    progress: Progress = field(default_factory=SilentProgress)
    accept: Accept = _refuse
    claims: Claims = field(default_factory=Claims)
    roots: list[Root] = field(default_factory=list)
    weak: list[relu_split.WeakDomains | None] = field(default_factory=list)
    noted: Noted | None = None
    hunt: Hunt | None = None
    proof: Proof | None = None

    @property
    def asked(self) -> Problem:
        """The problem of a query that has one."""
        assert self.problem is not None
        return self.problem

    def search_context(self, bab: BabConfig, deadline: Deadline) -> SearchContext:
        setup = self.setup
        return SearchContext(
            graph=setup.graph,
            backend=setup.search,
            config=bab,
            deadline=deadline,
            accept=self.accept,
            progress=self.progress,
            claims=self.claims,
            certify=self.config.numerics.certify,
            team=setup.peers,
            memory_limit=setup.pool_bytes,
            hunt=self.hunt,
            proof=self.proof,
        )


class Phase(ABC, Generic[T_co]):
    """A request to run a phase.

    Attributes:
        name: for messages about a rank that is lost in it.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, state: RankState) -> T_co:
        """This rank's part; the result is of use on rank 0."""


@dataclass(frozen=True)
class Begin(Phase[None]):
    """Forget the roots; from now on bounds are to hold for this."""

    name = "begin"
    claims: Claims

    def run(self, state: RankState) -> None:
        state.claims, state.roots, state.weak = self.claims, [], []


@dataclass(frozen=True, eq=False)
class BoundRoot(Phase[Root]):
    """Root bounds of the cases of one box.

    Attributes:
        cases: their indices.
        limit: the query's time limit in seconds.
        seconds: after which hidden bounds stay as they are.
        puts_off: leave the slopes of hidden nodes to :class:`DeepenRoot`.
    """

    name = "bound"
    cases: np.ndarray
    limit: float
    seconds: float = math.inf
    puts_off: bool = False

    def run(self, state: RankState) -> Root:
        context = replace(_root_context(state, self.limit, self.seconds), puts_off=self.puts_off)
        root = state.setup.retry(partial(bound_root, context, state.asked, self.cases))
        state.roots.append(root)
        state.noted = None
        return root


@dataclass(frozen=True, eq=False)
class DeepenRoot(Phase[Root]):
    """Optimise the slopes of hidden nodes that a root has put off.

    Attributes:
        root: which of the roots is meant.
        cases, limit, seconds: as those of :class:`BoundRoot`.
    """

    name = "deepen"
    root: int
    cases: np.ndarray
    limit: float
    seconds: float = math.inf

    def run(self, state: RankState) -> Root:
        context, found = _root_context(state, self.limit, self.seconds), state.roots[self.root]
        root = state.setup.retry(partial(deepen, context, state.asked, found, self.cases))
        state.roots[self.root] = root
        state.noted = None
        return root


def _root_context(state: RankState, limit: float, seconds: float) -> RootContext:
    """What root bounds are computed with; from now on they are noted for the record."""
    setup, noted = state.setup, Noted(listener=lambda worst: state.progress.update(worst=worst))
    state.noted = noted

    def report(method: str) -> None:
        noted.method = method
        state.progress.update(step=method)

    return RootContext(
        graph=setup.graph,
        backend=setup.backend,
        search=setup.search,
        config=state.config,
        limit=limit,
        deadline=state.deadline.sub(seconds),
        report=report,
        noted=noted,
        claims=state.claims,
        query=state.deadline,
        proof=state.proof,
    )


@dataclass(frozen=True)
class BoundsReport:
    """Bounds of a network and what they cost every rank.

    Attributes:
        output: name of the output node.
        memory: of every rank.
    """

    bounds: NetworkBounds
    output: str
    device: str
    memory: list[Inventory]


@dataclass(frozen=True, eq=False)
class BoundNetwork(Phase[BoundsReport]):
    """Bounds of all outputs over one box.

    Attributes:
        lower, upper: (n_in,).
        intermediate: bounds of all pre-activations too.
        slopes: the optimised slopes of the output rows too.
        plain: the values before certification too.
        measured: watch how much memory tensors take at most, which costs time on a CPU; otherwise it is 0.
    """

    name = "bounds"
    lower: np.ndarray
    upper: np.ndarray
    method: Method
    intermediate: bool = False
    slopes: bool = False
    plain: bool = True
    measured: bool = True

    def run(self, state: RankState) -> BoundsReport:
        setup = state.setup
        backend = setup.backend
        if not self.measured:
            found, peak = setup.retry(partial(self._bounds, state)), Peak()
        else:
            with measured_peak(backend.device, backend.weights.held()) as peak:
                found = setup.retry(partial(self._bounds, state))
        mine = Inventory(backend.rank, backend.weights.resident_bytes(), backend.usage, peak.bytes, peak.kind)
        return BoundsReport(
            found,
            setup.graph.nodes[setup.graph.output].name,
            backend.device.type,
            state.world.everyone.objects(mine),
        )

    def _bounds(self, state: RankState) -> NetworkBounds:
        setup, alpha = state.setup, state.config.bounds.alpha
        hidden = alpha.iterations if alpha.intermediate_iterations == "auto" else alpha.intermediate_iterations
        certify = state.config.numerics.certify
        box = Interval(*(torch.from_numpy(np.array(b, dtype=np.float32).reshape(-1)) for b in (self.lower, self.upper)))
        wanted = Wanted(
            method=self.method,
            intermediate=self.intermediate,
            hidden=Schedule(hidden, alpha.learning_rate, decay=alpha.decay),
            final=Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay),
            hidden_rows=hidden_by_rows(state.config),
            plain=self.plain or not certify,
            slopes=self.slopes,
            certified=certify,
        )
        return compute_graph_bounds(Engine(setup.graph, setup.backend), box, wanted)


@dataclass(frozen=True, eq=False)
class SplitInputs(Phase[input_split.InputSplitResult]):
    """Branch and bound on input boxes.

    Attributes:
        cases: indices of the open cases.
        seconds: how long at most.
    """

    name = "split_inputs"
    cases: np.ndarray
    bab: BabConfig
    seconds: float

    def run(self, state: RankState) -> input_split.InputSplitResult:
        context = state.search_context(self.bab, state.deadline.sub(self.seconds))
        return input_split.search(context, state.asked, self.cases)


def splits_values(state: RankState) -> bool:
    """Whether a search of neurons splits the values that all nonlinearities read, and not ReLUs alone."""
    setup = state.setup
    return state.config.bab.value_splits and value_split.applies(setup.graph, setup.search)


@dataclass(frozen=True, eq=False)
class SplitNeurons(Phase[relu_split.SearchResult]):
    """Branch and bound on splits of ReLUs, or of values, of one box.

    Attributes:
        root: which of the roots is meant.
        cases: indices of its cases that are still open.
        seconds: how long at most; default until the deadline.
    """

    name = "split_neurons"
    root: int
    cases: np.ndarray
    seconds: float = math.inf

    def run(self, state: RankState) -> relu_split.SearchResult:
        found, rows, context = _search_of(state, self.root, self.cases, self.seconds)
        if splits_values(state):
            ended = value_split.search(context, found.state, rows)
        else:
            ended = refine.search(context, found.state, rows, found.advance)
        _keep_weak(state, ended)
        return ended


# Domains of a look at splits of values.
_LOOK_DOMAINS = 64


@dataclass(frozen=True, eq=False)
class LookAtNeurons(Phase[relu_split.SearchResult | None]):
    """The beginning of :class:`SplitNeurons`, for what is closed soon; None where nothing is that short.

    Attributes:
        root, cases, seconds: as those of :class:`SplitNeurons`.
    """

    name = "look_at_neurons"
    root: int
    cases: np.ndarray
    seconds: float = math.inf

    def run(self, state: RankState) -> relu_split.SearchResult | None:
        found, rows, context = _search_of(state, self.root, self.cases, self.seconds)
        if splits_values(state):
            if context.config.max_domains is not None:  # the limit is for one search
                return None
            context = replace(context, config=context.config.model_copy(update={"max_domains": _LOOK_DOMAINS}))
            ended = value_split.search(context, found.state, rows)
        else:
            ended = refine.look(context, found.state, rows, found.advance)
        if ended is not None:
            _keep_weak(state, ended)
        return ended


def _search_of(state: RankState, root: int, cases: np.ndarray, seconds: float) -> tuple[Root, CaseRows, SearchContext]:
    """What a search of neurons begins with: a root, the rows of its open cases, and the rest."""
    found = state.roots[root]
    assert found.rows is not None
    still = np.flatnonzero(np.isin(found.open, cases))
    rows = found.rows if still.size == found.open.size else found.rows.select(torch.from_numpy(still))
    return found, rows, state.search_context(state.config.bab, state.deadline.sub(seconds))


def _keep_weak(state: RankState, ended: relu_split.SearchResult) -> None:
    """What a proof has closed for the network in real arithmetic alone, if anything."""
    if not ended.open and ended.covered.weak:
        state.weak.append(ended.weak)


@dataclass(frozen=True)
class CoverRuns(Phase[relu_split.SearchResult]):
    """Go on with what searches have closed for the network in real arithmetic alone, until it is closed for runs too.

    Attributes:
        number: of the search.
    """

    name = "cover_runs"
    number: int

    def run(self, state: RankState) -> relu_split.SearchResult:
        weak = state.weak[self.number]
        assert weak is not None
        return relu_split.go_on(state.search_context(state.config.bab, state.deadline), weak)


@dataclass(frozen=True)
class Memory(Phase[list[Inventory]]):
    """What the query took of every rank. On a CPU the peak is the process's: counting tensors would slow it."""

    name = "memory"

    def run(self, state: RankState) -> list[Inventory]:
        backend, search = state.setup.backend, state.setup.search
        kind: PeakKind
        if backend.device.type == "cuda":
            peak, kind = int(torch.cuda.max_memory_allocated(backend.device)), "allocator"
        else:
            peak, kind = process_peak(), "rss"
        usage = backend.usage.merged(search.usage)
        mine = Inventory(backend.rank, backend.weights.resident_bytes(), usage, peak, kind)
        return state.world.everyone.objects(mine)
