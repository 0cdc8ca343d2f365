"""Branch and bound on ReLU splits with beta-CROWN: the cases of one input box, to a proof or a counterexample.

Bunel et al., JMLR 2020, with the bounds of Wang et al., *Beta-CROWN*, NeurIPS 2021.

A domain is a case of the problem plus the signs of the neurons that were split. Every round takes the worst domains,
chooses a neuron for each, bounds the two children by optimising slopes and split multipliers from the parent's values,
closes those whose bound is certified, tries the minimisers of the others as counterexamples and puts them back.

The answer is a proof only when no domain is left. A domain leaves the pool in three ways alone: its bound is certified
above the threshold, it is replaced by two children that cover it, or an LP certificate closes it. Before a domain is
split, sides of other splits are probed: one that is certified to be refuted is a closed child, and the domain goes on
as the other child.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verifier.bab.bounder import Bounded, Bounder, CaseRows, Domains, WalkBounder, domain_parameters
from verifier.bab.branching import babsr, kfsb, probing
from verifier.bab.compact import compact
from verifier.bab.context import SearchContext
from verifier.bab.kernel import Kernel
from verifier.bab.leaf_lp import solve_leaf
from verifier.bab.pool import Fields, Pool
from verifier.bab.recordings import recordings
from verifier.bab.splits import SplitSpace, split_space
from verifier.bab.team import Ending, Figures, Stop, Team, every
from verifier.bounds.alpha import Parameters, Schedule
from verifier.bounds.crown import BoundState, crown_rows
from verifier.bounds.touch import near, touched
from verifier.core.claims import Covered, Semantics, real_part
from verifier.core.errors import MemoryExceeded
from verifier.core.memory import out_of_memory
from verifier.core.numerics import proved
from verifier.core.result import Witness

__all__ = ["CaseRows", "SearchResult", "search"]

# Columns at which a domain is split at once.
_MOST_DEPTH = 3
# Numbers in the widest table of a batch up to which a CPU spends more time on calling kernels than in them.
_FREE_NUMBERS = 1 << 15
# Sides probed per domain where the configuration leaves it open. On a GPU probing takes as long as what it saves.
_PROBES = {"cpu": 4, "cuda": 0}

# What makes a domain's children start well but is not needed to know the domain; other groups get it while it is small.
_WARM = ("theta",)
_WARM_BYTES = 64 << 10

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
        stop: the limit that ended it.
        covered: what the bounds that closed domains hold for.
    """

    witness: Witness | None
    open: int
    reason: str
    statistics: dict[str, Any] = field(default_factory=dict)
    stop: Stop = Stop.NONE
    covered: Covered = field(default_factory=Covered)


def search(context: SearchContext, state: BoundState, cases: CaseRows) -> SearchResult:
    """Refute all cases on one box, or find a counterexample.

    Args:
        state: root bounds (1, *shape).
    """
    return _Search(context, state, cases).run()


def _domains(fields: Fields) -> Domains:
    return Domains(fields["case"], fields["signs"], fields["theta"])


def _joined(parts: Sequence[Domains]) -> Domains:
    return Domains(
        torch.cat([p.case for p in parts]), torch.cat([p.signs for p in parts]), torch.cat([p.theta for p in parts])
    )


def _fields(domains: Domains) -> Fields:
    return {"case": domains.case, "signs": domains.signs, "theta": domains.theta}


def _sign(side: Tensor) -> Tensor:
    """int8 sign of the split that a side stands for."""
    return (1 - 2 * (side % 2)).to(torch.int8)


def _sided(domains: Domains, parent: Tensor, side: Tensor, push: Tensor) -> Domains:
    """(n,) domains split to one side each, with the multiplier ``push`` on it."""
    part = domains[parent]
    column, at = side // 2, torch.arange(parent.shape[0], device=parent.device)
    signs, theta = part.signs.clone(), part.theta.clone()
    signs[at, column] = _sign(side)
    theta[at, :, column] = push[:, None]
    return Domains(part.case, signs, theta)


def _first(keys: Tensor) -> Tensor:
    """Positions at which some value occurs for the first time, ascending."""
    values, place = torch.unique(keys, return_inverse=True)
    position = torch.arange(keys.shape[0], device=keys.device)
    first = torch.full_like(values, keys.shape[0]).scatter_reduce_(0, place, position, "amin")
    return first.sort().values


def _rows(fields: Fields, index: Tensor | slice) -> Fields:
    """Some of the domains."""
    return {k: v[index] for k, v in fields.items()}


class _Search:
    """One search: the root's data and the pool. Every method is one step of a round."""

    def __init__(self, context: SearchContext, state: BoundState, cases: CaseRows) -> None:
        self.claims, self.covered, self.waiting = context.claims, Covered(), 0
        self.graph, self.backend, self.state, self.cases = context.graph, context.backend, state, cases
        self.config, self.progress = context.config, context.progress
        self.deadline = self.backend.together(context.deadline)
        self.team = Team(context.team, self.backend, context.accept, self.deadline, self.config.max_domains)
        self.accept = self.team.offer
        self.memory_limit = int(self.backend.agree(float(context.memory_limit), "min"))
        self.space: SplitSpace = split_space(self.graph, self.backend, state.bounds)
        self.rows = cases.thresholds.shape[1]
        self.bounder = self._bounder()
        self.batch = self._batch_size()
        self.pool = Pool()
        self.bounded = self.closed = self.leaves = self.uncertified = self.rounds = 0
        self.stuck = self.split = self.between = self.began = self.forced = 0
        self.witness: Witness | None = None

    def _bounder(self) -> Bounder:
        """The compact network where there is one, else walks on the graph."""
        net = compact(self.graph, self.backend, self.state.box, self.space, self.cases.spec, self.cases.thresholds)
        if net is not None:
            kept = recordings(self.backend.device, self.config.cuda_graphs, self.memory_limit // 4)
            return Kernel(net, self.rows, self.graph.input_shape, kept, self.cases.strict)
        return WalkBounder(self.graph, self.backend, self.state.box, self.space, self.cases)

    def _batch_size(self) -> int:
        """Domains per round: enough to fill the device, few enough for the caches of a CPU."""
        if self.config.batch_size != "auto":
            return self.config.batch_size
        return self._fitting(self.bounder.widest)

    def _fitting(self, widest: int) -> int:
        """How many domains to work on at once when the widest tensor of a row has so many numbers."""
        elements = 1 << (18 if self.backend.device.type == "cpu" else 25)
        return int(max(8, min(elements // (widest * self.rows), 1 << 14)))

    def run(self) -> SearchResult:
        meaning = [torch.tensor([g.value for g in self.space.groups]), *(g.elements for g in self.space.groups)]
        self.team.same([*meaning, self.cases.spec.y, self.cases.thresholds])
        try:
            return self._result(self.team.run(self))
        finally:
            self.bounder.close()

    # -- what the team asks -----------------------------------------------------------------------------------------

    @property
    def roots(self) -> int:
        return int(self.cases.thresholds.shape[0])

    def open(self) -> int:
        return self.pool.count

    def start(self) -> None:
        self._push_roots()
        self.began = self.roots

    def round(self) -> None:
        self.backend.usage.note_domains(self.pool.bytes())
        crowded = self.pool.bytes() > self.memory_limit // 2
        domains = self.pool.pop(self._take(), worst_first=not crowded)
        n = domains["case"].shape[0]
        try:
            children = self._branch(domains)
        except (RuntimeError, MemoryError) as error:
            self._smaller(error, n)
            self.pool.push(domains)
            return
        self._bound(children)
        self.rounds += 1

    def full(self) -> Stop:
        return Stop.MEMORY if self.pool.bytes() > self.memory_limit else Stop.NONE

    def count(self) -> Figures:
        return Figures(
            roots=self.began,
            children=self.bounded - self.began + self.between + self.forced,
            split=self.split,
            closed=self.closed,
            stuck=self.stuck,
            open=self.pool.count,
            bounded=self.bounded,
            rounds=self.rounds,
            leaves=self.leaves,
            uncertified=self.uncertified,
            forced=self.forced,
            worst=self.pool.worst(),
            weak=self.covered.weak,
            margin=self.covered.margin,
            error=self.covered.error,
        )

    def show(self, others: Figures) -> None:
        self.progress.update(
            open=self.pool.count + self.stuck + others.open + others.stuck,
            done=self.closed + others.closed,
            domains=self.bounded + others.bounded,
            worst=min(self.pool.worst(), others.worst),
        )

    def give(self, count: int) -> Fields:
        out = self.pool.sample(every(self.pool.count, count))
        small = self.rows * self.space.size * 4 <= _WARM_BYTES
        return out if small else {k: v for k, v in out.items() if k not in _WARM}

    def take(self, domains: Fields) -> None:
        self.pool.push({**self._warm(domains["case"], domains["signs"]), **domains})

    def _take(self) -> int:
        return max(1, self.batch // 2)

    def _result(self, ending: Ending) -> SearchResult:
        total = ending.total
        open_domains = total.open + total.stuck
        done = open_domains == 0 or ending.witness is not None
        statistics = {
            "domains": total.bounded,
            "closed": total.closed,
            "open": open_domains,
            "leaves": total.leaves,
            "rounds": total.rounds,
            "uncertified": total.uncertified,
            "forced": total.forced,
            "worst": total.worst if total.open else 0.0,
        }
        if ending.groups:
            statistics["groups"] = ending.groups
        reason = "" if done else _REASONS[ending.stop]
        return SearchResult(ending.witness, open_domains, reason, statistics, ending.stop, total.covered)

    def _push_roots(self) -> None:
        """One domain per case, without splits."""
        device = self.backend.device
        case = torch.arange(self.roots, device=device)
        signs = torch.zeros((self.roots, self.space.size), dtype=torch.int8, device=device)
        self._bound({"case": case, "signs": signs, **self._warm(case, signs)})

    def _warm(self, case: Tensor, signs: Tensor) -> Fields:
        """Slopes and multipliers to start from without a parent: the root's slopes and zero."""
        lead = (int(case.shape[0]), self.rows)
        parameters = {i: p["alpha"][case] for i, p in self.cases.parameters.items() if "alpha" in p}
        return {"theta": self.space.collect(parameters, lead) * (signs[:, None] == 0)}

    # -- bounding -----------------------------------------------------------------------------------------------

    def _bound(self, domains: Fields) -> None:
        """Optimise, close what is certified, and put the rest into the pool (or to the LP at leaves).

        A batch that does not fit into memory is halved and tried again.
        """
        size = domains["case"].shape[0]
        self.bounded += size
        work = [_rows(domains, slice(i, i + self.batch)) for i in range(0, size, self.batch)]
        while work and self.witness is None:
            part = work.pop()
            before = self.closed, self.stuck, self.leaves, self.uncertified
            covered, waiting = replace(self.covered), self.waiting
            try:
                self._settle(_domains(part))
            except (RuntimeError, MemoryError) as error:
                n = part["case"].shape[0]
                self._smaller(error, n)
                self.closed, self.stuck, self.leaves, self.uncertified = before
                self.covered, self.waiting = covered, waiting
                work += [_rows(part, slice(0, n // 2)), _rows(part, slice(n // 2, n))]

    def _smaller(self, error: Exception, n: int) -> None:
        """Halve the batch after an allocation failed; raise what else it was, and where that would not help."""
        if not out_of_memory(error):
            raise error
        if self.backend.size > 1:  # the other ranks of a group go on: only the end of the job is safe
            raise MemoryExceeded(f"a batch of {n} domains does not fit; make bab.batch_size smaller") from error
        if n == 1:
            raise MemoryExceeded("not even one domain fits") from error
        self.bounder.close()
        self.batch = max(1, n // 2)

    def _settle(self, domains: Domains) -> None:
        """Optimise a batch; close or store every domain of it."""
        config = self.config
        schedule = Schedule(config.iterations, config.learning_rate_alpha, config.learning_rate_beta, 0.98)
        found = self.bounder.optimise(domains, schedule, self.deadline)
        done = self._certified(domains, found)
        self.closed += int(done.sum())
        self._store(domains, found, (~done).nonzero()[:, 0])

    def _certified(self, domains: Domains, found: Bounded) -> Tensor:
        """(B,) bool: domains that are refuted, in float64 with rounding charged when the state is certified."""
        done = self._refuted(domains.case, found.gap)
        if self.state.certified and bool(done.any()):
            index = done.nonzero()[:, 0]
            sure = self._certify(domains, found, index)
            done[index] = sure
            self.uncertified += int((~sure).sum())
        return self._with_touched(domains, found, done)

    def _refuted(self, case: Tensor, gap: Tensor) -> Tensor:
        """(B,) bool: domains with a row whose bound (B, S), less its threshold, refutes it; as good as the bound is."""
        return proved(gap, torch.zeros_like(gap), self.cases.strict_of(case)).any(1)

    def _with_touched(self, domains: Domains, found: Bounded, done: Tensor) -> Tensor:
        """Add the domains whose strict rows only touch their thresholds."""
        strict = self.cases.strict_of(domains.case)
        if strict is None:
            return done
        thresholds = self.cases.thresholds[domains.case]
        index = (near(found.gap.amax(1), thresholds, strict) & ~done).nonzero()[:, 0]
        if index.numel():
            case, bounds = domains.case[index], self.space.domain_bounds(domains.signs[index])
            spec = self.cases.spec.select(case)
            hits = touched(self.graph, self.backend, self.state.box, bounds, spec, thresholds[index], strict[index])
            if self.claims.semantics is not Semantics.FLOAT32:  # nothing is left for the error of a run
                done[index] = hits
                self.covered.weak += int(hits.sum())
        return done

    def _certify(self, domains: Domains, found: Bounded, index: Tensor) -> Tensor:
        """(n,) bool: whether some row of these domains is refuted in float64 with every rounding charged, as far as
        the claims ask."""
        others = found.parameters and {i: {k: v[index] for k, v in d.items()} for i, d in found.parameters.items()}
        part = Domains(domains.case[index], domains.signs[index], found.theta[index])
        lower, error = self._lower(part, others)
        sure, real = self._refutes(part.case, lower), self._refutes(part.case, real_part(lower, error))
        weak = real & ~sure
        count = int(weak.sum())
        if count and not self.claims.real_closes(self.waiting, self.bounded):
            self.waiting += count
            weak, count = torch.zeros_like(weak), 0
        self._note(part.case, lower, error, sure | weak, count)
        return sure | weak

    def _refutes(self, case: Tensor, lower: Tensor) -> Tensor:
        """(n,) bool: whether some row's bound (n, S) refutes it."""
        return proved(lower, self.cases.thresholds[case], self.cases.strict_of(case)).any(1)

    def _note(self, case: Tensor, lower: Tensor, error: Tensor, closed: Tensor, weak: int) -> None:
        """What the bounds of the closed ones among some domains cover."""
        gap, row = (lower - self.cases.thresholds[case]).max(1)
        errors = error.gather(1, row[:, None])[:, 0]
        if self.state.charges.run is None:
            weak = int(closed.sum())
        self.covered.note(gap[closed], errors[closed], weak)

    def _proved(self, domains: Domains) -> Tensor:
        """(n,) bool: whether some row of every domain is refuted at these slopes and multipliers, as :meth:`_lower`,
        for all that the root's bounds hold for."""
        lower, error = self._lower(domains)
        sure = self._refutes(domains.case, lower)
        self._note(domains.case, lower, error, sure, 0)
        return sure

    def _lower(self, domains: Domains, others: Parameters | None = None) -> tuple[Tensor, Tensor]:
        """(B, S) bounds at given slopes and multipliers, in float64, certified when the state is, and the error of a
        run that they allow for.

        Args:
            others: relaxation parameters besides the columns'; default the root's.
        """
        step = self._fitting(max(n.size for n in self.graph.whole.nodes))
        parts = []
        for first in range(0, domains.count, step):
            some = slice(first, first + step)
            part = domains[some]
            state = replace(self.state, bounds=self.space.domain_bounds(part.signs))
            own = others and {i: {k: v[some] for k, v in d.items()} for i, d in others.items()}
            parameters = domain_parameters(self.space, self.cases, part, own)
            signs = self.space.multiplier_signs(part.signs)
            # A negative multiplier would prove anything; that there is none must not hang on the search.
            theta = part.theta.clamp(min=0)
            multipliers = self.space.scatter(torch.where(part.signs[:, None] == 0, 0.0, theta))
            splits = {i: signs[i].double() * m.double() for i, m in multipliers.items()}
            rows = self.cases.spec.select(part.case)
            lower, walk = crown_rows(self.graph, self.backend, state, rows, parameters, splits, torch.float64)
            parts.append((lower, walk.error.expand_as(lower)))
        return torch.cat([lower for lower, _ in parts]), torch.cat([error for _, error in parts])

    # -- open domains ---------------------------------------------------------------------------------------------

    def _store(self, domains: Domains, found: Bounded, still: Tensor) -> None:
        """Try minimisers as counterexamples, rank split candidates, send decided domains to the LP."""
        if still.shape[0] == 0:
            return
        self._try(found, still)
        if self.witness is not None:
            return
        part = _fields(domains[still])
        part["theta"] = found.theta[still]
        part["gap"] = found.gap[still].amax(1)
        part["candidates"] = self._rank(domains, found, still)
        part["probes"], part["pushes"] = self._probes(domains, found, still)
        decided = (part["signs"] != 0).all(1) if self.space.size else torch.ones_like(part["case"], dtype=torch.bool)
        if bool(decided.any()):
            for i in decided.nonzero()[:, 0].tolist():
                self._leaf(_rows(part, slice(i, i + 1)))
            part = _rows(part, ~decided)
        self.pool.push(part)

    def _try(self, found: Bounded, still: Tensor) -> None:
        """Offer the minimisers that violate the property most to the replay."""
        slack = found.slack[still].flatten()
        best = torch.topk(slack, min(3, slack.shape[0]))
        for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if s >= 0 and self.witness is None:
                at = still[i // self.rows] * self.rows + i % self.rows
                self.witness = self.accept(found.points(at[None])[0].reshape(-1).cpu().numpy())

    def _rank(self, domains: Domains, found: Bounded, still: Tensor) -> Tensor:
        """(n, 2k) candidate columns of some domains, from the walk that bounded them."""
        k = min(self.config.candidates, max(1, self.space.size))
        if self.space.size == 0:
            return torch.zeros((still.shape[0], 1), dtype=torch.int64, device=self.backend.device)
        signs, a = domains.signs[still], found.coefficients[still]
        scores = babsr.intercept_scores(self.space, signs, a)
        first = torch.topk(scores, k, dim=1).indices
        if self.config.branching == "babsr":
            return first
        row = found.gap[still].argmax(1)
        gaps = babsr.gap_scores(self.space, signs, a, found.theta[still, row], found.z[still])
        # A column that is ranked by both counts once: mask the first list before taking the second.
        gaps.scatter_(1, first, float("-inf"))
        return torch.cat([first, torch.topk(gaps, k, dim=1).indices], 1)

    @property
    def _most_probes(self) -> int:
        """Sides probed per domain."""
        probes = self.config.probes
        return _PROBES[self.backend.device.type] if probes == "auto" else probes

    def _probes(self, domains: Domains, found: Bounded, still: Tensor) -> tuple[Tensor, Tensor]:
        """(n, k) sides that some domains should be probed at, and multipliers to do it with."""
        gap, row = found.gap[still].max(1)
        a, alpha, z = found.coefficients[still], found.theta[still, row], found.z[still]
        return probing.sides(self.space, domains.signs[still], a, alpha, z, gap, self._most_probes)

    # -- branching --------------------------------------------------------------------------------------------------

    def _branch(self, domains: Fields) -> Fields:
        """The children of some domains, with the books kept of all splits; nothing is kept when it fails."""
        ordered = self._ordered(domains)
        probed, forced, unsure = self._forced(ordered)
        children, split, between = self._children(probed)
        # A forced phase is a split with one child closed; the other one is split in turn.
        self.split += split + forced
        self.between += between + forced
        self.closed += forced
        self.forced += forced
        self.uncertified += unsure
        return children

    def _ordered(self, domains: Fields) -> Fields:
        """The domains with free candidates only, best first; what trying them refutes goes in front of the probes."""
        parents, candidates = _domains(domains), domains["candidates"]
        # Ranked lists can run into split columns when few are free: replace these by the domain's first free column.
        taken = parents.signs.gather(1, candidates) != 0
        first_free = (parents.signs == 0).to(torch.int8).argmax(1, keepdim=True)
        candidates = torch.where(taken, first_free, candidates)
        if self.config.branching == "babsr" or candidates.shape[1] == 1:
            return {**domains, "candidates": candidates}
        gaps = self._trial(parents, candidates)
        out = {**domains, "candidates": kfsb.choose(candidates, gaps)}
        if self._most_probes:
            found = probing.refuted(candidates, gaps)
            out["probes"] = torch.cat([found, domains["probes"]], 1)
            out["pushes"] = torch.cat([torch.zeros_like(found, dtype=domains["pushes"].dtype), domains["pushes"]], 1)
        return out

    def _forced(self, domains: Fields) -> tuple[Fields, int, int]:
        """The domains with phases that follow because the other side is refuted, how many, and how many proofs failed.

        Sound: a side is the domain with one more split. When it is certified to be refuted, the opposite split covers
        what is left of the domain, whatever other phases follow in the same way. The best candidate is left for the
        split.
        """
        if not self._most_probes:
            return domains, 0, 0
        probes = domains["probes"]
        parent, place = ((probes >= 0) & (probes // 2 != domains["candidates"][:, :1])).nonzero(as_tuple=True)
        if not parent.numel():
            return domains, 0, 0
        side, push = probes[parent, place], domains["pushes"][parent, place]
        parents = _domains(domains)
        gaps = [
            self.bounder.evaluate(_sided(parents, parent[s], side[s], push[s]))
            for s in (slice(i, i + self.batch) for i in range(0, parent.numel(), self.batch))
        ]
        hit = (torch.cat(gaps) > 0).nonzero()[:, 0]
        hit = hit[_first(parent[hit] * self.space.size + side[hit] // 2)]
        if not hit.numel():
            return domains, 0, 0
        sure = torch.ones_like(hit, dtype=torch.bool)
        if self.state.certified:
            sure = self._proved(_sided(parents, parent[hit], side[hit], push[hit]))
        unsure, hit = int((~sure).sum()), hit[sure]
        signs, theta = parents.signs.clone(), parents.theta.clone()
        column = side[hit] // 2
        signs[parent[hit], column] = _sign(side[hit] ^ 1)
        theta[parent[hit], :, column] = 0.0  # the new multiplier
        return {**domains, "signs": signs, "theta": theta}, hit.numel(), unsure

    def _children(self, domains: Fields) -> tuple[Fields, int, int]:
        """Split every domain at its first candidate, or at several; all signs.

        Returns:
            the children that are to be bounded, how many splits there were, and how many of them split a child.
        """
        children, candidates = _domains(domains), domains["candidates"]
        origin = torch.arange(children.count, device=candidates.device)
        split = []
        for d in range(self._depth(children.count, candidates.shape[1])):
            children, source, count = self._halves(children, candidates[origin, d : d + 1])
            origin = origin[source]
            split.append(count)  # counted before the halves are made, so that the books would miss a lost one
        return _fields(children), sum(split), sum(split[1:])

    def _halves(self, domains: Domains, column: Tensor) -> tuple[Domains, Tensor, int]:
        """Both sides of a split at one column (B, 1) of every domain, which domain each comes from, and how many split.

        A domain whose column is split already stays as it is: what comes out always covers what came in.
        """
        free = domains.signs.gather(1, column)[:, 0] == 0
        rest, split = (~free).nonzero()[:, 0], free.nonzero()[:, 0]
        part, column = domains[split], column[split]
        # The new multiplier starts at zero.
        theta = part.theta.scatter(2, column[:, None].expand(-1, self.rows, 1), 0.0)
        sides = [Domains(part.case, part.signs.scatter(1, column, sign), theta) for sign in (1, -1)]
        return _joined([domains[rest], *sides]), torch.cat([rest, split, split]), int(split.shape[0])

    def _depth(self, count: int, candidates: int) -> int:
        """Columns that every domain is split at: more than one while a round costs the same with more children."""
        free = self.batch if self.backend.device.type == "cuda" else _FREE_NUMBERS // (self.bounder.widest * self.rows)
        depth = 1
        while depth < min(_MOST_DEPTH, candidates) and count << (depth + 1) < min(free, self.batch):
            depth += 1
        return depth

    def _trial(self, parents: Domains, candidates: Tensor) -> Tensor:
        """(2, B, k) gaps of the children of every candidate, for plus and minus, with the parent's values."""
        b, k = candidates.shape
        repeat = torch.arange(b, device=candidates.device).repeat_interleave(k)
        column = candidates.reshape(-1, 1)
        gaps = []
        for first in range(0, b * k, self.batch):
            some = slice(first, first + self.batch)
            part, split = parents[repeat[some]], column[some]
            theta = part.theta.scatter(2, split[:, None].expand(-1, self.rows, 1), 0.0)
            both = [
                self.bounder.evaluate(Domains(part.case, part.signs.scatter(1, split, sign), theta)) for sign in (1, -1)
            ]
            gaps.append(torch.stack(both))
        return torch.cat(gaps, 1).view(2, b, k)

    def _leaf(self, domain: Fields) -> None:
        """Every neuron is decided: an LP whose duals certify, or whose minimiser may be a counterexample."""
        self.leaves += 1
        if not self.config.leaf_lp or self.deadline.expired():
            self.stuck += 1
            return
        case = domain["case"]
        state = replace(self.state, bounds=self.space.domain_bounds(domain["signs"]))
        signs = self.space.multiplier_signs(domain["signs"])
        found = solve_leaf(
            self.graph,
            self.backend,
            state,
            signs,
            self.cases.spec.select(case),
            self.cases.thresholds[case][0],
            self.deadline,
            None if self.cases.strict is None else self.cases.strict[case][0],
        )
        weak = found.real and not found.closed and self.claims.semantics is not Semantics.FLOAT32
        if found.closed or weak:
            self.closed += 1
            run = self.state.charges.run is not None
            self.covered.add(Covered(int(weak or not run), found.bound + found.error, found.error))
            return
        self.stuck += 1
        if found.candidate is not None and self.witness is None:
            self.witness = self.accept(found.candidate)
