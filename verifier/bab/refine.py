"""Tighter bounds of hidden neurons at the root, by splitting neurons below them.

The bounds of the hidden neurons stay as the root found them during the whole search, so that a search with loose ones
is hopeless. Here every undecided neuron of a layer is a small search of its own: its lower and its negated upper bound
are rows over the network cut off at that layer, and in every round the worst domain of each row is split. What a row
gains is the least certified bound of the domains that cover the box. Layers go in topological order, so that deeper
ones profit from what was found before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from verifier.bab import relu_split
from verifier.bab.bounder import Bounded, CaseRows
from verifier.bab.certify import Certificates
from verifier.bab.compact import compact
from verifier.bab.compact import size as compact_size
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.exchange import Exchange
from verifier.bab.kernel import Kernel
from verifier.bab.learning import attempt
from verifier.bab.pool import Pool
from verifier.bab.relu_split import NeuronSplitting, SearchResult
from verifier.bab.search import branch_and_bound
from verifier.bab.splits import split_space
from verifier.bab.statistics import SearchTotals, Stop
from verifier.bounds.alpha import initial_parameters
from verifier.bounds.crown import BoundState, Specification, exact_by_ibp, preactivations, tighten, undecided
from verifier.core.backend import ParallelBackend
from verifier.core.claims import Covered
from verifier.core.device import facts
from verifier.core.errors import MemoryExceeded
from verifier.core.memory import in_halves, out_of_memory
from verifier.graph.graph import Graph
from verifier.proof.leaves import LeafLog, coarse

# Multiplications and additions that bounding a child takes per number in the matrices.
_PASSES = 100.0
# Splits of one neuron's rows.
_MOST_SPLITS = 2048
# Optimiser steps of children; rows start with as many as the configuration says, and more gain little after that.
_LATER_STEPS = 5
# Rows are given as dense coefficients on their layer.
_MOST_COEFFICIENTS = 1 << 25
# Seconds of the first refinement, at least; every later one takes so many times longer, and the last one a share of the
# time that is left. A search before the first has a part of its time, as most queries that it leaves are quick once the
# bounds are tighter.
_FIRST, _GROWTH, _LAST, _BEFORE = 0.4, 4.0, 0.3, 0.125
# A refinement is worth its while when every undecided neuron gets a few splits.
_FEW_ROUNDS = 2
# A search that runs out of open domains goes on for at most so many times its share.
_LONGER = 4
# A refinement after the first that gains less of the total width of undecided neurons is the last one.
_WORTHWHILE = 0.01
# After a look an attack is made anyway. After the second and every later search but the last, a
# counterexample is looked for from so many points, with a share of a whole attack's work that grows as searches do.
_POINTS, _HUNT, _HUNTING = 256, 1 / 32, 1
# The stage after which learning is tried: what is easy has been answered, and little time has gone.
_LEARNING = 1
# Seconds of a look: about as many as a thorough attack takes.
_LOOK = 1.0


@dataclass
class Advance:
    """How far the refinements and searches of a box have come.

    Attributes:
        stage: the next one of :func:`plan`.
        state: the refined bounds so far; None: none are.
    """

    stage: int = 0
    state: BoundState | None = None


def look(context: SearchContext, state: BoundState, cases: CaseRows, advance: Advance) -> SearchResult | None:
    """The first stages of :func:`search` alone; None where nothing is gained by doing them before anything else: the
    first one takes too long, or the network is so small that learning is tried, and an attack takes next to nothing.

    Args:
        advance: takes what has been done; nothing is lost when a search goes on from there.
    """
    return _alternate(context, state, cases, advance, _LOOK)


def search(context: SearchContext, state: BoundState, cases: CaseRows, advance: Advance | None = None) -> SearchResult:
    """:func:`relu_split.search`, with refinements of the hidden bounds between searches of growing size.

    A search that fails goes on with tighter bounds from the start: its domains are worth little in comparison. Groups
    that search apart divide the neurons of a layer among them, and all go on with the bounds that any of them found.

    Args:
        advance: where a look has stopped; default at the beginning.
    """
    ended = _alternate(context, state, cases, advance or Advance(), math.inf)
    assert ended is not None
    return ended


def _alternate(
    context: SearchContext, state: BoundState, cases: CaseRows, advance: Advance, seconds: float
) -> SearchResult | None:
    """Stages until one decides, or for so many planned seconds; None when not even the first one is that short."""
    graph, backend, config, group = context.graph, context.backend, context.config, context.team
    limit: float = group.broadcast_object(min(context.deadline.remaining(), 600.0))
    net = compact(graph, backend, state.box, split_space(graph, backend, state.bounds), cases.spec, cases.thresholds)
    rate = 0.0 if net is None else children_per_second(net.multiplications, backend.device)
    stages = [Stage(0.0, math.inf)]
    if net is not None and config.max_domains is None:
        stages = plan(limit, least_refinement(net.size, rate))
    ended: SearchResult | None = None
    covered = Covered()
    hunting = max(0, min(_HUNTING, len(stages) - 2))
    learns = state.proof is None and attempt.worthwhile(context, net, cases, state)  # proof files have no clauses
    learning = min(_LEARNING, len(stages) - 2) if learns else -1
    looking = seconds < math.inf
    if looking:
        spent = accumulate(stage.refinement + stage.search for stage in stages)
        stages = [] if learning >= 0 else [s for s, upto in zip(stages, spent, strict=True) if upto <= seconds]
    first = min(advance.stage, max(0, len(stages) - 1))
    state = advance.state or state
    for number, stage in list(enumerate(stages))[first:]:
        last = stage.search == math.inf
        if stage.refinement:
            before = _width(graph, state)
            state = advance.state = refine(context, state, stage.refinement)
            idle = _width(graph, state) > (1 - _WORTHWHILE) * before
            last = group.broadcast_object(last or (number > 1 and idle))
        advance.stage = number + 1
        most = None if last else max(100, int(stage.search * rate))
        part = config if most is None else config.model_copy(update={"max_domains": _LONGER * most})
        enough = math.inf if most is None else most / group.size
        starts = number == len(stages) - 1 if looking else not last and number >= hunting
        wanted = _POINTS if context.hunt is not None and starts else 0
        found = relu_split.search(replace(context, config=part), state, cases, enough=enough, wanted=wanted)
        ended = replace(found, totals=found.totals.after(None if ended is None else ended.totals))
        if ended.witness is not None or not ended.open or last or ended.stop is not Stop.DOMAINS:
            break
        if context.hunt is not None and found.points is not None and not looking:
            witness = context.hunt(found.points, min(1.0, _HUNT * _GROWTH ** (number - hunting)))
            if witness is not None:
                return replace(ended, witness=witness)
        if number == learning:
            ended, cases = _learned(context, state, cases, ended, covered)
            if ended.witness is not None or not ended.open:
                break
    if ended is None:
        return None
    weak = ended.weak and replace(ended.weak, covered=_sum(covered, ended.weak.covered))
    return replace(ended, covered=_sum(covered, ended.covered), weak=weak)


def _sum(first: Covered, second: Covered) -> Covered:
    total = replace(first)
    total.add(second)
    return total


def _learned(
    context: SearchContext, state: BoundState, cases: CaseRows, ended: SearchResult, covered: Covered
) -> tuple[SearchResult, CaseRows]:
    """How things stand after an attempt to learn, and the cases that it leaves.

    Args:
        ended: the search before.
        covered: takes what the clauses of the other cases hold for.
    """
    found = attempt.learn(context, state, cases)
    covered.add(found.covered)
    left = (~found.refuted).nonzero()[:, 0]
    before = ended.totals.statistics
    counts = replace(found.statistics, open=before.open, stuck=before.stuck, worst=before.worst)
    if not left.numel():
        counts = found.statistics
    totals = SearchTotals(counts, ended.totals.groups).after(replace(ended.totals, groups=()))
    done = found.witness is not None or not left.numel()
    open_count = 0 if done else ended.open
    ended = replace(ended, witness=found.witness, open=open_count, totals=totals, covered=Covered())
    return (replace(ended, reason="", stop=Stop.NONE) if done else ended), cases.select(left)


class Stage(NamedTuple):
    """Seconds of a refinement, perhaps none, and of the search after it; both are turned into counts."""

    refinement: float
    search: float


def plan(limit: float, least: float) -> list[Stage]:
    """Refinements and searches of growing size, so that what is easy does not wait for what hard queries need. Their
    sizes do not depend on the limit, but for the last one's.

    Args:
        limit: seconds for everything.
        least: seconds below which no refinement is worth its while.

    Returns:
        stages whose last search is infinite.
    """
    size = max(_FIRST, least)
    stages = [Stage(0.0, _BEFORE * size)]
    left = limit - _BEFORE * size
    while size <= _LAST * left:
        stages.append(Stage(size, size))
        left -= 2 * size
        size *= _GROWTH
    if len(stages) > 1 and _LAST * left < 2 * size / _GROWTH:  # nearly as much was done before
        return [*stages[:-1], Stage(stages[-1].refinement, math.inf)]
    if _LAST * left < least:
        return [Stage(0.0, math.inf)]
    return [*stages, Stage(_LAST * left, math.inf)]


def least_refinement(columns: int, rate: float) -> float:
    """Seconds for a few splits of every undecided neuron.

    Args:
        columns: undecided neurons.
        rate: children a second.
    """
    return 2 * _FEW_ROUNDS * columns / rate


def affordable(graph: Graph, backend: ParallelBackend, state: BoundState, limit: float) -> bool:
    """Whether there is time to refine the hidden bounds, and some more.

    Args:
        limit: time limit of the query in seconds; infinite counts as ten minutes.
    """
    found = compact_size(graph, backend, split_space(graph, backend, state.bounds))
    if found is None:
        return False
    columns, numbers = found
    return least_refinement(columns, children_per_second(numbers, backend.device)) < 0.1 * min(limit, 600.0)


def children_per_second(multiplications: int, device: torch.device) -> float:
    """Roughly how many children of a compact network are bounded, branching and certification included."""
    known = facts(device)
    return known.child_flops / (_PASSES * multiplications + known.child_fixed_work)


def _width(graph: Graph, state: BoundState) -> float:
    """Total width of the undecided pre-activations."""
    total = 0.0
    for i in preactivations(graph):
        mask = undecided(graph, i, state.bounds[i])
        total += float((state.bounds[i].upper - state.bounds[i].lower)[mask].double().sum())
    return total


def refine(context: SearchContext, state: BoundState, seconds: float) -> BoundState:
    """Tighten the pre-activations of one box; the ranks of the team do some of the neurons each.

    Args:
        state: root bounds (1, *shape).
        seconds: about how long it may take; turned into a number of rounds by counting, so that equal queries get equal
            bounds unless the deadline comes first.

    Returns:
        a state with bounds at least as tight, certified when ``state`` is; equal bits on all ranks.
    """
    graph, group, deadline = context.graph, context.team, context.deadline
    state = replace(state, bounds=dict(state.bounds))
    layers = [i for i in preactivations(graph) if not exact_by_ibp(graph, graph.nodes[i])]
    # Half of the time that is left is the most that a slow machine may spend.
    deadline = deadline.sub(0.5 * min(deadline.remaining(), 600.0))
    context = replace(context, deadline=deadline)
    for place, index in enumerate(layers):
        elements = _undecided(graph, state, index)
        if not elements.numel() or 2 * elements.numel() * graph.nodes[index].size > _MOST_COEFFICIENTS:
            continue
        context.progress.update(step=f"splits for the bounds of {graph.nodes[index].name}")
        # Layers get equal shares: deeper ones have harder rows and matter more. What one leaves goes to the next ones.
        share = seconds / (len(layers) - place)
        mine = torch.arange(elements.numel(), device=elements.device)[group.rank :: group.size]  # perhaps none
        lower = torch.full((2 * elements.numel(),), -torch.inf, dtype=torch.float64, device=elements.device)
        try:
            found, spent = _bound_layer(context, state, index, elements[mine], share)
        except (MemoryExceeded, RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryExceeded) or out_of_memory(error)):
                raise
            found, spent = None, 0.0  # nobody relies on this layer's bounds becoming tighter
        if found is not None:
            lower[torch.cat([mine, mine + elements.numel()])] = found
        tighten(state, index, elements, group.all_gather(lower).amax(0)[None])
        told = group.numbers([spent, float(deadline.expired())])
        seconds -= sum(took for took, _ in told)  # of all ranks, so that none has less to do than another
        if any(over for _, over in told):
            break
    return state


def _undecided(graph: Graph, state: BoundState, index: int) -> Tensor:
    return undecided(graph, index, state.bounds[index]).flatten().nonzero()[:, 0]


def _bound_layer(
    context: SearchContext, state: BoundState, index: int, elements: Tensor, seconds: float
) -> tuple[Tensor | None, float]:
    """Lower bounds (2n,) of +z and of -z of some neurons, or None when they cannot be searched.

    The groups of the team share the layer's neurons. Each has as large a part of the time and of a batch, so that every
    neuron gets about the splits, in rounds of about the size, that it would get from one group.

    Args:
        seconds: for the whole layer.

    Returns:
        the bounds, and the seconds that the work is expected to have taken.
    """
    graph, groups = context.graph, context.team.size
    n, node, device = elements.numel(), graph.nodes[index], context.backend.device
    if not n:
        return None, 0.0
    below = Graph(graph.nodes[: index + 1], index, graph.parameters)
    y = torch.zeros((2 * n, 1, node.size), dtype=torch.float64, device=device)
    y[torch.arange(2 * n, device=device), 0, torch.cat([elements, elements])] = 1.0
    y[n:] *= -1
    slopes, _ = initial_parameters(below, state.bounds, 1, index)
    parameters = {i: {k: v[0].expand(2 * n, *v.shape[1:]) for k, v in group.items()} for i, group in slopes.items()}
    cases = CaseRows(
        Specification(y.reshape(2 * n, 1, *node.shape)),
        torch.zeros((2 * n, 1), dtype=torch.float64, device=device),
        parameters,
        torch.ones((2 * n, 1), dtype=torch.bool, device=device),  # a neuron that only reaches zero has its sign
    )
    # Rows are seldom near their threshold: probing narrows them by some percent and takes as much longer.
    config = context.config.model_copy(update={"probes": 0})
    alone = SearchContext(below, context.backend, config, context.deadline)
    exchange: Exchange[OpenNeuronDomains] = Exchange(alone)
    goal = RaisedRows(2 * n, device, groups)
    splitting = NeuronSplitting(alone, state, cases, exchange.deadline, goal, _LATER_STEPS)
    if not isinstance(splitting.bounder, Kernel):
        return None, 0.0
    rate = children_per_second(splitting.bounder.net.multiplications, device)
    # The rows themselves count once; a split is two children with a quarter of the steps, and certificates.
    goal.splits = int(min(_MOST_SPLITS * n, seconds / groups * rate - 2 * n))
    if goal.splits < 2 * n:
        return None, 0.0
    log = splitting.certificates.log = None if state.proof is None else LeafLog(splitting.space.size)
    try:
        branch_and_bound(splitting, exchange)
        lower = goal.lower(splitting)
        if log is not None and state.proof is not None:
            state.proof.claim(state.bounds, index)
            tighten(state, index, elements, lower[None])
            state.proof.refined(index, elements, state.bounds[index], log, splitting.space.columns)
        return lower, (2 * n + goal.done) / rate
    finally:
        splitting.bounder.close()
        if log is not None:
            log.close()


class RaisedRows:
    """The goal of a refinement: certified lower bounds of many rows, 0 at most; every row has its own frontier.

    Args:
        rows: how many; the second half are the negated rows of the first.
        groups: a round takes this part of a batch.

    Attributes:
        splits: about so many are made; ``done``: so many were, small rounds counting for what they cost.
    """

    def __init__(self, rows: int, device: torch.device, groups: int) -> None:
        self.rows, self.groups = rows, groups
        self.splits = self.done = 0
        self._idle = False
        self._refuted: list[NeuronDomains] = []
        self._value = torch.zeros(rows, dtype=torch.float64, device=device)
        self._before = torch.full((rows,), -torch.inf, device=device)
        self._gain = torch.full_like(self._before, torch.inf)
        self._picked = torch.zeros(rows, dtype=torch.bool, device=device)

    def pick(self, splitting: NeuronSplitting) -> OpenNeuronDomains:
        """The worst ones of the rows that gain most from splits.

        Few domains of every row at a time find better splits; a device wants full batches. A round costs something
        however small it is.
        """
        full = -(-max(1, splitting.batch // 2) // self.groups)
        domains = splitting.pool.domains
        worst = torch.full_like(self._before, torch.inf).scatter_reduce_(0, domains.case, domains.gap, "amin")
        # A row's area of relaxation shrinks with its own bound, in proportion to the other one of its neuron.
        gain = (worst - self._before) * -worst.roll(self.rows // 2).clamp(max=0)
        self._gain = torch.where(self._picked, gain.nan_to_num(nan=0.0), self._gain)
        self._before = torch.where(self._picked | self._before.isneginf(), worst, self._before)
        out, self._picked = worst_of_each(splitting.pool, full, self._gain)
        self._idle = not out.count
        self.done += 0 if self._idle else max(full // 4, out.count)
        return out

    def closed(self, splitting: NeuronSplitting, domains: NeuronDomains, found: Bounded) -> Tensor:
        """(B,) bool: domains that float32 refutes. They leave the frontier, and what they really give counts for their
        row's bound, later and for many at once: a certificate of few takes as long as one of many. Where it falls
        short, the row ends a rounding below zero.
        """
        more = splitting.aim[domains.case].to(found.gap.dtype)  # a hair below zero is as good as undecided
        done = splitting.certificates.refuted(domains.case, found.gap - more)
        index = done.nonzero()[:, 0]
        if index.numel():
            self._refuted.append(NeuronDomains(domains.case[index], domains.signs[index], found.alpha_beta[index]))
        if sum(part.count for part in self._refuted) >= splitting.batch:
            self._account(splitting.certificates)
        return done

    def offer(self, splitting: NeuronSplitting, found: Bounded, still: Tensor) -> None:
        """A row has no counterexample."""

    def leaf(self, splitting: NeuronSplitting, domain: OpenNeuronDomains) -> None:
        """A domain that cannot be split further stays on the frontier as it is."""
        splitting.pool.push(replace(domain, gap=torch.full_like(domain.gap, float("inf"))))

    def full(self, splitting: NeuronSplitting) -> Stop:
        return Stop.DOMAINS if self._idle or self.done >= self.splits else Stop.NONE

    def lower(self, splitting: NeuronSplitting) -> Tensor:
        """(rows,) bounds, when the search has ended."""
        self._account(splitting.certificates)
        if splitting.pool.count:
            self._lower_values(splitting.certificates, splitting.pool.domains.plain)
        return self._value

    def _account(self, certificates: Certificates) -> None:
        """Lower the rows' bounds to what the domains that left the frontier give."""
        if self._refuted:
            self._lower_values(certificates, NeuronDomains.cat(self._refuted))
        self._refuted = []  # not before: where memory fails they must be tried again

    def _lower_values(self, certificates: Certificates, domains: NeuronDomains) -> None:
        """Lower the rows' bounds to those of some domains; in parts where memory is short."""

        def work(part: NeuronDomains) -> None:
            if certificates.log is not None:
                part = replace(part, alpha_beta=coarse(part.signs, part.alpha_beta))
            lower, _ = certificates.lower(part)
            self._value.scatter_reduce_(0, part.case, lower[:, 0], "amin")
            if certificates.log is not None:
                certificates.note(certificates.log, part, lower, torch.ones_like(part.case, dtype=torch.bool))

        def failed(part: NeuronDomains, error: Exception) -> bool:
            if part.count == 1:
                raise MemoryExceeded("not even one domain fits") from error
            return True

        in_halves([domains], work, failed)


def worst_of_each(pool: Pool[OpenNeuronDomains], most: int, gain: Tensor) -> tuple[OpenNeuronDomains, Tensor]:
    """Take equally many domains of some cases whose neurons are not decided, the worst ones, ``most`` in all; none with
    an infinite gap, which are final. These cases are the half that gains most from splits.

    Args:
        gain: (cases,) of the last splits of each; the second half are the negated rows of the first. At least one
            domain of each that is chosen is taken.

    Returns:
        the domains, and (cases,) bool, the cases that they belong to.
    """
    domains, cases = pool.domains, gain.shape[0]
    final = torch.isinf(domains.gap)
    covered = domains.case.bincount(minlength=cases) > 0
    searched = domains.case[~final].bincount(minlength=cases) > 0
    wanted = covered.roll(cases // 2) & searched
    value = gain[wanted].sort(descending=True).values
    if value.shape[0]:
        wanted &= gain >= value[(value.shape[0] - 1) // 2]
    each = max(1, most // max(1, int(wanted.sum())))
    order = domains.gap.argsort(stable=True)
    order = order[domains.case[order].argsort(stable=True)]
    case = domains.case[order]
    place = torch.arange(case.shape[0], device=case.device)
    first = torch.ones_like(case, dtype=torch.bool)
    first[1:] = case[1:] != case[:-1]
    start = torch.where(first, place, 0).cummax(0).values
    taken = torch.zeros_like(first)
    taken[order] = place - start < each
    taken &= wanted[domains.case] & ~final
    return pool.take(taken.nonzero()[:, 0]), wanted
