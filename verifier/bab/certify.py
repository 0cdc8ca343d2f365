"""Certificates of neuron domains: bounds in float64 with every rounding error accounted for, and what they refute.

The multipliers and slopes of beta-CROWN (Wang et al., NeurIPS 2021) prove whatever bound they give, however they were
found: the search optimises them in float32, and here the bound is computed once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from verifier.bab.bounder import Bounded, CaseRows, domain_parameters
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains
from verifier.bab.splits import SplitSpace
from verifier.bab.statistics import SearchStatistics
from verifier.bounds.alpha import Parameters
from verifier.bounds.crown import BoundState, crown_rows
from verifier.bounds.touch import near, touched
from verifier.core.claims import Covered, Semantics, real_part
from verifier.core.device import facts
from verifier.core.interval import Interval
from verifier.core.numerics import proved
from verifier.proof.leaves import LeafLog, coarse

# The fewest and most domains of a batch.
_FEWEST, _MOST = 8, 1 << 14
# Of the memory for open domains, for those that are refuted for the real network alone.
KEPT_SHARE = 0.25


def fitting(device: torch.device, numbers: int) -> int:
    """How many domains to work on at once: enough to fill the device, few enough for the caches of a CPU.

    Args:
        numbers: in the widest tensor of one domain.
    """
    return int(max(_FEWEST, min(facts(device).neuron_batch_numbers // numbers, _MOST)))


class Judge:
    """What certified bounds close, and what closings cover.

    Args:
        state: root bounds (1, *shape).
        statistics: where what closings cover is noted.

    Attributes:
        strong: what the closings hold for, those left out that hold for the network in real arithmetic alone and that a
            search for runs can go on with.
    """

    def __init__(
        self, context: SearchContext, state: BoundState, cases: CaseRows, statistics: SearchStatistics
    ) -> None:
        self.engine, self.claims = context.engine, context.claims
        self.state, self.cases, self.statistics = state, cases, statistics
        self.strong = Covered()

    def refuted(self, case: Tensor, gap: Tensor) -> Tensor:
        """(B,) bool: domains with a row whose bound (B, S), less its threshold, refutes it; as good as the bound is."""
        return proved(gap, torch.zeros_like(gap), self.cases.strict_of(case)).any(1)

    def judged(self, case: Tensor, lower: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) bool each: domains that certified bounds (n, S) close for all that they hold for, and those that they
        close for the real network alone, where the claims allow that. Both are noted.

        Args:
            error: (n, S), of a run, which the bounds allow for.
        """
        statistics = self.statistics
        sure, real = self._refutes(case, lower), self._refutes(case, real_part(lower, error))
        weak = real & ~sure
        count = int(weak.sum())
        if count and not self.claims.real_closes(statistics.waiting, statistics.bounded):
            statistics.waiting += count
            weak = torch.zeros_like(weak)
        self._note(case, lower, error, sure, weak)
        return sure, weak

    def touching(
        self, case: Tensor, gap: Tensor, done: Tensor, bounds: Callable[[Tensor], Mapping[int, Interval]]
    ) -> Tensor:
        """``done`` (B,) and the domains whose strict rows only touch their thresholds.

        Args:
            gap: (B, S). bounds: of some domains (n,).
        """
        strict = self.cases.strict_of(case)
        if strict is None:
            return done
        thresholds = self.cases.thresholds[case]
        index = (near(gap.amax(1), thresholds, strict) & ~done).nonzero()[:, 0]
        if index.numel():
            spec = self.cases.spec.select(case[index])
            hits = touched(self.engine, bounds(index), spec, thresholds[index], strict[index])
            if self.claims.semantics is not Semantics.FLOAT32:  # nothing is left for the error of a run
                done[index] = hits
                self.statistics.covered.weak += int(hits.sum())
                self.strong.weak += int(hits.sum())
        return done

    def _refutes(self, case: Tensor, lower: Tensor) -> Tensor:
        """(n,) bool: whether some row's bound (n, S) refutes it."""
        return proved(lower, self.cases.thresholds[case], self.cases.strict_of(case)).any(1)

    def _note(self, case: Tensor, lower: Tensor, error: Tensor, sure: Tensor, weak: Tensor) -> None:
        """What the bounds (n, S) of some domains cover.

        Args:
            sure, weak: (n,) bool, those that they close, for all that they hold for or for the real network alone.
        """
        gap, row = (lower - self.cases.thresholds[case]).max(1)
        errors, closed = error.gather(1, row[:, None])[:, 0], sure | weak
        real = int(closed.sum()) if self.state.magnitudes.run is None else 0
        self.statistics.covered.note(gap[closed], errors[closed], real or int(weak.sum()))
        self.strong.note(gap[sure], errors[sure], real)


class Certificates(Judge):
    """Certificates of the domains of one search.

    Args:
        state: root bounds (1, *shape).
        statistics: where what closings cover is noted.

    Attributes:
        weak: domains that were closed for the network in real arithmetic alone, as far as there is room for them. A
            batch that was tried twice is here twice.
        log: where what refutes domains is written down.
    """

    def __init__(
        self,
        context: SearchContext,
        state: BoundState,
        cases: CaseRows,
        space: SplitSpace,
        statistics: SearchStatistics,
    ) -> None:
        super().__init__(context, state, cases, statistics)
        self.space = space
        self.weak: list[NeuronDomains] = []
        self.log: LeafLog | None = None
        self._room = int(KEPT_SHARE * context.memory_limit)

    def closed(self, domains: NeuronDomains, found: Bounded) -> Tensor:
        """(B,) bool: domains that are refuted; certified when the root's bounds are."""
        done = self.refuted(domains.case, found.gap)
        if self.state.certified and bool(done.any()):
            index = done.nonzero()[:, 0]
            sure = self._confirmed(domains, found, index)
            done[index] = sure
            self.statistics.uncertified += int((~sure).sum())
        return self._with_touched(domains, found, done)

    def _with_touched(self, domains: NeuronDomains, found: Bounded, done: Tensor) -> Tensor:
        """Add the domains whose strict rows only touch their thresholds."""
        return self.touching(domains.case, found.gap, done, lambda i: self.space.domain_bounds(domains.signs[i]))

    def _confirmed(self, domains: NeuronDomains, found: Bounded, index: Tensor) -> Tensor:
        """(n,) bool: whether some row of these domains is refuted, as far as the claims ask."""
        others = found.parameters and {i: {k: v[index] for k, v in d.items()} for i, d in found.parameters.items()}
        part = NeuronDomains(domains.case[index], domains.signs[index], found.alpha_beta[index])
        if self.log is not None:
            return self._written(part, self.log)
        sure, weak = self.judged(part.case, *self.lower(part, others))
        self._keep(part, weak, int(weak.sum()))
        return sure | weak

    def _written(self, part: NeuronDomains, log: LeafLog) -> Tensor:
        """(n,) bool: which domains are refuted as they are written down, by coarse slopes or else by their own."""
        done = torch.zeros_like(part.case, dtype=torch.bool)
        rounded = replace(part, alpha_beta=coarse(part.signs, part.alpha_beta))
        for tried, wide in ((rounded, False), (part, True)):
            left = (~done).nonzero()[:, 0]
            if left.numel():
                some = tried[left]
                lower, error = self.lower(some)
                sure, _ = self.judged(some.case, lower, error)
                self.note(log, some, lower, sure, wide)
                done[left] = sure
        return done

    def note(self, log: LeafLog, domains: NeuronDomains, lower: Tensor, sure: Tensor, wide: bool = False) -> None:
        """Write down those of some domains, (n,) bool, that bounds (n, S) refute."""
        index = sure.nonzero()[:, 0]
        row = (lower[index] - self.cases.thresholds[domains.case[index]]).argmax(1)
        log.note(domains.case[index], domains.signs[index], row, domains.alpha_beta[index, row], wide)

    def _keep(self, domains: NeuronDomains, weak: Tensor, count: int) -> None:
        """The weak ones of some domains, (n,) bool, for a search that goes on with them."""
        if not count:
            return
        kept = domains[weak.nonzero()[:, 0]]
        self._room -= kept.nbytes
        if self._room < 0:
            self.strong.weak += count
        else:
            self.weak.append(kept)

    def proved(self, domains: NeuronDomains) -> Tensor:
        """(n,) bool: whether some row of every domain is refuted at these slopes and multipliers, for all that the
        root's bounds hold for; all of them are believed when the root's bounds are not certified."""
        if not self.state.certified:
            return torch.ones_like(domains.case, dtype=torch.bool)
        if self.log is not None:
            domains = replace(domains, alpha_beta=coarse(domains.signs, domains.alpha_beta))
        lower, error = self.lower(domains)
        sure = self._refutes(domains.case, lower)
        self._note(domains.case, lower, error, sure, torch.zeros_like(sure))
        if self.log is not None:
            self.note(self.log, domains, lower, sure)
        return sure

    def lower(self, domains: NeuronDomains, others: Parameters | None = None) -> tuple[Tensor, Tensor]:
        """(B, S) bounds at given slopes and multipliers, in float64, certified when the state is, and the error of a
        run that they allow for.

        Args:
            others: relaxation parameters besides the neurons'; default the root's.
        """
        widest = max(n.size for n in self.engine.graph.whole.nodes)
        step = fitting(self.engine.backend.device, widest * self.cases.rows)
        parts = []
        for first in range(0, domains.count, step):
            some = slice(first, first + step)
            part = domains[some]
            state = replace(self.state, bounds=self.space.domain_bounds(part.signs))
            own = others and {i: {k: v[some] for k, v in d.items()} for i, d in others.items()}
            parameters = domain_parameters(self.space, self.cases, part, own)
            signs = self.space.multiplier_signs(part.signs)
            # A negative multiplier would prove anything; that there is none must not hang on the search.
            alpha_beta = part.alpha_beta.clamp(min=0)
            multipliers = self.space.scatter(torch.where(part.signs[:, None] == 0, 0.0, alpha_beta))
            splits = {i: signs[i].double() * m.double() for i, m in multipliers.items()}
            rows = self.cases.spec.select(part.case)
            lower, walk = crown_rows(self.engine, state, rows, parameters, splits)
            parts.append((lower, walk.error.expand_as(lower)))
        return torch.cat([lower for lower, _ in parts]), torch.cat([error for _, error in parts])
