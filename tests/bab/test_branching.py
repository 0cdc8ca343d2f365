"""Branching heuristics by name, and what those of other packages can do to a search."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bab.test_exchange import Lockstep
from tests.bab.test_kernel import Setting
from tests.parallel.threads import ThreadGroup, on_ranks
from verifier.bab import branching
from verifier.bab.branching.heuristic import Heuristic, Neurons
from verifier.bab.splits import SplitSpace
from verifier.bounds.alpha import Schedule
from verifier.config import BabConfig
from verifier.core import plugins
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError


def foreign(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's heuristic of the name ``theirs``."""
    monkeypatch.setattr(plugins, "lookup", lambda group, name, ours, reserved: ours.get(name, found))


def vandal(space: SplitSpace, neurons: Neurons) -> Tensor:
    """Writes to everything that it gets."""
    score = neurons.coefficients.abs().clone()
    for t in neurons:
        t.fill_(1)
    return score


@pytest.mark.parametrize("added", ["in another package", "in our folder"])
@pytest.mark.parametrize("found", [vandal, Heuristic((vandal, vandal), tried=True)], ids=["function", "object"])
def test_scores_that_nobody_vouches_for_see_copies(found: Any, added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting("mlp", 1)
    if added == "in our folder":
        monkeypatch.setattr(branching, "HEURISTICS", {**branching.HEURISTICS, "theirs": found})
    else:
        foreign(found, monkeypatch)
    search = s.search(BabConfig())
    search.brancher.heuristic = branching.named("theirs")
    bounds = search.bounder.optimise(s.domains, Schedule(0), Deadline())
    still = torch.arange(s.domains.count, device=s.domains.case.device)
    open_ = search.brancher.rank(s.domains, bounds, still)
    assert torch.equal(open_.signs, s.domains.signs) and torch.equal(open_.alpha_beta, bounds.alpha_beta)
    assert torch.equal(open_.gap, bounds.gap.amax(1))


def test_what_is_no_heuristic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(3, monkeypatch)
    with pytest.raises(ConfigError, match="'theirs' is neither a function nor a Heuristic"):
        branching.named("theirs")


@pytest.mark.parametrize("name", ["auto", "input", "kfsb"])
def test_names_that_leave_it_open_mean_kfsb(name: str) -> None:
    assert branching.named(name) is branching.HEURISTICS["kfsb"]


def test_ranks_of_a_group_take_one_word_for_scores_that_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Domains that were split differently would be bounded together, which bounds none of them."""
    s = Setting("mlp", 1)
    own = threading.local()

    def moody(space: SplitSpace, neurons: Neurons) -> Tensor:
        return torch.rand(neurons.coefficients.shape, generator=torch.Generator().manual_seed(own.rank))

    foreign(moody, monkeypatch)
    heuristic = branching.named("theirs")
    shape = (5, s.space.size)
    neurons = Neurons(torch.zeros(shape, dtype=torch.int8), *(torch.zeros(shape) for _ in range(3)), torch.zeros(5))

    def chosen(group: ThreadGroup) -> list[list[int]]:
        own.rank = group.rank
        space = replace(s.space, backend=Lockstep(s.made.graph, group))
        return heuristic.candidates(space, neurons, 3).tolist()

    first, *others = on_ranks(3, chosen)
    assert all(found == first for found in others)
    own.rank = 1
    assert heuristic.candidates(s.space, neurons, 3).tolist() != first
