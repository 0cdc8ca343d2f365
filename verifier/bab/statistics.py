"""What a search did and holds: statistics that add up, and the reasons why one ends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

from verifier.core.claims import Covered


class Stop(IntEnum):
    """Why a search ends with domains left; of several reasons the smallest is named."""

    NONE = 0
    TIME = 1
    DOMAINS = 2
    MEMORY = 3
    DEVICE = 4


@dataclass
class SearchStatistics:
    """What a group of ranks (or all of them) did and holds.

    Attributes:
        roots: domains that it began with.
        children: domains made by splits.
        split: domains replaced by their children.
        closed: refuted domains.
        stuck: domains that nothing can decide.
        open: domains in the pool.
        bounded: domains bounded so far.
        rounds: steps of the search.
        depth: largest number of halvings of an input box.
        leaves: neuron domains without a free neuron, which go to the linear program.
        uncertified: closings in float32 that their certificate did not confirm.
        forced: phases that follow because the other side is refuted.
        refused: candidates that did not replay.
        programs: linear programs that learning solved; ``clauses``: certified clauses that it found.
        waiting: domains refuted for the real network alone that were split further.
        worst: lowest bound minus threshold among the open domains, +inf without any.
        covered: what closings hold for.
    """

    roots: int = 0
    children: int = 0
    split: int = 0
    closed: int = 0
    stuck: int = 0
    open: int = 0
    bounded: int = 0
    rounds: int = 0
    depth: int = 0
    leaves: int = 0
    uncertified: int = 0
    forced: int = 0
    refused: int = 0
    programs: int = 0
    clauses: int = 0
    waiting: int = 0
    worst: float = math.inf
    covered: Covered = field(default_factory=Covered)

    def copy(self) -> SearchStatistics:
        return replace(self, covered=replace(self.covered))

    def restore(self, before: SearchStatistics) -> None:
        """Become what a copy was, in place; rounds and refused candidates stay counted."""
        rounds, refused = self.rounds, self.refused
        for f in fields(self):
            setattr(self, f.name, getattr(before, f.name))
        self.covered, self.rounds, self.refused = replace(before.covered), rounds, refused

    @staticmethod
    def total(parts: Iterable[SearchStatistics]) -> SearchStatistics:
        """Sums; the greatest depth, the worst bound, and the closing bound with the least to spare."""
        out = SearchStatistics()
        for part in parts:
            for name in _COUNTS:
                setattr(out, name, getattr(out, name) + getattr(part, name))
            out.depth = max(out.depth, part.depth)
            out.worst = min(out.worst, part.worst)
            out.covered.add(part.covered)
        return out

    def pack(self) -> list[float]:
        """As numbers, all of which a double holds exactly."""
        covered = self.covered
        counts = [float(getattr(self, name)) for name in (*_COUNTS, "depth")]
        return [*counts, self.worst, covered.weak, covered.margin, covered.error, float(covered.overflow)]

    @staticmethod
    def unpack(values: Sequence[float]) -> SearchStatistics:
        """From :meth:`pack`."""
        *counts, worst, weak, margin, error, overflow = values
        numbers = {name: int(v) for name, v in zip((*_COUNTS, "depth"), counts, strict=True)}
        return SearchStatistics(**numbers, worst=worst, covered=Covered(int(weak), margin, error, bool(overflow)))


@dataclass(frozen=True)
class GroupShare:
    """What one of several groups of ranks did in a search.

    Attributes:
        received: domains that other groups sent to it.
    """

    bounded: int
    received: int


@dataclass(frozen=True)
class SearchTotals:
    """What a search, or several of one kind, did and left.

    Attributes:
        statistics: of all groups together.
        groups: of each one; empty for a single group.
    """

    statistics: SearchStatistics = field(default_factory=SearchStatistics)
    groups: tuple[GroupShare, ...] = ()

    @property
    def left(self) -> int:
        """Domains that are not refuted."""
        return self.statistics.open + self.statistics.stuck

    def after(self, earlier: SearchTotals | None) -> SearchTotals:
        """With what earlier searches for the same query did: work adds up, what is left is the last one's."""
        if earlier is None:
            return self
        now, groups = self.statistics, self.groups or earlier.groups
        both = SearchStatistics.total([earlier.statistics, now])
        if len(earlier.groups) == len(self.groups):
            pairs = zip(earlier.groups, self.groups, strict=True)
            groups = tuple(GroupShare(a.bounded + b.bounded, a.received + b.received) for a, b in pairs)
        both = replace(both, open=now.open, stuck=now.stuck, worst=now.worst, covered=now.covered)
        return SearchTotals(both, groups)


_NO_COUNTS = ("depth", "worst", "covered")
_COUNTS = tuple(f.name for f in fields(SearchStatistics) if f.name not in _NO_COUNTS)
PACKED = len(SearchStatistics().pack())
