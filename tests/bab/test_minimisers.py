"""Starts for attacks: the minimisers of the worst open domains, best first, without a change to the pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from tests.support.device import DEVICE
from verifier.bab.bounder import Bounded, Bounder
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.minimisers import minimisers
from verifier.bab.pool import Pool
from verifier.bounds.alpha import Schedule
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded

SCHEDULE = Schedule(1, 0.1, 0.1, 0.98)


class Stub:
    """Domain i, named by its case, has minimisers 10 i and 10 i + 1 for its two rows."""

    def __init__(self, slack: Sequence[Sequence[float]], late: bool = False) -> None:
        self.slack, self.late = torch.tensor(slack, device=DEVICE), late

    def optimise(self, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> Bounded:
        assert type(domains) is NeuronDomains
        if self.late:
            raise DeadlineExceeded("too late")
        points = torch.stack([10.0 * domains.case, 10.0 * domains.case + 1], 1).flatten()
        none = domains.alpha_beta
        slack = self.slack[domains.case]
        return Bounded(slack, none, None, none, none, slack, lambda index: points[index][:, None, None])


def pool(gaps: Sequence[float]) -> Pool[OpenNeuronDomains]:
    held: Pool[OpenNeuronDomains] = Pool()
    n, device = len(gaps), DEVICE
    signs, values = torch.zeros((n, 1), dtype=torch.int8, device=device), torch.zeros((n, 2, 1), device=device)
    none, empty = torch.zeros((n, 0), dtype=torch.int64, device=device), torch.zeros((n, 0), device=device)
    case, gap = torch.arange(n, device=device), torch.tensor(gaps, device=device)
    held.push(OpenNeuronDomains(case, signs, values, gap, none, none, empty))
    return held


def found(gaps: Sequence[float], stub: Stub, batch: int = 99, count: int = 99, seconds: float = 60.0) -> list[float]:
    points = minimisers(cast(Bounder, stub), pool(gaps), SCHEDULE, Deadline(seconds), batch, count)
    assert points is not None and points.shape[1:] == (1,)
    return points[:, 0].tolist()


def test_the_worst_domains_give_their_best_rows_best_first() -> None:
    stub = Stub([[-5.0, -4.0], [-1.0, -9.0], [-0.5, -0.5], [-3.0, -2.0]])
    gaps = [-3.0, -4.0, -1.0, -2.0]
    assert found(gaps, stub) == [20.0, 10.0, 31.0, 1.0]
    assert found(gaps, stub, batch=3) == [10.0, 31.0, 1.0]  # domain 2 has the best bound
    assert found(gaps, stub, count=2) == [20.0, 10.0]


def test_equal_points_come_once() -> None:
    stub = Stub([[-2.0, -9.0], [-1.0, -9.0], [-2.0, -9.0]])
    assert found([-1.0, -2.0, -3.0], stub)[0] == 10.0
    assert len(found([-1.0, -2.0, -3.0], stub)) == 2


def test_the_pool_keeps_its_domains() -> None:
    held = pool([-1.0, -2.0])
    before = held.domains.map(torch.clone)
    assert minimisers(cast(Bounder, Stub([[0.0, 1.0]] * 2)), held, SCHEDULE, Deadline(60.0), 1, 1) is not None
    assert held.count == 2 and (held.domains.case == before.case).all() and (held.gaps == before.gap).all()


def test_there_are_none_without_domains_or_time() -> None:
    stub = cast(Bounder, Stub([[0.0, 1.0]] * 2))
    assert minimisers(stub, Pool(), SCHEDULE, Deadline(60.0), 9, 9) is None
    assert minimisers(stub, pool([-1.0, -2.0]), SCHEDULE, Deadline(0.0), 9, 9) is None
    late = cast(Bounder, Stub([[0.0, 1.0]] * 2, late=True))
    assert minimisers(late, pool([-1.0, -2.0]), SCHEDULE, Deadline(60.0), 9, 9) is None
