"""Memory that runs out in the middle of a round: what was done is undone, and batches become as small as they must."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.bab.test_exchange import Game, Question, Toy, asked_by, made, partition, problem
from tests.parallel.threads import ThreadGroup, on_ranks
from tests.support.device import single
from verifier.bab import input_split, relu_split, sweeps
from verifier.bab.context import SearchContext
from verifier.bab.input_split import InputSplitResult, InputSplitting
from verifier.config import BabConfig
from verifier.core.deadline import Deadline


@dataclass
class Tight:
    """A search over boxes, of whose bounds memory holds so many.

    Attributes:
        tried: how many boxes were bounded at once, or not.
        batches: after every failure.
    """

    ended: InputSplitResult
    tried: list[int]
    batches: list[int]


def tight(monkeypatch: pytest.MonkeyPatch, most: int, copies: int) -> Tight:
    bound, tried, batches = sweeps.bound_boxes, [], []
    shrink = InputSplitting.shrink

    def limited(engine: Any, box: Any, *others: Any, **more: Any) -> Any:
        tried.append(box.lower.shape[0])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("out of memory")
        return bound(engine, box, *others, **more)

    def noting(self: InputSplitting, count: int) -> None:
        shrink(self, count)
        batches.append(self.sweeps.batch)

    monkeypatch.setattr(sweeps, "bound_boxes", limited)
    monkeypatch.setattr(InputSplitting, "shrink", noting)
    question = Question("mlp", 6, False, copies)
    graph = made(question)[1].graph
    # A recording that fails is tried once more without one.
    config = BabConfig(batch_size=64, clip=False, max_domains=200, cuda_graphs=False)
    context = SearchContext(graph, single(graph), config, Deadline(60.0))
    return Tight(input_split.search(context, problem(question), np.arange(copies)), tried, batches)


def test_parts_of_the_same_size_are_one_reason_to_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tight(monkeypatch, 3, 32)
    assert found.ended.totals.statistics.bounded >= 200
    failed = [count for count in found.tried if count > 3]
    smaller = [n for k, n in enumerate(failed) if n < min(failed[:k], default=64)]
    assert len(failed) > len(smaller) > 2
    assert found.batches[-1] == 64 >> len(smaller)


def test_where_not_one_box_fits_the_search_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tight(monkeypatch, 0, 32)
    assert len(found.ended.open) == 32 and "the device's memory does not hold" in found.ended.reason
    assert found.tried == [32, 16, 8, 4, 2, 1]


class Kept(list[tuple[int, int]]):
    """What a batch leaves open; a list that can be watched."""


class Watched(Toy):
    """Runs out of memory while open domains are put back, once for every batch of more than one, and looks whether
    what earlier batches left is still there when the next one is bounded."""

    def __init__(self, game: Game, context: SearchContext) -> None:
        super().__init__(game, context)
        self.seen: list[weakref.ref[Kept]] = []
        self.alive: list[int] = []

    def shrink(self, count: int) -> None:
        """It is as small as it can be."""

    def certify(self, domains: Any, found: Any) -> Any:
        self.alive.append(sum(ref() is not None for ref in self.seen))
        left = Kept(super().certify(domains, found))
        self.seen.append(weakref.ref(left))
        return left

    def push(self, left: list[tuple[int, int]]) -> None:
        if len(left) > 1:
            raise MemoryError
        super().push(left)


def test_what_a_batch_left_is_gone_before_the_next_one_is_bounded() -> None:
    def play(group: ThreadGroup) -> None:
        search = Watched(Game(size=64, hard=1.0, take=8), asked_by(group, lambda x: None, Deadline(60.0), 60))
        search.run()
        assert len(search.alive) > 10 and not any(search.alive)

    on_ranks(1, play)


class Interrupted(Toy):
    """Runs out of memory when a part of what is open is in the pool again."""

    def shrink(self, count: int) -> None:
        """It is as small as it can be."""

    def push(self, left: list[tuple[int, int]]) -> None:
        super().push(left[:1])
        if len(left) > 1:
            raise MemoryError
        super().push(left[1:])


@pytest.mark.parametrize("limit", [None, 30])
def test_what_was_put_back_before_memory_ran_out_is_taken_out_again(limit: int | None) -> None:
    def play(group: ThreadGroup) -> None:
        search = Interrupted(Game(size=64, hard=1.0, take=8), asked_by(group, lambda x: None, Deadline(60.0), limit))
        search.run()
        left = search.bound(search.pool.domains) if search.pool.count else []
        closed = [part for part in search.done if search.game.closes(*part)]
        assert partition([*left, *set(closed)], 64)

    on_ranks(1, play)


class Agrees:
    """A rank of several, of which one found so many candidates."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[float] = []

    def agree(self, value: float, op: str = "max") -> float:
        self.asked.append(value)
        return max(value, self.count)


@pytest.mark.parametrize("count", [0, 2])
def test_ranks_replay_as_many_candidates_whatever_each_computed(count: int) -> None:
    """A replay is a call of all ranks, and a value near zero need not have the same sign on all."""
    tried: list[np.ndarray] = []
    goal = object.__new__(relu_split.Refutation)
    goal.replay = lambda x: tried.append(x)
    backend = Agrees(count)
    splitting: Any = SimpleNamespace(backend=backend, cases=SimpleNamespace(rows=1))
    slack = torch.tensor([[-1e-7], [-1.0], [-1e-8], [-2e-8]], dtype=torch.float64)
    found: Any = SimpleNamespace(slack=slack, points=lambda index: index[:, None].double())
    assert goal.offer(splitting, found, torch.arange(4)) is None
    assert backend.asked == [0.0]
    assert [int(x[0]) for x in tried] == [2, 3][:count]
