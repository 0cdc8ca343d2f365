"""Memory that runs out in the middle of a round: what was done is undone, and batches become as small as they must."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.bab.test_exchange import Question, made, problem
from tests.bab.test_kernel import Setting
from tests.support.device import single
from verifier.bab import input_split, refine, sweeps
from verifier.bab.context import SearchContext
from verifier.bab.input_split import InputSplitResult, InputSplitting
from verifier.bab.pool import Pool
from verifier.bounds.crown import preactivations
from verifier.config import BabConfig
from verifier.core.deadline import Deadline


def asked(monkeypatch: pytest.MonkeyPatch, most: int) -> tuple[InputSplitResult, list[int], list[int]]:
    """A search over boxes, of which memory holds the bounds of so many: how it ended, attempts, and batches."""
    bound, tried, batches = sweeps.bound_boxes, [], []
    shrink = InputSplitting.shrink

    def tight(graph: Any, backend: Any, box: Any, *others: Any) -> Any:
        tried.append(box.lower.shape[0])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("out of memory")
        return bound(graph, backend, box, *others)

    def noting(self: InputSplitting, count: int) -> None:
        shrink(self, count)
        batches.append(self.sweeps.batch)

    monkeypatch.setattr(sweeps, "bound_boxes", tight)
    monkeypatch.setattr(InputSplitting, "shrink", noting)
    question = Question("mlp", 6, False)
    graph = made(question)[1].graph
    context = SearchContext(graph, single(graph), BabConfig(batch_size=64, clip=False), Deadline(60.0))
    return input_split.search(context, problem(question), np.arange(1)), tried, batches


def test_batches_become_no_smaller_than_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parts of a round fail: parts of the same size are one reason to shrink, not several."""
    ended, tried, batches = asked(monkeypatch, 5)
    assert len(ended.open) == 0 and ended.reason == ""
    assert max(tried) > 5 and batches and batches[-1] >= 2


def test_where_not_one_box_fits_the_search_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    ended, tried, _ = asked(monkeypatch, 0)
    assert ended.open.tolist() == [0] and "the device's memory does not hold" in ended.reason
    assert len(tried) <= 8


@pytest.mark.parametrize("failing", [3, 6, 12])
def test_leaves_of_a_refinement_count_once(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when memory runs out while what is open goes back into the pool."""
    s = Setting("mlp", 0)
    push, calls = Pool.push, [0]

    def tight(self: Pool[Any], batch: Any) -> None:
        calls[0] += 1
        if calls[0] == failing and batch.count > 1:
            raise MemoryError
        push(self, batch)

    monkeypatch.setattr(Pool, "push", tight)
    context = SearchContext(s.made.graph, s.made.backend, BabConfig(batch_size=16), Deadline(200.0))
    fine = refine.refine(context, s.state, 0.05)
    values = s.made.values(s.made.samples(2000, 1))
    for index in preactivations(s.made.graph):
        new, z = fine.bounds[index], values[index].double()
        assert bool((z.amin((0, 1)) >= new.lower[0].double() - 1e-9).all())
        assert bool((z.amax((0, 1)) <= new.upper[0].double() + 1e-9).all())
    assert calls[0] > failing
