"""Branching heuristics by name, and what those of other packages can do to a search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bab.test_kernel import Setting
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


@pytest.mark.parametrize("found", [vandal, Heuristic((vandal, vandal), tried=True)], ids=["function", "object"])
def test_scores_of_other_packages_see_copies(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting("mlp", 1)
    foreign(found, monkeypatch)
    search = s.search(BabConfig())
    search.brancher.heuristic = branching.named("theirs")
    bounds = search.bounder.optimise(s.domains, Schedule(0), Deadline())
    still = torch.arange(s.domains.count, device=s.domains.case.device)
    open_ = search.brancher.rank(s.domains, bounds, still)
    assert torch.equal(open_.signs, s.domains.signs) and torch.equal(open_.theta, bounds.theta)
    assert torch.equal(open_.gap, bounds.gap.amax(1))


def test_what_is_no_heuristic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(3, monkeypatch)
    with pytest.raises(ConfigError, match="'theirs' is neither a function nor a Heuristic"):
        branching.named("theirs")


@pytest.mark.parametrize("name", ["auto", "input", "kfsb"])
def test_names_that_leave_it_open_mean_kfsb(name: str) -> None:
    assert branching.named(name) is branching.HEURISTICS["kfsb"]
