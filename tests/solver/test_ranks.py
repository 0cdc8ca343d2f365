"""What a rank other than the first does with what rank 0 broadcasts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.support.planted import planted
from verifier.config import Config
from verifier.core.claims import Claims, Semantics
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.result import Result, Verdict
from verifier.frontend.network import from_module
from verifier.graph.graph import Graph
from verifier.parallel.group import Solo
from verifier.parallel.heartbeat import NoHeartbeat
from verifier.parallel.world import World
from verifier.solver import ranks
from verifier.solver.phases import Begin, Phase, RankState
from verifier.solver.ranks import broadcast_end, broadcast_query, rank_loop, run_on_all
from verifier.solver.setup import set_up


class Channel(Solo):
    """One rank that hears what it was told before."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        if value is None and self.told:
            return self.told.pop(0)
        self.told.append(value)
        return value


@dataclass
class Heard(NoHeartbeat):
    phases: list[str] = field(default_factory=list)
    reports: list[tuple[str, bool]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def report(self, message: str, out_of_memory: bool = False) -> None:
        self.reports.append((message, out_of_memory))


@dataclass(frozen=True)
class Raise(Phase[None]):
    name = "raise"
    error: Callable[[], Exception]

    def run(self, state: RankState) -> None:
        raise self.error()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    group = Channel()
    # Weights of one rank do not travel.
    monkeypatch.setattr(ranks, "set_up", lambda graph, config, world: set_up(graph, config))
    monkeypatch.setattr(ranks, "structure", lambda graph: graph)
    return World(group, torch.device("cpu"), Heard(), lambda groups: group)


@pytest.fixture
def graph() -> Graph:
    case = planted("mlp", 1, sat=False)
    return from_module(case.network, input_shape=(1, *case.lower.shape)).graph


def leader(world: World, graph: Graph) -> RankState:
    broadcast_query(world, graph, None, Config())
    return RankState(None, Config(), world, set_up(graph, Config()), Deadline(5.0))


def test_phases_are_run_until_the_end(world: World, graph: Graph) -> None:
    state = leader(world, graph)
    run_on_all(state, Begin(Claims(Semantics.FLOAT32)))
    for error in (DeadlineExceeded("late"), None):
        if error is not None:
            with pytest.raises(DeadlineExceeded):
                run_on_all(state, Raise(lambda: DeadlineExceeded("late")))
    broadcast_end(world, Result(Verdict.UNSAT, "proved"))
    assert state.claims.semantics is Semantics.FLOAT32
    assert rank_loop(world, Result).reason == "proved"
    assert world.heartbeat.phases == ["begin", "raise"] and not world.heartbeat.reports  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "report"),
    [
        (MemoryExceeded("none left"), ("none left", True)),
        (RuntimeError("CUDA out of memory.\nTried"), ("CUDA out of memory.", True)),
        (ZeroDivisionError("planted"), ("ZeroDivisionError: planted", False)),
    ],
)
def test_a_failure_is_told(world: World, graph: Graph, error: Exception, report: tuple[str, bool]) -> None:
    with pytest.raises(type(error)):
        run_on_all(leader(world, graph), Raise(lambda: error))
    with pytest.raises(type(error)):
        rank_loop(world, Result)
    assert world.heartbeat.reports == [report]  # type: ignore[attr-defined]


def test_without_memory_for_the_network_only_the_end_comes(
    world: World, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise MemoryExceeded("too small")

    monkeypatch.setattr(ranks, "set_up", fails)
    broadcast_query(world, graph, None, Config())
    broadcast_end(world, Result(Verdict.UNKNOWN, "out of memory"))
    assert rank_loop(world, Result).reason == "out of memory"


def test_a_query_that_needs_nobody_ends_at_once(world: World) -> None:
    broadcast_end(world, Result(Verdict.UNSAT, "no case is left"))
    assert rank_loop(world, Result).reason == "no case is left"


def test_what_comes_out_of_turn_is_an_error(world: World, graph: Graph) -> None:
    world.everyone.broadcast_object(3)
    with pytest.raises(RuntimeError, match="rank 0 sent a int out of turn"):
        rank_loop(world, Result)
    leader(world, graph)
    world.everyone.broadcast_object("bound")
    with pytest.raises(RuntimeError, match="rank 0 sent a str out of turn"):
        rank_loop(world, Result)
    leader(world, graph)
    broadcast_end(world, "unsat")
    with pytest.raises(TypeError, match="ended with a str, expected was a Result"):
        rank_loop(world, Result)
