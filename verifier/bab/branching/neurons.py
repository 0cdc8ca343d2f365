"""Children of neuron domains: the order of candidates, phases that follow from refuted sides, and the splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verifier.bab.bounder import Bounded, Bounder
from verifier.bab.branching import named, probing
from verifier.bab.branching.heuristic import Neurons, choose
from verifier.bab.certify import Certificates
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.splits import SplitSpace
from verifier.config import BabConfig
from verifier.core.device import facts

# Neurons at which a domain is split at once.
_MOST_DEPTH = 3


@dataclass(frozen=True)
class Branched:
    """The children of some domains, and how they came about.

    Attributes:
        children: these are to be bounded.
        split: domains that were replaced by two; a forced phase is such a split, with one child closed.
        between: children that were split in turn, or went on as their parent with a phase more.
        forced: closed children.
        unsure: sides that float32 refutes and their certificate does not.
    """

    children: NeuronDomains
    split: int
    between: int
    forced: int
    unsure: int


class NeuronBrancher:
    """Chooses the neurons at which domains are split, and splits them.

    Args:
        rows: S, rows of every case.
    """

    def __init__(
        self, space: SplitSpace, bounder: Bounder, certificates: Certificates, config: BabConfig, rows: int
    ) -> None:
        self.space, self.bounder, self.certificates, self.rows = space, bounder, certificates, rows
        self.facts = facts(space.lower.device)
        self.heuristic = named(config.branching)
        self.candidates = min(config.candidates, max(1, space.size))
        self.probes = self.facts.probes if config.probes == "auto" else config.probes

    def rank(self, domains: NeuronDomains, found: Bounded, still: Tensor) -> OpenNeuronDomains:
        """Some of the domains that were bounded, with the neurons and sides that are tried first when they are split.

        Args:
            still: (n,) their positions.
        """
        signs, alpha_beta = domains.signs[still], found.alpha_beta[still]
        gap, row = found.gap[still].max(1)
        slopes = alpha_beta[torch.arange(still.shape[0], device=row.device), row]
        neurons = Neurons(signs, found.coefficients[still], slopes, found.z[still], gap)
        candidates = self.heuristic.candidates(self.space, neurons, self.candidates)
        sides = probing.sides(self.space, neurons, self.probes)
        return OpenNeuronDomains(domains.case[still], signs, alpha_beta, gap, candidates, *sides)

    def branch(self, domains: OpenNeuronDomains, batch: int) -> Branched:
        """Children that cover some domains.

        Args:
            batch: how many domains are bounded at once.
        """
        ordered = self.ordered(domains, batch)
        probed, forced, unsure = self.with_forced(ordered, batch)
        children, split, between = self.split(probed, batch)
        return Branched(children, split + forced, between + forced, forced, unsure)

    def ordered(self, domains: OpenNeuronDomains, batch: int) -> OpenNeuronDomains:
        """The domains with free candidates only, best first; what trying them refutes goes in front of the probes."""
        candidates = domains.candidates
        # Ranked lists can run into split neurons when few are free: replace these by the domain's first free one.
        taken = domains.signs.gather(1, candidates) != 0
        first_free = (domains.signs == 0).to(torch.int8).argmax(1, keepdim=True)
        candidates = torch.where(taken, first_free, candidates)
        if not self.heuristic.tried or candidates.shape[1] == 1:
            return replace(domains, candidates=candidates)
        gaps = self._trial(domains.plain, candidates, batch)
        out = replace(domains, candidates=choose(candidates, gaps))
        if not self.probes:
            return out
        found = probing.refuted(candidates, gaps)
        zero = torch.zeros_like(found, dtype=domains.pushes.dtype)
        return replace(out, probes=torch.cat([found, domains.probes], 1), pushes=torch.cat([zero, domains.pushes], 1))

    def _trial(self, parents: NeuronDomains, candidates: Tensor, batch: int) -> Tensor:
        """(2, B, k) gaps of the children of every candidate, for plus and minus, with the parent's values."""
        b, k = candidates.shape
        repeat = torch.arange(b, device=candidates.device).repeat_interleave(k)
        column = candidates.reshape(-1, 1)
        gaps = []
        for first in range(0, b * k, batch):
            some = slice(first, first + batch)
            both = [self.bounder.evaluate(side) for side in self._sides(parents[repeat[some]], column[some])]
            gaps.append(torch.stack(both))
        return torch.cat(gaps, 1).view(2, b, k)

    def _sides(self, domains: NeuronDomains, column: Tensor) -> list[NeuronDomains]:
        """Both sides of a split of every domain at one free neuron (B, 1); the new multiplier is zero."""
        alpha_beta = domains.alpha_beta.scatter(2, column[:, None].expand(-1, self.rows, 1), 0.0)
        return [NeuronDomains(domains.case, domains.signs.scatter(1, column, sign), alpha_beta) for sign in (1, -1)]

    def with_forced(self, domains: OpenNeuronDomains, batch: int) -> tuple[OpenNeuronDomains, int, int]:
        """The domains with phases that follow because the other side is refuted, how many, and how many proofs failed.

        Sound: a side is the domain with one more split. When it is certified to be refuted, the opposite split covers
        what is left of the domain, whatever other phases follow in the same way. The best candidate is left for the
        split.
        """
        if not self.probes:
            return domains, 0, 0
        probes = domains.probes
        parent, place = ((probes >= 0) & (probes // 2 != domains.candidates[:, :1])).nonzero(as_tuple=True)
        if not parent.numel():
            return domains, 0, 0
        side, push, parents = probes[parent, place], domains.pushes[parent, place], domains.plain
        gaps = [
            self.bounder.evaluate(_sided(parents, parent[s], side[s], push[s]))
            for s in (slice(i, i + batch) for i in range(0, parent.numel(), batch))
        ]
        hit = (torch.cat(gaps) > 0).nonzero()[:, 0]
        hit = hit[_first(parent[hit] * self.space.size + side[hit] // 2)]
        if not hit.numel():
            return domains, 0, 0
        sure = self.certificates.proved(_sided(parents, parent[hit], side[hit], push[hit]))
        unsure, hit = int((~sure).sum()), hit[sure]
        signs, alpha_beta = parents.signs.clone(), parents.alpha_beta.clone()
        column = side[hit] // 2
        signs[parent[hit], column] = _sign(side[hit] ^ 1)
        alpha_beta[parent[hit], :, column] = 0.0  # the new multiplier
        return replace(domains, signs=signs, alpha_beta=alpha_beta), hit.numel(), unsure

    def split(self, domains: OpenNeuronDomains, batch: int) -> tuple[NeuronDomains, int, int]:
        """Split every domain at its first candidate, or at several; all signs.

        Returns:
            the children that are to be bounded, how many splits there were, and how many of them split a child.
        """
        children, candidates = domains.plain, domains.candidates
        origin = torch.arange(children.count, device=candidates.device)
        split = []
        for d in range(self.depth(children.count, candidates.shape[1], batch)):
            children, source, count = self.halves(children, candidates[origin, d : d + 1])
            origin = origin[source]
            split.append(count)  # counted before the halves are made, so that a lost one is noticed
        return children, sum(split), sum(split[1:])

    def halves(self, domains: NeuronDomains, column: Tensor) -> tuple[NeuronDomains, Tensor, int]:
        """Both sides of a split at one neuron (B, 1) of every domain, which domain each comes from, and how many split.

        A domain whose neuron is split already stays as it is: what comes out always covers what came in.
        """
        free = domains.signs.gather(1, column)[:, 0] == 0
        rest, split = (~free).nonzero()[:, 0], free.nonzero()[:, 0]
        sides = self._sides(domains[split], column[split])
        return NeuronDomains.cat([domains[rest], *sides]), torch.cat([rest, split, split]), int(split.shape[0])

    def depth(self, count: int, candidates: int, batch: int) -> int:
        """Neurons that every domain is split at: more than one while a round costs the same with more children."""
        numbers = self.facts.free_batch_numbers
        free = batch if numbers is None else numbers // (self.bounder.widest * self.rows)
        depth = 1
        while depth < min(_MOST_DEPTH, candidates) and count << (depth + 1) < min(free, batch):
            depth += 1
        return depth


def _sign(side: Tensor) -> Tensor:
    """int8 sign of the split that a side stands for."""
    return (1 - 2 * (side % 2)).to(torch.int8)


def _sided(domains: NeuronDomains, parent: Tensor, side: Tensor, push: Tensor) -> NeuronDomains:
    """(n,) domains split to one side each, with the multiplier ``push`` on it."""
    part = domains[parent]
    column, at = side // 2, torch.arange(parent.shape[0], device=parent.device)
    signs, alpha_beta = part.signs.clone(), part.alpha_beta.clone()
    signs[at, column] = _sign(side)
    alpha_beta[at, :, column] = push[:, None]
    return NeuronDomains(part.case, signs, alpha_beta)


def _first(keys: Tensor) -> Tensor:
    """Positions at which some value occurs for the first time, ascending."""
    values, place = torch.unique(keys, return_inverse=True)
    position = torch.arange(keys.shape[0], device=keys.device)
    first = torch.full_like(values, keys.shape[0]).scatter_reduce_(0, place, position, "amin")
    return first.sort().values
