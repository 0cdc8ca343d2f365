"""Branch and bound on the values of nodes, whatever reads them: the cases of one input box.

Shi et al., *Neural network verification with branch-and-bound for general nonlinearities* (GenBaB), arXiv 2405.21063.

A domain is a case of the problem plus clamps of node values (:mod:`verifier.bab.values`). ReLUs are split at zero and
sigmoids, products or sines at any point, all in one search. Every round takes the worst domains, chooses a value and a
point for each, bounds both sides with relaxations on the clamped intervals (:mod:`verifier.bounds.clamped`), closes
those whose bound is certified, tries the minimisers of the others as counterexamples and puts them back.

The answer is a proof only when no domain is left. A domain leaves the pool in two ways alone: its bound is certified
above the threshold (or it has no point), or it is replaced by two children that cover it. One without a value that can
be split is kept as stuck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verifier.bab.balance import every
from verifier.bab.bounder import CaseRows, violation
from verifier.bab.branching import cuts
from verifier.bab.certify import Judge, fitting
from verifier.bab.context import SearchContext
from verifier.bab.domains import OpenValueDomains, ValueDomains
from verifier.bab.exchange import Exchange
from verifier.bab.pool import Pool
from verifier.bab.relu_split import SearchResult, offer, result
from verifier.bab.search import branch_and_bound, settle
from verifier.bab.statistics import SearchStatistics, Stop
from verifier.bab.values import ValueSpace, applies, empty, value_space
from verifier.bounds.alpha import Schedule
from verifier.bounds.clamped import ClampedRows, Climbed, Limits, View, certified, evaluate, optimise, view
from verifier.bounds.crown import BoundState
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.errors import VerifierError
from verifier.core.interval import Interval
from verifier.core.numerics import rounded_up
from verifier.core.progress import SilentProgress
from verifier.core.result import Witness
from verifier.graph.linear_forms import Form

__all__ = ["ValueSplitting", "applies", "search"]

# Parameters of a domain are kept for its children while they take so many bytes; others start from the root's.
_KEPT_BYTES = 1 << 20
# Values that every domain is split at in one round.
_MOST_DEPTH = 3


def search(context: SearchContext, state: BoundState, cases: CaseRows) -> SearchResult:
    """Refute all cases on one box, or find a counterexample.

    Args:
        state: root bounds (1, *shape).
    """
    exchange: Exchange[OpenValueDomains] = Exchange(context)
    splitting = ValueSplitting(context, state, cases, exchange.deadline, exchange.offer)
    exchange.same(splitting.meaning())
    with torch.no_grad():
        return result(branch_and_bound(splitting, exchange))


@dataclass(frozen=True)
class Bounded:
    """What bounding a batch gives.

    Attributes:
        bounds: node index to (B or 1, *shape) on the domains.
        empty: bool (B,), domains that have no point.
        gap: (B, S) best bounds minus thresholds; not certified.
    """

    bounds: dict[int, Interval]
    empty: Tensor
    found: Climbed
    gap: Tensor


@dataclass(frozen=True)
class Left:
    """What a batch leaves open.

    Attributes:
        domains: the open ones, with the best parameters and multipliers.
        bounds: node index to (B or 1, *shape) on them.
        view: of their rows there; None where there are no domains.
    """

    domains: ValueDomains
    bounds: dict[int, Interval]
    view: View | None


class ValueSplitting:
    """Splits of values, as branch and bound asks for them.

    Args:
        state: root bounds (1, *shape).
        deadline: expires for all ranks of the group at the same question.
        replay: judges a candidate (n_in,).

    Attributes:
        batch: domains bounded at once.
    """

    kind = OpenValueDomains

    def __init__(
        self,
        context: SearchContext,
        state: BoundState,
        cases: CaseRows,
        deadline: Deadline,
        replay: Callable[[np.ndarray], Witness | None],
    ) -> None:
        self.backend, self.config, self.progress = context.backend, context.config, context.progress
        self.graph, self.engine = context.graph, replace(context.engine, deadline=deadline)
        self.state, self.cases, self.deadline, self.replay = state, cases, deadline, replay
        self.statistics = SearchStatistics()
        self.witness: Witness | None = None
        self.memory_limit = context.memory_limit
        self.space: ValueSpace = value_space(self.graph, state.bounds)
        self.judge = Judge(context, state, cases, self.statistics)
        self.limits = Limits(self.graph, state.bounds)
        self.keeps = cases.rows * self.limits.size * 4 <= _KEPT_BYTES
        self.candidates = min(self.config.candidates, max(1, self.space.size))
        self._widest = max(n.size for n in self.graph.nodes)
        size = self.config.batch_size
        self.batch = fitting(self.backend.device, self._widest * cases.rows) if size == "auto" else size
        self.pool: Pool[OpenValueDomains] = Pool()

    def meaning(self) -> list[Tensor]:
        """What gives the numbers of a domain their meaning."""
        space = self.space
        values = torch.tensor([g.value for g in space.columns])
        return [values, *(g.elements for g in space.columns), space.lower, space.upper, self.cases.spec.y]

    # -- the steps of a round -------------------------------------------------------------------------------------

    @property
    def roots(self) -> int:
        return int(self.cases.thresholds.shape[0])

    def start(self) -> None:
        """One domain per case, without splits."""
        case = torch.arange(self.roots, device=self.backend.device)
        space, lead = self.space, (self.roots, self.cases.rows)
        self.statistics.roots = self.roots
        self.statistics.bounded += self.roots
        low, up = (end.expand(self.roots, -1).clone() for end in (space.lower, space.upper))
        none = torch.zeros((*lead, space.size), device=case.device)
        settle(self, ValueDomains(case, low, up, none, self._rooted(case)[..., : self._width]))

    @property
    def _width(self) -> int:
        return self.limits.size if self.keeps else 0

    def _rooted(self, case: Tensor) -> Tensor:
        """(B, S, P), the root's parameters."""
        parameters = {i: {k: v[case] for k, v in group.items()} for i, group in self.cases.parameters.items()}
        lead = (int(case.shape[0]), self.cases.rows)
        initial = self.limits.low + self.limits.initial * self.limits.width
        return self.limits.places(self.limits.flat(parameters, lead, initial))

    def pick(self) -> OpenValueDomains:
        """The worst ones, while there is room for more of them."""
        self.backend.usage.note_domains(self.pool.nbytes())
        crowded = self.pool.nbytes() > self.memory_limit // 2
        return self.pool.by_gap(max(1, self.batch // 2), worst_first=not crowded)

    def branch(self, domains: OpenValueDomains) -> ValueDomains:
        """Both sides of the best candidate of every domain."""
        ranked = cuts.tried(domains, cuts.Ranked(domains.candidates, domains.points), self._trial, self.batch)
        children, splits, between = cuts.split(domains, ranked, self._depth(domains.count))
        # Of those that will be bounded there are as many as there are: one that was lost on the way is missed.
        self.statistics.split += splits
        self.statistics.children += between + children.count
        self.statistics.bounded += children.count
        return children

    def _depth(self, count: int) -> int:
        """Splits of every domain: more than one while a round costs the same with more children."""
        numbers = facts(self.backend.device).free_batch_numbers
        free = self.batch if numbers is None else numbers // (self._widest * self.cases.rows)
        depth = 1
        while depth < _MOST_DEPTH and count << (depth + 1) < min(free, self.batch):
            depth += 1
        return depth

    def _trial(self, domains: ValueDomains) -> Tensor:
        """(B,) best gaps at the parents' values."""
        bounds = self.space.domain_bounds(self.engine, self.state, domains.lower, domains.upper)
        rows = self._rows(domains, bounds)
        parameters = Limits(self.graph, bounds).values(self._places(domains))
        lower = evaluate(self.engine, rows, parameters, domains.multipliers)
        gap = (lower - self._thresholds(domains.case, lower.dtype)).amax(1)
        return gap.masked_fill(empty(bounds, domains.count), float("inf"))

    def _places(self, domains: ValueDomains) -> Tensor:
        return domains.places if domains.places.shape[-1] == self.limits.size else self._rooted(domains.case)

    def _thresholds(self, case: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded_up(self.cases.thresholds[case], dtype)

    def _rows(
        self, domains: ValueDomains, bounds: dict[int, Interval], dtype: torch.dtype = torch.float32
    ) -> ClampedRows:
        """The rows of some domains, in an arithmetic."""
        space = self.space
        start: dict[int, Form] = self.cases.spec.select(domains.case).forms(self.backend, self.graph.output, dtype)
        return ClampedRows(
            bounds[0],
            bounds,
            start,
            space.columns,
            domains.lower,
            domains.upper,
            space.multiplied & (domains.lower > space.lower),
            space.multiplied & (domains.upper < space.upper),
        )

    def parts(self, domains: ValueDomains) -> list[ValueDomains]:
        return [domains[slice(i, i + self.batch)] for i in range(0, domains.count, self.batch)]

    def bound(self, domains: ValueDomains) -> Bounded:
        """Optimised parameters and multipliers."""
        config = self.config
        bounds = self.space.domain_bounds(self.engine, self.state, domains.lower, domains.upper)
        thresholds = self._thresholds(domains.case, torch.float32)
        none = empty(bounds, domains.count)

        schedule = Schedule(config.iterations, config.learning_rate_alpha, config.learning_rate_beta, 0.98)
        target = torch.where(none[:, None], float("-inf"), thresholds)
        rows = self._rows(domains, bounds)
        found = optimise(self.engine, rows, self._places(domains), domains.multipliers, schedule, target)
        return Bounded(bounds, none, found, found.lower - thresholds)

    def certify(self, domains: ValueDomains, found: Bounded) -> Left:
        done = self._refuted(domains, found)
        self.statistics.closed += int(done.sum())
        still = (~done).nonzero()[:, 0]
        part = replace(domains[still], multipliers=found.found.multipliers[still], places=found.found.places[still])
        if not part.count:
            return Left(part, found.bounds, None)
        bounds = _some(found.bounds, still, domains.count)
        parameters = Limits(self.graph, bounds).values(part.places)
        return Left(part, bounds, view(self.engine, self._rows(part, bounds), parameters, part.multipliers))

    def _refuted(self, domains: ValueDomains, found: Bounded) -> Tensor:
        """(B,) bool: domains that are refuted, or have no point; certified when the root's bounds are."""
        judge, statistics = self.judge, self.statistics
        done = judge.refuted(domains.case, found.gap) & ~found.empty
        if self.state.certified and bool(done.any()):
            index = done.nonzero()[:, 0]
            sure = torch.cat([self._confirmed(domains, found, some) for some in index.split(self.batch)])
            done[index] = sure
            statistics.uncertified += int((~sure).sum())
        done = judge.touching(domains.case, found.gap, done, lambda i: _some(found.bounds, i, domains.count))
        if self.state.magnitudes.run is None:
            statistics.covered.weak += int(found.empty.sum())
        return done | found.empty

    def _confirmed(self, domains: ValueDomains, found: Bounded, index: Tensor) -> Tensor:
        """(n,) bool: whether some row of these domains is refuted, as far as the claims ask. Everything is made anew
        from the domains' own clamps and multipliers."""
        part = replace(domains[index], multipliers=found.found.multipliers[index], places=found.found.places[index])
        bounds = self.space.domain_bounds(self.engine, self.state, part.lower, part.upper)
        lower, error = self.lower(part, bounds)
        sure, weak = self.judge.judged(part.case, lower, error)
        self.judge.strong.weak += int(weak.sum())  # no search for runs goes on with them
        return sure | weak

    def lower(self, domains: ValueDomains, bounds: dict[int, Interval]) -> tuple[Tensor, Tensor]:
        """(B, S) bounds of domains at their parameters and multipliers, in float64, certified when the state is, and
        the error of a run that they allow for."""
        parameters = Limits(self.graph, bounds).values(self._places(domains))
        rows = self._rows(domains, bounds, torch.float64)
        lower, walk = certified(self.engine, self.state, rows, parameters, domains.multipliers)
        return lower, walk.error.expand_as(lower)

    def offer(self, left: Left) -> Witness | None:
        """Minimisers that violate the property most."""
        if left.view is None:
            return None
        flat = left.view.point.flatten(0, 1)
        slack = violation(self.graph, self.backend, self.cases, flat, left.domains.case)
        every_one = torch.arange(left.domains.count, device=flat.device)
        return offer(self.backend, slack, lambda index: flat[index], every_one, self.replay)

    def push(self, left: Left) -> None:
        """Domains with a value that can be split go into the pool with ranked candidates; the others are stuck."""
        if left.view is None:
            return
        part = left.domains
        gap, row = (left.view.lower - self._thresholds(part.case, torch.float32)).max(1)
        ranked = cuts.rank(self.graph, self.space, part, cuts.seen(left.bounds, left.view, row), self.candidates)
        free = (ranked.columns >= 0).any(1)
        self.statistics.stuck += int((~free).sum())
        places = part.places[..., : self._width]
        out = OpenValueDomains(
            part.case, part.lower, part.upper, part.multipliers, places, gap, ranked.columns, ranked.points
        )
        self.pool.push(out[free])

    # -- limits -----------------------------------------------------------------------------------------------------

    def shrink(self, count: int) -> None:
        self.batch = max(1, count // 2)

    def undo(self, before: SearchStatistics) -> None:
        self.statistics.restore(before)

    def postpone(self, domains: ValueDomains, error: VerifierError) -> None:
        raise type(error)(str(error)) from error  # a new one: whose frames die with it

    def full(self) -> Stop:
        return Stop.MEMORY if self.pool.nbytes() > self.memory_limit else Stop.NONE

    # -- what other groups and the user are told ------------------------------------------------------------------

    def count(self) -> SearchStatistics:
        return replace(self.statistics, open=self.pool.count, worst=self.pool.worst())

    def show(self, others: SearchStatistics) -> None:
        if isinstance(self.progress, SilentProgress):
            return  # the device is not asked for what nobody sees
        statistics = self.statistics
        self.progress.update(
            open=self.pool.count + statistics.stuck + others.open + others.stuck,
            done=statistics.closed + others.closed,
            domains=statistics.bounded + others.bounded,
            worst=min(self.pool.worst(), others.worst),
        )

    def give(self, count: int) -> OpenValueDomains:
        order = torch.argsort(self.pool.gaps, stable=True)
        return self.pool.take(order[every(self.pool.count, count).to(order.device)])

    def take(self, domains: OpenValueDomains) -> None:
        self.pool.push(domains)


def _some(bounds: dict[int, Interval], index: Tensor, count: int) -> dict[int, Interval]:
    """Bounds of some domains of ``count``."""
    return {i: Interval(*(e[index] if e.shape[0] == count else e for e in b)) for i, b in bounds.items()}
