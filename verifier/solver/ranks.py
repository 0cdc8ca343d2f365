"""How the ranks of a query run it together: rank 0 leads, broadcasts every phase, and runs it like everybody else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.memory import out_of_memory
from verifier.core.plugins import blamed
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.parallel.world import World
from verifier.solver.phases import Phase, RankState
from verifier.solver.setup import cpu_threads, set_up, structure

T = TypeVar("T")


@dataclass(frozen=True)
class _Query:
    """The first message of rank 0.

    Attributes:
        graph: without its parameters.
    """

    graph: Graph
    problem: Problem | None
    config: Config


@dataclass(frozen=True)
class _Run:
    """Run a phase, with so many seconds left."""

    phase: Phase[object]
    seconds: float


@dataclass(frozen=True)
class _End:
    """The query is over, with this result."""

    result: object


def broadcast_query(world: World, graph: Graph, problem: Problem | None, config: Config) -> None:
    """Rank 0 tells the others what the query is."""
    world.everyone.broadcast_object(_Query(structure(graph), problem, config))


def run_on_all(state: RankState, phase: Phase[T]) -> T:
    """Rank 0 has everyone run a phase, and runs it too."""
    state.world.everyone.broadcast_object(_Run(phase, state.deadline.remaining()))
    return phase.run(state)


def broadcast_end(world: World, result: object) -> None:
    """Rank 0 lets the others go, with what came out."""
    world.everyone.broadcast_object(_End(result))


def rank_loop(world: World, kind: type[T]) -> T:
    """The life of a rank other than 0: it runs the phases that rank 0 broadcasts, until that ends the query.

    On a failure the others are told first.

    Args:
        kind: of the result.

    Returns:
        what rank 0 says came out.
    """
    try:
        result = _rank_loop(world)
    except Exception as error:
        named = blamed(error)
        first = (str(named).strip().splitlines() or [""])[0]
        if isinstance(error, MemoryExceeded) or out_of_memory(error):
            world.heartbeat.report(first, out_of_memory=True)
        else:
            world.heartbeat.report(f"{type(named).__name__}: {first}")
        raise
    if not isinstance(result, kind):
        raise TypeError(f"rank 0 ended with a {type(result).__name__}, expected was a {kind.__name__}")
    return result


def _rank_loop(world: World) -> object:
    query = world.everyone.broadcast_object(None)
    if isinstance(query, _End):  # rank 0 needed nobody
        return query.result
    if not isinstance(query, _Query):
        raise _unexpected(query)
    with cpu_threads(query.graph, query.config, world.local_size):
        try:
            setup = set_up(query.graph, query.config, world)
        except MemoryExceeded:  # for every rank alike; rank 0 says so
            setup = None
        state = None if setup is None else RankState(query.problem, query.config, world, setup)
        while True:
            message = world.everyone.broadcast_object(None)
            if isinstance(message, _End):
                return message.result
            if state is None or not isinstance(message, _Run):
                raise _unexpected(message)
            state.deadline = Deadline(message.seconds)
            world.heartbeat.phase(message.phase.name)
            try:
                message.phase.run(state)
            except DeadlineExceeded:
                continue  # agreed on; rank 0 knows what that means


def _unexpected(message: object) -> RuntimeError:
    return RuntimeError(f"rank 0 sent a {type(message).__name__} out of turn")
