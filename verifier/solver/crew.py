"""What all ranks do together. Rank 0 runs the query; here are the phases that the others take part in.

A phase is a method with the same arguments on every rank. Rank 0 announces it and then runs it like everybody else;
what it decides on (bounds, open domains) is equal on all ranks or is agreed on inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from verifier.bab import input_split, refine, relu_split
from verifier.bab.context import SearchContext
from verifier.bounds.alpha import Schedule
from verifier.bounds.api import Method, NetworkBounds, compute_graph_bounds
from verifier.config import BabConfig, Config
from verifier.core.claims import Claims
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.inventory import Inventory, process_peak
from verifier.core.memory import out_of_memory
from verifier.core.problem import Problem
from verifier.core.progress import Progress, SilentProgress
from verifier.core.result import Witness
from verifier.core.tracker import measured_peak
from verifier.graph.graph import Graph
from verifier.parallel.world import World
from verifier.solver.place import Placed, cpu_threads, place, structure
from verifier.solver.root import Root, bound_root, hidden_by_rows

Accept = Callable[[np.ndarray], Witness | None]


@dataclass(frozen=True)
class BoundsOfAll:
    """Bounds of a network and what they cost every rank.

    Attributes:
        output: name of the output node.
        memory: bytes by kind, of every rank.
    """

    bounds: NetworkBounds
    output: str
    device: str
    memory: list[dict[str, Any]]


_END = "end"


class Crew:
    """One rank's part of a query.

    Args:
        graph: with parameters on rank 0.
        accept: replays a candidate; used on rank 0 alone.
    """

    def __init__(
        self,
        graph: Graph,
        problem: Problem | None,
        config: Config,
        world: World,
        deadline: Deadline,
        progress: Progress,
        accept: Accept | None = None,
    ) -> None:
        self._problem, self.config, self.world = problem, config, world
        self.deadline, self.progress = deadline, progress
        self._replay = accept
        self.roots: list[Root] = []
        self.claims = Claims()
        self.placed: Placed = place(graph, config, world)

    @property
    def problem(self) -> Problem:
        assert self._problem is not None
        return self._problem

    # -- phases, on every rank ----------------------------------------------------------------------------------------

    def begin(self, claims: Claims) -> None:
        """Forget the roots; from now on bounds are to hold for this."""
        self.claims, self.roots = claims, []

    def bound(self, cases: np.ndarray, limit: float) -> Root:
        """Root bounds of the cases of one box."""
        placed = self.placed
        root = placed.retry(
            partial(
                bound_root,
                placed.graph,
                placed.backend,
                placed.search,
                self.problem,
                cases,
                self.config,
                limit,
                placed.backend.together(self.deadline),
                lambda name: self.progress.update(step=name),
                self.claims,
            )
        )
        self.roots.append(root)
        return root

    def bounds(
        self, lower: np.ndarray, upper: np.ndarray, method: Method, intermediate: bool, slopes: bool
    ) -> BoundsOfAll:
        """Bounds of all outputs, and of all pre-activations when ``intermediate``, over one box (n_in,)."""
        placed, alpha = self.placed, self.config.bounds.alpha
        hidden = alpha.iterations if alpha.intermediate_iterations == "auto" else alpha.intermediate_iterations

        def work() -> NetworkBounds:
            return compute_graph_bounds(
                placed.graph,
                placed.backend,
                torch.from_numpy(np.array(lower, dtype=np.float32).reshape(-1)),
                torch.from_numpy(np.array(upper, dtype=np.float32).reshape(-1)),
                method,
                intermediate,
                Schedule(hidden, alpha.learning_rate, decay=alpha.decay),
                Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay),
                slopes=slopes,
                certify=self.config.numerics.certify,
                hidden_rows=hidden_by_rows(self.config),
            )

        backend = placed.backend
        with measured_peak(backend.device, backend.weights.held()) as peak:
            found = placed.retry(work)
        mine = Inventory(backend.rank, backend.weights.resident_bytes(), backend.usage, peak.bytes, peak.kind)
        return BoundsOfAll(
            found,
            placed.graph.nodes[placed.graph.output].name,
            backend.device.type,
            self.world.everyone.objects(mine.entry()),
        )

    def split_inputs(self, cases: np.ndarray, bab: BabConfig, seconds: float) -> input_split.InputSplitResult:
        """Branch and bound on input boxes."""
        return input_split.search(self._context(bab, self.deadline.sub(seconds)), self.problem, cases)

    def split_neurons(self, root: int) -> relu_split.SearchResult:
        """Branch and bound on ReLU splits of one box."""
        found = self.roots[root]
        assert found.rows is not None
        return refine.search(self._context(self.config.bab, self.deadline), found.state, found.rows)

    def _context(self, bab: BabConfig, deadline: Deadline) -> SearchContext:
        placed = self.placed
        return SearchContext(
            placed.graph,
            placed.search,
            bab,
            deadline,
            self._accept,
            self.progress,
            self.claims,
            self.config.numerics.certify,
            placed.team,
            placed.pool_bytes,
        )

    def memory(self) -> list[dict[str, Any]]:
        """What the query took of every rank. On a CPU the peak is the process's: counting tensors would slow it."""
        backend, search = self.placed.backend, self.placed.search
        if backend.device.type == "cuda":
            peak, kind = int(torch.cuda.max_memory_allocated(backend.device)), "allocator"
        else:
            peak, kind = process_peak(), "rss"
        usage = backend.usage.merged(search.usage)
        mine = Inventory(backend.rank, backend.weights.resident_bytes(), usage, peak, kind)  # type: ignore[arg-type]
        return self.world.everyone.objects(mine.entry())

    def _accept(self, x: np.ndarray) -> Witness | None:
        """Only rank 0 has the reference network; a search calls this nowhere else."""
        assert self._replay is not None
        return self._replay(x)

    # -- leading and following ----------------------------------------------------------------------------------------

    def together(self, phase: str, **arguments: Any) -> Any:
        """Rank 0: have everyone run a phase, and run it too."""
        self.world.everyone.share((phase, self.deadline.remaining(), arguments))
        return getattr(self, phase)(**arguments)

    def follow(self) -> Any:
        """Other ranks: run the phases that rank 0 announces, until it ends; what came out."""
        while True:
            phase, seconds, arguments = self.world.everyone.share(None)
            if phase == _END:
                return arguments
            self.deadline = Deadline(seconds)
            self.world.heart.phase(phase)
            try:
                getattr(self, phase)(**arguments)
            except DeadlineExceeded:
                continue  # agreed on; rank 0 knows what that means


def share_query(world: World, graph: Graph, problem: Problem | None, config: Config) -> None:
    """Rank 0 tells the others what the query is."""
    world.everyone.share((structure(graph), problem, config))


def dismiss(world: World, result: Any) -> None:
    """Rank 0 lets the others go, with what came out."""
    world.everyone.share((_END, 0.0, result))


def follow(world: World) -> Any:
    """The life of a rank other than 0: what rank 0 says came out. On a failure the others are told first."""
    try:
        return _follow(world)
    except Exception as error:
        memory = isinstance(error, MemoryExceeded) or out_of_memory(error)
        first = (str(error).strip().splitlines() or [""])[0]
        kind = type(error).__name__
        world.heart.report("memory" if memory else kind, first if memory else f"{kind}: {first}")
        raise


def _follow(world: World) -> Any:
    graph, problem, config = world.everyone.share(None)
    with cpu_threads(graph, config, world.local_size):
        try:
            crew = Crew(graph, problem, config, world, Deadline(), SilentProgress())
        except MemoryExceeded:  # for every rank alike; rank 0 says so
            return world.everyone.share(None)[2]
        return crew.follow()
