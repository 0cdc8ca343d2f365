"""Domain-parallel search: groups of ranks search apart, each with its own pool, and meet now and then.

Every group runs rounds on its own pool until its share of time is over, it has nothing left, a limit is reached, a
candidate waits for its replay, or somebody calls. Then all meet, tell each other their figures, take the same decision
from the same numbers, and domains move from full pools to empty ones.

Why nothing is lost and nothing is proved too early: whenever a meeting looks, a domain is in exactly one pool. Inside a
round a domain leaves its pool only to be closed, to be replaced by children that cover it, or to be kept as stuck, and
the round counts each of these; rounds and meetings never overlap, so at a meeting no domain is half done. Between pools
a domain moves inside one collective call of a meeting, which returns on a rank only when what was sent to it has come;
the figures of a meeting are taken after the moves of the one before, so no message is under way then. Hence, with every
group g,

    roots_g + children_g + received_g = split_g + closed_g + stuck_g + sent_g + open_g,     children_g = 2 split_g,
    sum of sent_g = sum of received_g,     sum of roots_g = the roots of the problem,

and the problem is proved when the sum of open_g and stuck_g is zero. The equations are checked on the very figures
that a proof rests on; where they fail, an error is raised and nothing is answered.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from verifier.bab.context import Accept
from verifier.bab.pool import Fields
from verifier.core.backend import Group, ParallelBackend
from verifier.core.claims import Covered
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, VerifierError
from verifier.core.memory import out_of_memory
from verifier.core.result import Witness

# Seconds between meetings that nobody calls: at least the first number, doubled after every meeting that moved nothing
# up to the second, and never less than some rounds, since at a meeting all wait for the slowest round.
_SHORTEST, _LONGEST, _ROUNDS = 0.2, 3.2, 8.0
# A group that holds this much more than the mean gives some away.
_UNEVEN = 1.1
# Bytes of domains that one rank sends or receives in a meeting.
_MESSAGE_BYTES = 256 << 20


class LostDomains(VerifierError):
    """The books of a search do not balance: a domain was lost or counted twice, so nothing may be concluded."""


class Stop(IntEnum):
    """Why a search ends with domains left; of several reasons the smallest is named."""

    NONE = 0
    TIME = 1
    DOMAINS = 2
    MEMORY = 3
    DEVICE = 4


# Figures that are no counts.
_NUMBERS = ("worst", "margin", "error")


@dataclass(frozen=True)
class Figures:
    """What a group (or all of them) did and holds.

    Attributes:
        roots: domains that it began with.
        children: domains made by splits, ``split``: domains replaced by them.
        closed: refuted domains; ``stuck``: domains that nothing can decide; ``open``: domains in the pool.
        bounded, rounds, leaves, uncertified, forced, depth: for the statistics.
        worst: lowest bound minus threshold among the open domains, +inf without any.
        weak, margin, error: what closings cover, see :class:`verifier.core.claims.Covered`.
    """

    roots: int = 0
    children: int = 0
    split: int = 0
    closed: int = 0
    stuck: int = 0
    open: int = 0
    bounded: int = 0
    rounds: int = 0
    leaves: int = 0
    uncertified: int = 0
    forced: int = 0
    depth: int = 0
    worst: float = math.inf
    weak: int = 0
    margin: float = math.inf
    error: float = 0.0

    @property
    def covered(self) -> Covered:
        return Covered(self.weak, self.margin, self.error)

    @staticmethod
    def total(parts: Iterable[Figures]) -> Figures:
        """Sums; the greatest depth, the worst bound, and the closing bound with the least to spare."""
        parts = list(parts)
        sums: dict[str, Any] = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(Figures)}
        sums["depth"] = max((p.depth for p in parts), default=0)
        sums["worst"] = min((p.worst for p in parts), default=math.inf)
        closest = min((p.covered for p in parts), key=lambda c: c.spare, default=Covered())
        sums["margin"], sums["error"] = closest.margin, closest.error
        return Figures(**sums)


class Search(Protocol):
    """What a team asks of a group's own search."""

    witness: Witness | None

    @property
    def roots(self) -> int:
        """Domains that the problem begins with, the same number in every group."""
        ...

    @property
    def bounded(self) -> int:
        """Domains bounded so far."""
        ...

    def open(self) -> int:
        """Domains in the pool."""
        ...

    def start(self) -> None:
        """Put the roots into the pool; only the first group does."""
        ...

    def round(self) -> None:
        """Take some domains and close, split or keep every one of them, or find a witness."""
        ...

    def full(self) -> Stop:
        """Whether memory forbids another round."""
        ...

    def count(self) -> Figures:
        """Books and figures, between rounds."""
        ...

    def show(self, others: Figures) -> None:
        """Report the progress of this group and the others."""
        ...

    def give(self, count: int) -> Fields:
        """Take domains out of the pool for another group, a fair sample of good and bad ones."""
        ...

    def take(self, domains: Fields) -> None:
        """Put another group's domains into the pool."""
        ...


@dataclass(frozen=True)
class _Report:
    """What a group tells at a meeting.

    Attributes:
        figures: its books.
        sent, received: domains moved so far.
        found: it has a replayed counterexample (the first group alone).
        aside: candidates that wait for a replay.
        failed: it cannot go on.
        stop: a limit that it met.
        longest: seconds of its longest round since the last meeting.
    """

    figures: Figures
    sent: int
    received: int
    found: bool
    aside: int
    failed: bool
    stop: Stop
    longest: float

    def pack(self) -> list[float]:
        own = (self.sent, self.received, self.found, self.aside, self.failed, self.stop, self.longest)
        return [float(getattr(self.figures, f.name)) for f in fields(Figures)] + [float(v) for v in own]

    @staticmethod
    def unpack(values: Sequence[float]) -> _Report:
        names = [f.name for f in fields(Figures)]
        figures: dict[str, Any] = {n: v if n in _NUMBERS else int(v) for n, v in zip(names, values, strict=False)}
        sent, received, found, aside, failed, stop, longest = values[len(names) :]
        return _Report(
            Figures(**figures),
            int(sent),
            int(received),
            bool(found),
            int(aside),
            bool(failed),
            Stop(int(stop)),
            longest,
        )


@dataclass(frozen=True)
class Ending:
    """How the search of a team ended, the same on every rank.

    Attributes:
        witness: an accepted counterexample. On a rank that does not share the first rank's place in its group only its
            input is known.
        stop: the limit that ended it, if any.
        total: figures of all groups.
        groups: for each group how many domains it bounded and how many it was sent; empty for one group.
    """

    witness: Witness | None
    stop: Stop
    total: Figures
    groups: list[dict[str, int]]


class Team:
    """The group's seat among all groups of a search.

    Args:
        group: this rank and its peers, the ranks of the same place in all groups; its rank is the group's number.
        backend: the ranks of this group.
        accept: replays a candidate; called on the first rank of the first group alone.
        deadline: one that expires for all ranks of this group at the same question.
        max_domains: of all groups together.
    """

    def __init__(
        self, group: Group, backend: ParallelBackend, accept: Accept, deadline: Deadline, max_domains: int | None
    ) -> None:
        self.group, self.backend = group, backend
        self._replay, self.deadline, self.max_domains = accept, deadline, max_domains
        self._aside: list[np.ndarray] = []
        self._sent = self._received = 0
        self._quantum = 0.0
        self._quiet = 0
        self._failure: VerifierError | None = None
        self._others = Figures()
        self._allowed = math.inf

    @property
    def first(self) -> bool:
        """Whether this is the group that begins with the roots and replays candidates."""
        return self.group.rank == 0

    def same(self, parts: Iterable[Tensor | np.ndarray]) -> None:
        """Make sure that all groups mean the same by a domain.

        Args:
            parts: everything that gives a domain's numbers their meaning.

        Raises:
            LostDomains: when some group has other numbers.
        """
        if self.group.size == 1:
            return
        digest = hashlib.sha256()
        for part in parts:
            array = part.cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        digests = self.group.objects(digest.hexdigest())
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise LostDomains(f"group {rank} would search another problem than group 0; use equal machines")

    # -- candidates -------------------------------------------------------------------------------------------------

    def offer(self, x: np.ndarray) -> Witness | None:
        """Replay a candidate (n_in,) here, or put it aside for the next meeting."""
        if self.first:
            return self._judge(x)
        self._aside.append(np.asarray(x))
        return None

    def _judge(self, x: np.ndarray) -> Witness | None:
        """Replay on the first rank of this group; the others learn whether it holds."""
        witness = self._replay(x) if self.backend.rank == 0 else None
        if not self.backend.agree(float(witness is not None)):
            return None
        return witness if witness is not None else Witness(np.asarray(x, dtype=np.float64), np.zeros(0))

    def _settle(self, search: Search, reports: list[_Report]) -> Witness | None:
        """The witness of this meeting: the first group's own, or one that was put aside and holds."""
        if reports[0].found:
            return self.group.share(search.witness)
        if not any(r.aside for r in reports):
            return None
        offered = [x for some in self.group.objects(self._aside) for x in some]
        self._aside = []
        witness = None
        if self.first:
            witness = next((w for w in map(self._judge, offered) if w is not None), None)
        return self.group.share(witness)

    # -- rounds and meetings ----------------------------------------------------------------------------------------

    def run(self, search: Search) -> Ending:
        """Search until everything is proved, a counterexample is found or a limit is met.

        Raises:
            LostDomains: the books do not balance.
            MemoryExceeded, DeadlineExceeded: some group could not go on; raised on all.
        """
        if self.first:
            self._guard(search.start)
        while True:
            stop, longest = self._rounds(search)
            ending = self._meet(search, stop, longest)
            if ending is not None:
                return ending

    def _rounds(self, search: Search) -> tuple[Stop, float]:
        """Rounds until there is a reason to meet; the limit that was met and the longest round."""
        began = now = time.monotonic()
        longest = 0.0
        stop = Stop.NONE
        while search.witness is None and self._failure is None and search.open():
            stop = self._limit(search)
            if stop:
                break
            self.group.check()
            self._guard(search.round)
            if self.first:
                search.show(self._others)
            before, now = now, time.monotonic()
            longest = max(longest, now - before)
            if self._due(now - began, search.bounded):
                break
        # The others need not go on for long: this one would only wait for them.
        self.group.call()
        return stop, longest

    def _due(self, seconds: float, bounded: int) -> bool:
        """Whether it is time for a meeting; a search of one group needs none before its end."""
        if self.group.size == 1:
            return False
        due = bool(self._aside) or seconds >= self._quantum or bounded >= self._allowed or self.group.called()
        return bool(self.backend.agree(float(due)))

    def _limit(self, search: Search) -> Stop:
        if self.deadline.expired():
            return Stop.TIME
        if self._enough(self._others.bounded + search.bounded):
            return Stop.DOMAINS
        return search.full()

    def _enough(self, bounded: int) -> bool:
        return self.max_domains is not None and bounded >= self.max_domains

    def _guard(self, step: Callable[[], None]) -> None:
        """Keep what ends a group for the next meeting, where it ends all; alone it is simply raised.

        The ranks of one group stop at the same question of the clock, but memory may fail one of them alone, in the
        middle of a call that the others go on with: then nothing but the end of the job is safe.
        """
        try:
            step()
        except DeadlineExceeded as error:
            self._failed(error)
        except (MemoryExceeded, RuntimeError, MemoryError) as error:
            if self.backend.size > 1 or not (isinstance(error, MemoryExceeded) or out_of_memory(error)):
                raise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if self.group.size == 1:
            raise error
        self._failure = error if isinstance(error, VerifierError) else MemoryExceeded(str(error))

    def _meet(self, search: Search, stop: Stop, longest: float) -> Ending | None:
        """Tell and hear figures; how the search ends, or None after moving domains."""
        failed, found = self._failure is not None, search.witness is not None
        mine = _Report(search.count(), self._sent, self._received, found, len(self._aside), failed, stop, longest)
        reports = [_Report.unpack(values) for values in self.group.numbers(mine.pack())]
        self.group.answered()
        total = Figures.total(r.figures for r in reports)
        witness = self._settle(search, reports)
        if witness is None:
            if any(r.failed for r in reports):
                raise next(e for e in self.group.objects(self._failure) if e is not None)
            if total.open == 0:
                balance(reports, search.roots)
            else:
                stop = min((r.stop for r in reports if r.stop), default=Stop.NONE)
                stop = stop or (Stop.DOMAINS if self._enough(total.bounded) else Stop.NONE)
                if not stop:
                    self._share_out(search, reports)
                    return None
        groups = [{"domains": r.figures.bounded, "received": r.received} for r in reports]
        return Ending(witness, stop, total, groups if len(groups) > 1 else [])

    def _share_out(self, search: Search, reports: list[_Report]) -> None:
        """Move domains where pools are uneven, and set the time to the next meeting."""
        counts = [r.figures.open for r in reports]
        moves = plan(counts)
        if moves:
            self._move(search, moves)
        self._quiet = 0 if moves else self._quiet + 1
        pause = min(_SHORTEST * 2.0 ** min(self._quiet, 16), _LONGEST)
        self._quantum = max(pause, _ROUNDS * max(r.longest for r in reports))
        others = Figures.total(r.figures for i, r in enumerate(reports) if i != self.group.rank)
        self._others = replace(others, open=sum(counts) - search.open())
        if self.max_domains is not None:
            # This group's part of what is still allowed; none can use up more than that unseen.
            left = self.max_domains - others.bounded - search.bounded
            self._allowed = search.bounded + left / self.group.size

    # -- moving domains ---------------------------------------------------------------------------------------------

    def _move(self, search: Search, moves: list[Move]) -> None:
        """Carry out a plan; every rank knows all of it, so each knows how many domains to expect from whom."""
        rank, size, device = self.group.rank, self.group.size, self.backend.device
        source = moves[0].source
        layout = self.group.share(Layout.of(search.give(0)) if rank == source else None, source)
        # A row of the message per domain; what does not fit waits for the next meeting.
        most = max(1, _MESSAGE_BYTES // (layout.width * size))
        moves = [replace(m, count=min(m.count, most)) for m in moves]
        out = torch.zeros((size, max(m.count for m in moves), layout.width), dtype=torch.uint8, device=device)
        given = [m for m in moves if m.source == rank]
        count = sum(m.count for m in given)
        if count:
            rows = layout.pack(search.give(count))
            if rows.shape[0] != count:
                raise LostDomains(f"group {rank} was to give {count} domains and gave {rows.shape[0]}")
            for move, index in zip(given, deal([m.count for m in given]), strict=True):
                out[move.target, : move.count] = rows[index.to(device)]
            self._sent += count
        got = self.group.all_to_all(out)
        for move in moves:
            if move.target == rank:
                search.take(layout.unpack(got[move.source, : move.count]))
                self._received += move.count


def balance(reports: Sequence[_Report], roots: int) -> None:
    """Check the equations of the module's head.

    Args:
        reports: of one meeting.
        roots: domains that the problem begins with.

    Raises:
        LostDomains: naming the first equation that fails.
    """
    for rank, report in enumerate(reports):
        f = report.figures
        came = f.roots + f.children + report.received
        went = f.split + f.closed + f.stuck + report.sent + f.open
        if came != went:
            raise LostDomains(f"group {rank} got {came} domains and accounts for {went}; no answer can rest on that")
        if f.children != 2 * f.split:
            raise LostDomains(f"group {rank} split {f.split} domains into {f.children}; no answer can rest on that")
    sent, received = sum(r.sent for r in reports), sum(r.received for r in reports)
    if sent != received:
        raise LostDomains(f"groups sent {sent} domains and received {received}; no answer can rest on that")
    began = sum(r.figures.roots for r in reports)
    if began != roots:
        raise LostDomains(f"the search began with {began} domains instead of {roots}; no answer can rest on that")


def balance_alone(figures: Figures, roots: int) -> None:
    """:func:`balance` for a search that no other group takes part in."""
    balance([_Report(figures, 0, 0, False, 0, False, Stop.NONE, 0.0)], roots)


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


_MARK = 1  # the first byte of a row that holds a domain; padding is zero


@dataclass(frozen=True)
class Layout:
    """Domains as rows of bytes: what is in them, in order.

    Attributes:
        parts: name, dtype and shape (without the domain axis) of every field.
    """

    parts: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @staticmethod
    def of(domains: Fields) -> Layout:
        """From any batch, even an empty one."""
        return Layout(tuple((k, v.dtype, tuple(v.shape[1:])) for k, v in domains.items()))

    @property
    def width(self) -> int:
        """Bytes of a domain."""
        return 1 + sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.parts)

    def pack(self, domains: Fields) -> Tensor:
        """(n, width) uint8."""
        n = next(iter(domains.values())).shape[0]
        device = next(iter(domains.values())).device
        rows = [torch.full((n, 1), _MARK, dtype=torch.uint8, device=device)]
        for name, dtype, shape in self.parts:
            flat = domains[name].reshape(-1)
            if flat.dtype != dtype:
                raise LostDomains(f"field {name} of a domain is {flat.dtype} here and {dtype} elsewhere")
            rows.append(flat.contiguous().view(torch.uint8).reshape(n, dtype.itemsize * math.prod(shape)))
        return torch.cat(rows, 1)

    def unpack(self, rows: Tensor) -> Fields:
        """The domains of (n, width) rows.

        Raises:
            LostDomains: some row holds no domain.
        """
        if not bool((rows[:, 0] == _MARK).all()):
            raise LostDomains("a message holds fewer domains than were announced")
        out: Fields = {}
        start = 1
        for name, dtype, shape in self.parts:
            stop = start + dtype.itemsize * math.prod(shape)
            # A copy of its own: a view with another dtype needs an aligned start.
            own = rows[:, start:stop].clone(memory_format=torch.contiguous_format).flatten()
            out[name] = own.view(dtype).reshape(rows.shape[0], *shape)
            start = stop
        return out
