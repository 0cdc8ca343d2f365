"""Every domain is accounted for: the equations that a proof rests on, and how pools are made even.

Inside a round a domain leaves its pool only to be closed, to be replaced by children that cover it, or to be kept as
stuck, and the round counts each of these. Groups of ranks that search apart send each other domains at meetings
(:mod:`verifier.bab.exchange`), which count what was sent and what has come. Hence, with every group g,

    roots_g + children_g + received_g = split_g + closed_g + stuck_g + sent_g + open_g,     children_g = 2 split_g,
    sum of sent_g = sum of received_g,     sum of roots_g = the roots of the problem,

and the problem is proved when the sum of open_g and stuck_g is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bab.statistics import PACKED, SearchStatistics, Stop
from verifier.core.errors import VerifierError

# A group that holds this much more than the mean gives some away.
_UNEVEN = 1.1


class LostDomains(VerifierError):
    """A domain was lost or counted twice, so nothing may be concluded."""


@dataclass(frozen=True)
class Report:
    """What a group tells at a meeting.

    Attributes:
        statistics: what it did and holds.
        sent, received: domains moved so far.
        found: it has a replayed counterexample (the first group alone).
        aside: candidates that wait for a replay.
        failed: it cannot go on.
        stop: a limit that it met.
        longest: seconds of its longest round since the last meeting.
    """

    statistics: SearchStatistics
    sent: int
    received: int
    found: bool
    aside: int
    failed: bool
    stop: Stop
    longest: float

    def pack(self) -> list[float]:
        """As numbers, all of which a double holds exactly."""
        own = (self.sent, self.received, self.found, self.aside, self.failed, self.stop, self.longest)
        return [*self.statistics.pack(), *map(float, own)]

    @staticmethod
    def unpack(values: Sequence[float]) -> Report:
        """From :meth:`pack`."""
        sent, received, found, aside, failed, stop, longest = values[PACKED:]
        return Report(
            SearchStatistics.unpack(values[:PACKED]),
            int(sent),
            int(received),
            bool(found),
            int(aside),
            bool(failed),
            Stop(int(stop)),
            longest,
        )


def balance(reports: Sequence[Report], roots: int) -> None:
    """Check the equations at the head of this module.

    Args:
        reports: of one meeting.
        roots: domains that the problem begins with.

    Raises:
        LostDomains: naming the first equation that fails.
    """
    for rank, report in enumerate(reports):
        s = report.statistics
        came = s.roots + s.children + report.received
        went = s.split + s.closed + s.stuck + report.sent + s.open
        if came != went:
            raise LostDomains(f"group {rank} got {came} domains and accounts for {went}; no answer can rest on that")
        if s.children != 2 * s.split:
            raise LostDomains(f"group {rank} split {s.split} domains into {s.children}; no answer can rest on that")
    sent, received = sum(r.sent for r in reports), sum(r.received for r in reports)
    if sent != received:
        raise LostDomains(f"groups sent {sent} domains and received {received}; no answer can rest on that")
    began = sum(r.statistics.roots for r in reports)
    if began != roots:
        raise LostDomains(f"the search began with {began} domains instead of {roots}; no answer can rest on that")


@dataclass(frozen=True)
class Move:
    """``count`` domains go from one group to another."""

    source: int
    target: int
    count: int


def plan(counts: Sequence[int]) -> list[Move]:
    """Moves that make pools even: when some group has nothing while another could share, or one has far too much.

    The fullest groups keep the remainder, so that as few domains as possible move. A function of the counts alone: all
    ranks come to the same plan.

    Args:
        counts: open domains of every group.
    """
    mean = sum(counts) / len(counts)
    if not (max(counts) > _UNEVEN * mean or (min(counts) == 0 and max(counts) >= 2)):
        return []
    base, extra = divmod(sum(counts), len(counts))
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    wanted = [base] * len(counts)
    for i in order[:extra]:
        wanted[i] += 1
    surplus = [[i, counts[i] - wanted[i]] for i in range(len(counts)) if counts[i] > wanted[i]]
    moves: list[Move] = []
    for target in range(len(counts)):
        need = wanted[target] - counts[target]
        while need > 0:
            source = surplus[0]
            count = min(need, source[1])
            moves.append(Move(source[0], target, count))
            need -= count
            source[1] -= count
            if source[1] == 0:
                surplus.pop(0)
    return moves


def every(n: int, count: int) -> Tensor:
    """``count`` distinct positions spread evenly over ``n``, ascending, int64."""
    return (2 * torch.arange(count) + 1) * n // (2 * max(1, count))


def deal(counts: Sequence[int]) -> list[Tensor]:
    """Positions 0 to sum(counts) - 1 in hands of the given sizes, each spread evenly over all."""
    place = torch.cat([(torch.arange(c, dtype=torch.float64) + 0.5) / max(1, c) for c in counts])
    position = torch.empty_like(place, dtype=torch.int64)
    position[torch.argsort(place, stable=True)] = torch.arange(place.shape[0])
    return [hand.sort().values for hand in position.split(list(counts))]
