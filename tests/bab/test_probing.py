"""Phases that follow from refuted sides: no counterexample is lost, and the books notice a lost domain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.bab.test_kernel import CASES, DEVICE, DOMAINS, Setting
from verifier.bab import relu_split
from verifier.bab.balance import LostDomains
from verifier.bab.bounder import CaseRows
from verifier.bab.branching import probing
from verifier.bab.branching.heuristic import Neurons
from verifier.bab.branching.neurons import NeuronBrancher
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.search import settle
from verifier.config import BabConfig
from verifier.core.deadline import Deadline

EVERY = 1 << 20  # more sides than there are


def test_sides_are_free_and_sorted() -> None:
    s = Setting("mlp", 1)
    random = torch.Generator().manual_seed(5)
    shape = (DOMAINS, s.space.size)
    a, z = (torch.randn(shape, generator=random).to(DEVICE) for _ in range(2))
    alpha = torch.rand(shape, generator=random).to(DEVICE)
    gap = -torch.rand(DOMAINS, generator=random).to(DEVICE)
    neurons = Neurons(s.domains.signs, a, alpha, z, gap)
    found, pushes = probing.sides(s.space, neurons, EVERY)
    assert found.shape == pushes.shape == (DOMAINS, 2 * s.space.size)
    assert bool((pushes >= 0).all()) and bool((found >= 0).any()) and bool((found < 0).any())
    few, _ = probing.sides(s.space, neurons, 3)
    assert torch.equal(few, found[:, :3])
    assert probing.sides(s.space, neurons, 0)[0].shape == (DOMAINS, 0)
    slope = s.space.upper / (s.space.upper - s.space.lower)
    for row in range(DOMAINS):
        real = found[row][found[row] >= 0]
        column = real // 2
        assert bool((s.domains.signs[row, column] == 0).all()) and real.unique().numel() == real.numel()
        # What the side gains where the minimiser stays: the ReLU on that side instead of the plane.
        h = torch.where(a[row] > 0, alpha[row] * z[row], slope * (z[row] - s.space.lower))[column]
        gain = a[row, column] * (torch.where(real % 2 == 0, z[row, column], 0.0) - h)
        assert bool((gain.diff() <= 1e-6).all()) and bool((gain >= -0.69 * gap[row]).all())


def test_trials_refute_one_side() -> None:
    candidates = torch.tensor([[4, 0, 7, 2]])
    gaps = torch.tensor([[[0.1, -1.0, 0.1, -1.0]], [[-1.0, 0.2, 0.1, 0.0]]])
    assert probing.refuted(candidates, gaps).tolist() == [[8, 1, -1, -1]]


def violating(s: Setting, quantile: float) -> tuple[CaseRows, Tensor, Tensor]:
    """Cases with counterexamples, samples (n, CASES) bool of them, and (n, U) signs of the samples' columns.

    The first row of a case decides; the others hold everywhere.
    """
    values = s.made.values(s.made.samples(6000, 3))
    y = values[s.made.graph.output].double().reshape(6000, -1)
    rows = torch.einsum("csn,tn->tcs", s.cases.spec.y.flatten(2), y)
    thresholds = rows.amax(0)
    thresholds[:, 0] = torch.quantile(rows[..., 0], quantile, dim=0)
    z = torch.cat([values[g.value].reshape(6000, -1)[:, g.elements] for g in s.space.groups], 1)
    signs = (z > 0).to(torch.int8) - (z < 0).to(torch.int8)
    return replace(s.cases, thresholds=thresholds), (rows <= thresholds).all(-1), signs


@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_counterexamples_stay_in_a_child(seed: int, lying: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampled counterexample of a domain that is split lies in one of its children, whatever phases follow, even
    where the trials call every side refuted."""
    s = Setting("mlp", seed)
    s.cases, bad, points = violating(s, 0.001)
    search = s.search(BabConfig(probes=EVERY, batch_size=64))
    if lying:
        monkeypatch.setattr(search.bounder, "evaluate", lambda domains: torch.ones(domains.count, device=DEVICE))
    monkeypatch.setattr(probing, "_NEAR", -float("inf"))
    monkeypatch.setattr(probing, "_WORTH", -float("inf"))
    search.start()
    seen = 0

    def members(domains: NeuronDomains, case: int) -> Tensor:
        signs = domains.signs[domains.case == case]
        conflict = (signs[:, None] * points[None] < 0).any(-1)
        return (~conflict).sum(0)[bad[:, case]]

    for _ in range(12):
        if not search.pool.count:
            break
        parents = search.pick()
        children = search.branch(parents)
        for case in range(CASES):
            before, after = members(parents, case), members(children, case)
            seen += int(before.sum())
            assert bool((after >= before).all())
        settle(search, children)
    assert seen > 0 and search.statistics.forced > 0


def test_a_domain_lost_among_the_forced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    s = Setting("mlp", 1)
    s.cases = replace(s.cases, thresholds=violating(s, 0.0)[0].thresholds - 0.3)
    forced = NeuronBrancher.with_forced
    calls = 0

    def losing(self: NeuronBrancher, domains: OpenNeuronDomains, batch: int) -> tuple[OpenNeuronDomains, int, int]:
        nonlocal calls
        calls += 1
        found, count, unsure = forced(self, domains, batch)
        return found[int(calls == 2) :], count, unsure

    def left(config: BabConfig) -> int:
        context = SearchContext(s.made.graph, s.made.backend, config, Deadline(), memory_limit=1 << 40)
        return relu_split.search(context, s.state, s.cases).open

    assert left(BabConfig()) == 0
    monkeypatch.setattr(NeuronBrancher, "with_forced", losing)
    with pytest.raises(LostDomains):
        left(BabConfig(batch_size=4))
    assert calls >= 2
