"""Branch and bound on ReLU splits with beta-CROWN: the cases of one input box, to a proof or a counterexample.

Bunel et al., JMLR 2020, with the bounds of Wang et al., *Beta-CROWN*, NeurIPS 2021.

A domain is a case of the problem plus the phases of the neurons that were split. Every round takes the worst domains,
chooses a neuron for each, bounds the two children by optimising slopes and split multipliers from the parent's values,
closes those whose bound is certified, tries the minimisers of the others as counterexamples and puts them back.

The answer is a proof only when no domain is left. A domain leaves the pool in three ways alone: its bound is certified
above the threshold, it is replaced by two children that cover it, or an LP certificate closes it. Before a domain is
split, sides of other splits are probed: one that is certified to be refuted is a closed child, and the domain goes on
as the other child.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from verifier.bab.balance import every
from verifier.bab.bounder import Bounded, Bounder, CaseRows, WalkBounder
from verifier.bab.branching.neurons import NeuronBrancher
from verifier.bab.certify import Certificates, fitting
from verifier.bab.compact import compact
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.exchange import Ending, Exchange
from verifier.bab.kernel import Kernel
from verifier.bab.leaf_lp import LeafRows, LeafSolver
from verifier.bab.minimisers import minimisers
from verifier.bab.pool import Pool
from verifier.bab.recordings import recordings
from verifier.bab.search import branch_and_bound, settle
from verifier.bab.splits import SplitSpace, split_space
from verifier.bab.statistics import SearchStatistics, SearchTotals, Stop
from verifier.bounds.alpha import Schedule
from verifier.bounds.crown import BoundState
from verifier.bounds.engine import recorder
from verifier.core.backend import Group, ParallelBackend
from verifier.core.claims import Covered, Semantics
from verifier.core.deadline import Deadline
from verifier.core.errors import VerifierError
from verifier.core.progress import SilentProgress
from verifier.core.result import Witness
from verifier.proof.leaves import LeafLog

__all__ = ["CaseRows", "SearchResult", "WeakDomains", "go_on", "search"]

D = TypeVar("D", bound=NeuronDomains)

# Slopes and multipliers let children start well but are not needed to know a domain; other groups get those of a domain
# while they take so many bytes.
_WARM_BYTES = 64 << 10
# Minimisers of a batch that are replayed.
_MOST_OFFERS = 3
# How much of the error of a run bounds are to leave room for: that of a part of the box may be a little larger.
_MARGIN = 1.25
# Domains that a search for runs may bound: so many, this share of those that there were before, and so many times both
# when its open domains become fewer.
_LEAST_MORE, _SHARE_MORE, _LONGER = 1000, 0.25, 4.0
# A search has few open domains left when they are less than this share of the most that there were.
_DRAINED = 0.6

_REASONS = {
    Stop.NONE: "undecided leaves",
    Stop.TIME: "time limit reached",
    Stop.DOMAINS: "domain limit reached",
    Stop.MEMORY: "memory for open domains used up",
}


@dataclass
class SearchResult:
    """How a search ended. ``open`` is the number of domains left; zero together with no witness is a proof.

    Attributes:
        totals: what was done and left.
        stop: the limit that ended it.
        covered: what the bounds that closed domains hold for.
        weak: what a search for runs would go on with; None where nothing is closed for the real network alone, or where
            not all that is was kept.
        points: (k, n_in) minimisers of open domains, where they were wanted and there are any.
    """

    witness: Witness | None
    open: int
    reason: str
    totals: SearchTotals = field(default_factory=SearchTotals)
    stop: Stop = Stop.NONE
    covered: Covered = field(default_factory=Covered)
    weak: WeakDomains | None = None
    points: np.ndarray | None = None


@dataclass(frozen=True)
class WeakDomains:
    """The domains of a finished search that are refuted for the network in real arithmetic alone.

    Attributes:
        state: root bounds (1, *shape).
        domains: those of this group of ranks.
        covered: what the closings of all other domains, in all groups, hold for.
        bounded: domains that the search bounded.
    """

    state: BoundState
    cases: CaseRows
    domains: NeuronDomains
    covered: Covered
    bounded: int


def search(
    context: SearchContext,
    state: BoundState,
    cases: CaseRows,
    begin: NeuronDomains | None = None,
    enough: float = math.inf,
    wanted: int = 0,
) -> SearchResult:
    """Refute all cases on one box, or find a counterexample.

    Args:
        state: root bounds (1, *shape).
        begin: this group's part of the domains to refute; default all cases on the whole box.
        enough: bounded domains after which a group stops unless its open domains become fewer.
        wanted: minimisers of open domains that the result should have, at most; in a group of one rank.
    """
    exchange: Exchange[OpenNeuronDomains] = Exchange(context)
    goal = Refutation(context, exchange.offer, enough)
    begin = None if begin is None else _of_all_groups(context.team, begin)
    splitting = NeuronSplitting(context, state, cases, exchange.deadline, goal, begin=begin)
    exchange.same(splitting.meaning())
    log = None if state.proof is None else LeafLog(splitting.space.size)
    splitting.certificates.log = log
    try:
        ending = branch_and_bound(splitting, exchange)
        found = replace(result(ending), weak=_weak(ending, splitting, context.team))
        if log is not None and not found.open and found.witness is None:
            _write(splitting, log)
        return replace(found, points=splitting.minimisers(wanted)) if wanted and found.open else found
    finally:
        splitting.bounder.close()
        if log is not None:
            log.close()


def _write(splitting: NeuronSplitting, log: LeafLog) -> None:
    """Have a finished search in the proof."""
    proof, numbers = splitting.state.proof, splitting.cases.numbers
    assert proof is not None and numbers is not None
    proof.claim(splitting.state.bounds)
    proof.by_search(numbers.cpu().numpy(), log, splitting.space.columns)


def go_on(context: SearchContext, weak: WeakDomains) -> SearchResult:
    """Refute the weak domains of a search for runs too, in a part of what it took unless few of them are left."""
    enough, limit = _LEAST_MORE + _SHARE_MORE * weak.bounded, context.config.max_domains
    most = int(_LONGER * enough)
    config = context.config.model_copy(update={"max_domains": most if limit is None else min(most, limit)})
    context = replace(context, config=config, claims=replace(context.claims, semantics=Semantics.FLOAT32))
    return search(context, weak.state, weak.cases, weak.domains, enough / context.team.size)


def _of_all_groups(team: Group, domains: NeuronDomains) -> NeuronDomains:
    """The domains of all groups, without what only speeds their bounds up."""
    if team.size == 1:
        return domains
    device, bare = domains.case.device, domains.map(Tensor.cpu)
    parts = team.objects(replace(bare, alpha_beta=bare.alpha_beta[..., :0]))
    return NeuronDomains.cat(parts).map(lambda t: t.to(device))


def _weak(ending: Ending, splitting: NeuronSplitting, team: Group) -> WeakDomains | None:
    """What is only refuted for the real network, in a search that ended well; equal in kind on all groups."""
    statistics, found = ending.totals.statistics, splitting.certificates
    if ending.witness is not None or ending.totals.left or not statistics.covered.weak:
        return None
    domains = NeuronDomains.cat([splitting.nothing(), *found.weak])
    covered, kept = Covered(), 0
    for part, count in team.objects((found.strong, domains.count)):
        covered.add(part)
        kept += count
    if covered.weak or kept < statistics.covered.weak:
        return None
    return WeakDomains(splitting.state, splitting.cases, domains, covered, statistics.bounded)


def result(ending: Ending) -> SearchResult:
    """In the words of a search of neurons."""
    totals = ending.totals
    reason = _REASONS[ending.stop] if totals.left and ending.witness is None else ""
    return SearchResult(ending.witness, totals.left, reason, totals, ending.stop, totals.statistics.covered)


def offer(
    backend: ParallelBackend,
    slack: Tensor,
    points: Callable[[Tensor], Tensor],
    still: Tensor,
    replay: Callable[[np.ndarray], Witness | None],
) -> Witness | None:
    """Replay the points of open domains, at positions ``still`` (n,), that violate the property most.

    Args:
        slack: (B, S) by how much. points: flat positions in (B, S) to points, (n, *input_shape).
    """
    rows = slack.shape[1]
    flat = slack[still].flatten()
    best = torch.topk(flat, min(_MOST_OFFERS, flat.shape[0]))
    # Ranks replay together, so that they agree on how many are worth it whatever each of them computed.
    count = int(backend.agree(float((best.values >= 0).sum())))
    for i in best.indices[:count].tolist():
        at = still[i // rows] * rows + i % rows
        witness = replay(points(at[None])[0].reshape(-1).cpu().numpy())
        if witness is not None:
            return witness
    return None


class Goal(Protocol):
    """What neurons are split for: to refute cases, or to raise the bounds of rows."""

    def pick(self, splitting: NeuronSplitting) -> OpenNeuronDomains:
        """Take the domains of the next round out of the pool."""
        ...

    def closed(self, splitting: NeuronSplitting, domains: NeuronDomains, found: Bounded) -> Tensor:
        """(B,) bool: domains that need not be split further."""
        ...

    def offer(self, splitting: NeuronSplitting, found: Bounded, still: Tensor) -> Witness | None:
        """Try points of open domains, at positions ``still`` (n,), as counterexamples."""
        ...

    def leaf(self, splitting: NeuronSplitting, domain: OpenNeuronDomains) -> Witness | None:
        """Account for a domain without a free neuron."""
        ...

    def full(self, splitting: NeuronSplitting) -> Stop:
        """Whether there is no more room, or no more work to do."""
        ...


@dataclass(frozen=True)
class Left:
    """What a batch leaves open.

    Attributes:
        domains: the whole batch.
        still: (n,) positions of the open ones.
    """

    domains: NeuronDomains
    found: Bounded
    still: Tensor


class NeuronSplitting:
    """Splits of neurons, as branch and bound asks for them.

    Args:
        state: root bounds (1, *shape).
        deadline: expires for all ranks of the group at the same question.
        later_steps: of the optimiser, at most, after the roots; default as many as the configuration says.
        begin: the domains to start with; default one per case, without splits.

    Attributes:
        batch: domains bounded at once.
        aim: (N, S) what bounds are optimised to exceed the cases' thresholds by; gaps are measured without it.
    """

    kind = OpenNeuronDomains

    def __init__(
        self,
        context: SearchContext,
        state: BoundState,
        cases: CaseRows,
        deadline: Deadline,
        goal: Goal,
        later_steps: int | None = None,
        begin: NeuronDomains | None = None,
    ) -> None:
        self.backend, self.config, self.progress = context.backend, context.config, context.progress
        self.graph = context.graph
        self.state, self.cases, self.deadline, self.goal, self.begin = state, cases, deadline, goal, begin
        self.statistics = SearchStatistics()
        self.witness: Witness | None = None
        self.memory_limit = int(self.backend.agree(float(context.memory_limit), "min"))
        self.space: SplitSpace = split_space(context.graph, self.backend, state.bounds)
        self.certificates = Certificates(context, state, cases, self.space, self.statistics)
        self.aim = self._aim()
        self.bounder = self._bounder(context, replace(cases, thresholds=cases.thresholds + self.aim))
        self.brancher = NeuronBrancher(self.space, self.bounder, self.certificates, self.config, cases.rows)
        config = self.config
        steps = config.iterations if later_steps is None else min(later_steps, config.iterations)
        self.root_schedule, self.schedule = (
            Schedule(n, config.learning_rate_alpha, config.learning_rate_beta, 0.98) for n in (config.iterations, steps)
        )
        size = config.batch_size
        self.batch = fitting(self.backend.device, self.bounder.widest * cases.rows) if size == "auto" else size
        self.pool: Pool[OpenNeuronDomains] = Pool()

    def _aim(self) -> Tensor:
        """(N, S) float64: what bounds should exceed the cases' thresholds by, so that they hold for runs too.

        A domain is not improved further once it is proved; one that just clears its threshold would have to be split
        for the sake of runs. The error of a run is that of the rows on the whole box.
        """
        if self.state.magnitudes.run is None or not self.state.certified:
            return torch.zeros_like(self.cases.thresholds)
        _, error = self.certificates.lower(self._whole())
        return _MARGIN * error.nan_to_num(nan=0.0, posinf=0.0)

    def _bounder(self, context: SearchContext, cases: CaseRows) -> Bounder:
        """The compact network where there is one, else walks on the graph."""
        graph, box = context.graph, self.state.box
        net = compact(graph, self.backend, box, self.space, cases.spec, cases.thresholds)
        if net is None:
            repeats = recorder(self.backend, self.config.cuda_graphs)
            return WalkBounder(replace(context.engine, recorder=repeats), self.state, self.space, cases)
        kept = recordings(self.backend.device, self.config.cuda_graphs, self.memory_limit // 4)
        return Kernel(net, cases.rows, graph.input_shape, kept, cases.strict)

    def meaning(self) -> list[Tensor]:
        """What gives the numbers of a domain their meaning."""
        groups = self.space.groups
        values = torch.tensor([g.value for g in groups])
        return [values, *(g.elements for g in groups), self.cases.spec.y, self.cases.thresholds]

    # -- the steps of a round -------------------------------------------------------------------------------------

    @property
    def roots(self) -> int:
        return int(self.cases.thresholds.shape[0]) if self.begin is None else self.begin.count

    def start(self) -> None:
        """The given domains, or one per case, without splits."""
        self.statistics.roots = self.roots
        self.statistics.bounded += self.roots
        settle(self, self._whole() if self.begin is None else self._warmed(self.begin))

    def nothing(self) -> NeuronDomains:
        """No domain."""
        return self._whole()[:0]

    def _whole(self) -> NeuronDomains:
        """One domain per case, without splits."""
        case = torch.arange(int(self.cases.thresholds.shape[0]), device=self.backend.device)
        signs = torch.zeros((case.shape[0], self.space.size), dtype=torch.int8, device=case.device)
        return NeuronDomains(case, signs, self._warm(case, signs))

    def _warmed(self, domains: D) -> D:
        """With slopes and multipliers, where they are missing."""
        if domains.alpha_beta.shape[-1] == self.space.size:
            return domains
        return replace(domains, alpha_beta=self._warm(domains.case, domains.signs))

    def _warm(self, case: Tensor, signs: Tensor) -> Tensor:
        """Slopes and multipliers to start from without a parent: the root's slopes and zero."""
        lead = (int(case.shape[0]), self.cases.rows)
        slopes = {i: p["alpha"][case] for i, p in self.cases.parameters.items() if "alpha" in p}
        return self.space.collect(slopes, lead) * (signs[:, None] == 0)

    def pick(self) -> OpenNeuronDomains:
        self.backend.usage.note_domains(self.pool.nbytes())
        return self.goal.pick(self)

    def branch(self, domains: OpenNeuronDomains) -> NeuronDomains:
        found, statistics = self.brancher.branch(domains, self.batch), self.statistics
        statistics.split += found.split
        # Of those that will be bounded there are as many as there are: one that was lost on the way is missed.
        statistics.children += found.between + found.forced + found.children.count
        statistics.closed += found.forced
        statistics.forced += found.forced
        statistics.uncertified += found.unsure
        statistics.bounded += found.children.count
        return found.children

    def parts(self, domains: NeuronDomains) -> list[NeuronDomains]:
        return [domains[slice(i, i + self.batch)] for i in range(0, domains.count, self.batch)]

    def bound(self, domains: NeuronDomains) -> Left:
        """Optimised slopes and multipliers."""
        schedule = self.schedule if self.statistics.rounds else self.root_schedule
        found = self.bounder.optimise(domains, schedule, self.deadline)
        more = self.aim[domains.case].to(found.gap.dtype)
        found = replace(found, gap=found.gap + more, slack=found.slack - more)
        return Left(domains, found, torch.arange(domains.count, device=domains.case.device))

    def certify(self, domains: NeuronDomains, found: Left) -> Left:
        done = self.goal.closed(self, domains, found.found)
        self.statistics.closed += int(done.sum())
        return Left(domains, found.found, (~done).nonzero()[:, 0])

    def offer(self, left: Left) -> Witness | None:
        return self.goal.offer(self, left.found, left.still) if left.still.shape[0] else None

    def push(self, left: Left) -> None:
        """Domains with a free neuron go into the pool with ranked candidates, the others to the goal."""
        if left.still.shape[0] == 0:
            return
        part = self.brancher.rank(left.domains, left.found, left.still)
        decided = (part.signs != 0).all(1) if self.space.size else torch.ones_like(part.case, dtype=torch.bool)
        if bool(decided.any()):
            for i in decided.nonzero()[:, 0].tolist():
                witness = self.goal.leaf(self, part[i : i + 1])
                self.witness = self.witness or witness
            part = part[~decided]
        self.pool.push(part)

    # -- limits -----------------------------------------------------------------------------------------------------

    def shrink(self, count: int) -> None:
        self.bounder.close()
        self.batch = max(1, count // 2)

    def undo(self, before: SearchStatistics) -> None:
        self.statistics.restore(before)

    def postpone(self, domains: NeuronDomains, error: VerifierError) -> None:
        raise type(error)(str(error)) from error  # a new one: whose frames die with it

    def full(self) -> Stop:
        return self.goal.full(self)

    # -- what other groups and the user are told ------------------------------------------------------------------

    def count(self) -> SearchStatistics:
        return replace(self.statistics, open=self.pool.count, worst=self.pool.worst())

    def minimisers(self, count: int) -> np.ndarray | None:
        """(k, n_in) points where bounds of open domains are smallest, at most ``count``; None without any."""
        batch = max(1, self.batch // 2)
        return minimisers(self.bounder, self.pool, self.schedule, self.deadline, batch, count)

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

    def give(self, count: int) -> OpenNeuronDomains:
        order = torch.argsort(self.pool.gaps, stable=True)
        out = self.pool.take(order[every(self.pool.count, count).to(order.device)])
        small = self.cases.rows * self.space.size * 4 <= _WARM_BYTES
        return out if small else replace(out, alpha_beta=out.alpha_beta[..., :0])

    def take(self, domains: OpenNeuronDomains) -> None:
        self.pool.push(self._warmed(domains))


class Refutation:
    """The goal of a search for counterexamples: every case is refuted.

    Args:
        replay: judges a candidate (n_in,).
        enough: bounded domains after which the search stops unless few of its open domains are left.
    """

    def __init__(
        self, context: SearchContext, replay: Callable[[np.ndarray], Witness | None], enough: float = math.inf
    ) -> None:
        self.leaf_lp, self.real_suffices = context.config.leaf_lp, context.claims.semantics is not Semantics.FLOAT32
        self.replay, self.leaves = replay, LeafSolver(context.graph, context.backend)
        self.enough, self._most_open = enough, 0

    def pick(self, splitting: NeuronSplitting) -> OpenNeuronDomains:
        """The worst ones, while there is room for more of them."""
        crowded = splitting.pool.nbytes() > splitting.memory_limit // 2
        return splitting.pool.by_gap(max(1, splitting.batch // 2), worst_first=not crowded)

    def closed(self, splitting: NeuronSplitting, domains: NeuronDomains, found: Bounded) -> Tensor:
        return splitting.certificates.closed(domains, found)

    def offer(self, splitting: NeuronSplitting, found: Bounded, still: Tensor) -> Witness | None:
        """Minimisers that violate the property most."""
        return offer(splitting.backend, found.slack, found.points, still, self.replay)

    def leaf(self, splitting: NeuronSplitting, domain: OpenNeuronDomains) -> Witness | None:
        """Every neuron is decided: an LP whose duals certify, or whose minimiser may be a counterexample."""
        statistics, cases, space = splitting.statistics, splitting.cases, splitting.space
        statistics.leaves += 1
        if not self.leaf_lp or splitting.deadline.expired():
            statistics.stuck += 1
            return None
        case = domain.case
        strict = None if cases.strict is None else cases.strict[case][0]
        found = self.leaves.solve(
            replace(splitting.state, bounds=space.domain_bounds(domain.signs)),
            space.multiplier_signs(domain.signs),
            LeafRows(cases.spec.select(case), cases.thresholds[case][0], strict),
            splitting.deadline,
        )
        weak = found.real and not found.closed and self.real_suffices
        if found.closed or weak:
            statistics.closed += 1
            run = splitting.state.magnitudes.run is not None
            covered = Covered(int(weak or not run), found.bound + found.error, found.error)
            statistics.covered.add(covered)
            splitting.certificates.strong.add(covered)
            return None
        statistics.stuck += 1
        if found.candidate is not None and splitting.witness is None:
            return self.replay(found.candidate)
        return None

    def full(self, splitting: NeuronSplitting) -> Stop:
        if splitting.pool.nbytes() > splitting.memory_limit:
            return Stop.MEMORY
        now = splitting.pool.count
        self._most_open = max(self._most_open, now)
        drains = now < _DRAINED * self._most_open
        return Stop.DOMAINS if splitting.statistics.bounded >= self.enough and not drains else Stop.NONE
