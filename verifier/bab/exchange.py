"""Groups of ranks that search one problem apart: limits, meetings, candidates, and domains that move between pools.

Every group works on its own pool until its share of time is over, it has nothing left, a limit is reached, a candidate
waits for its replay, or somebody calls. Then all meet, tell each other their statistics, take the same decision from
the same numbers, and domains move from full pools to empty ones. A search of one group meets nobody: it only ends.

Why nothing is lost and nothing is proved too early: rounds and meetings never overlap, so at a meeting no domain is
half done, and whenever a meeting looks, a domain is in exactly one pool. Between pools a domain moves inside one
collective call of a meeting, which returns on a rank only when what was sent to it has come; the statistics of a
meeting are taken after the moves of the one before, so no message is under way then. Hence the equations of
:mod:`verifier.bab.balance` hold at every meeting, and are checked there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from verifier.bab.balance import LostDomains, Move, Report, balance, deal, plan
from verifier.bab.context import SearchContext
from verifier.bab.domains import Domains
from verifier.bab.layout import Layout
from verifier.bab.splitting import Splitting
from verifier.bab.statistics import GroupShare, SearchStatistics, SearchTotals, Stop
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, VerifierError
from verifier.core.memory import out_of_memory
from verifier.core.result import Witness

D = TypeVar("D", bound=Domains)

# Seconds between meetings that nobody calls: at least the first number, doubled after every meeting that moved nothing
# up to the second, and never less than some rounds, since at a meeting all wait for the slowest round.
_SHORTEST, _LONGEST, _ROUNDS = 0.2, 3.2, 8.0
# Bytes of domains that one rank sends or receives in a meeting.
_MESSAGE_BYTES = 256 << 20


@dataclass(frozen=True)
class Ending:
    """How a search ended, the same on every rank.

    Attributes:
        witness: an accepted counterexample. On a rank that does not share the first rank's place in its group only its
            input is known.
        stop: the limit that ended it, if any.
    """

    witness: Witness | None
    stop: Stop
    totals: SearchTotals


class Exchange(Generic[D]):
    """This group's seat among all groups of a search.

    Args:
        context: its ``team`` are this rank's peers in the other groups, whose rank is the group's number, its
            ``backend`` the ranks of this group. ``accept`` is called on the first rank of the first group alone.

    Attributes:
        deadline: expires for all ranks of this group at the same question.
        others: what the other groups did and held at the last meeting.
    """

    def __init__(self, context: SearchContext) -> None:
        self.group, self.backend = context.team, context.backend
        self.deadline = context.backend.shared_deadline(context.deadline)
        self._replay, self.max_domains = context.accept, context.config.max_domains
        self._aside: list[np.ndarray] = []
        self._sent = self._received = 0
        self._quantum = 0.0
        self._quiet = 0
        self._failure: VerifierError | None = None
        self.others = SearchStatistics()
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

    def _settle(self, splitting: Splitting[D, Any, Any], reports: list[Report]) -> Witness | None:
        """The witness of this meeting: the first group's own, or one that was put aside and holds."""
        if reports[0].found:
            return self.group.broadcast_object(splitting.witness)
        if not any(r.aside for r in reports):
            return None
        offered = [x for some in self.group.objects(self._aside) for x in some]
        self._aside = []
        witness = None
        if self.first:
            witness = next((w for w in map(self._judge, offered) if w is not None), None)
        return self.group.broadcast_object(witness)

    # -- between rounds ---------------------------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether something ended this group; the next meeting ends all."""
        return self._failure is not None

    def limit(self, splitting: Splitting[D, Any, Any]) -> Stop:
        """The limit that forbids another round, if any."""
        if self.deadline.expired():
            return Stop.TIME
        if self._enough(self.others.bounded + splitting.statistics.bounded):
            return Stop.DOMAINS
        return splitting.full()

    def _enough(self, bounded: int) -> bool:
        return self.max_domains is not None and bounded >= self.max_domains

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep what ends a group inside for the next meeting, where it ends all; alone it is simply raised.

        The ranks of one group stop at the same question of the clock, but memory may fail one of them alone, in the
        middle of a call that the others go on with: then nothing but the end of the job is safe.
        """
        self.group.check()
        try:
            yield
        except DeadlineExceeded as error:
            if self.group.size == 1:
                raise
            self._failure = error
        except (MemoryExceeded, RuntimeError, MemoryError) as error:
            memory = isinstance(error, MemoryExceeded) or out_of_memory(error)
            if self.group.size == 1 or self.backend.size > 1 or not memory:
                raise
            self._failure = MemoryExceeded(str(error))

    def due(self, seconds: float, bounded: int) -> bool:
        """Whether it is time for a meeting; a search of one group needs none before its end.

        Args:
            seconds: since the last meeting.
            bounded: domains that this group has bounded.
        """
        if self.group.size == 1:
            return False
        due = bool(self._aside) or seconds >= self._quantum or bounded >= self._allowed or self.group.called()
        return bool(self.backend.agree(float(due)))

    # -- meetings ---------------------------------------------------------------------------------------------------

    def synchronise(self, splitting: Splitting[D, Any, Any], stop: Stop, longest: float) -> Ending | None:
        """Tell and hear statistics; how the search ends, or None after moving domains.

        Args:
            stop: the limit that this group has met; ``longest``: seconds of its longest round.

        Raises:
            LostDomains: some domain is not accounted for.
            MemoryExceeded, DeadlineExceeded: what ended a group.
        """
        # The others need not go on for long: this one would only wait for them.
        self.group.call()
        failed, found = self._failure is not None, splitting.witness is not None
        mine = Report(splitting.count(), self._sent, self._received, found, len(self._aside), failed, stop, longest)
        reports = [Report.unpack(values) for values in self.group.numbers(mine.pack())]
        self.group.answered()
        total = SearchStatistics.total(r.statistics for r in reports)
        witness = self._settle(splitting, reports)
        if witness is None:
            if any(r.failed for r in reports):
                raise next(e for e in self.group.objects(self._failure) if e is not None)
            balance(reports, splitting.roots)
            if total.open:
                stop = min((r.stop for r in reports if r.stop), default=Stop.NONE)
                stop = stop or (Stop.DOMAINS if self._enough(total.bounded) else Stop.NONE)
                if not stop:
                    self._share_out(splitting, reports)
                    return None
        groups = tuple(GroupShare(r.statistics.bounded, r.received) for r in reports)
        return Ending(witness, stop, SearchTotals(total, groups if len(groups) > 1 else ()))

    def _share_out(self, splitting: Splitting[D, Any, Any], reports: list[Report]) -> None:
        """Move domains where pools are uneven, and set the time to the next meeting."""
        counts = [r.statistics.open for r in reports]
        moves = plan(counts)
        if moves:
            self._move(splitting, moves)
        self._quiet = 0 if moves else self._quiet + 1
        pause = min(_SHORTEST * 2.0 ** min(self._quiet, 16), _LONGEST)
        self._quantum = max(pause, _ROUNDS * max(r.longest for r in reports))
        others = SearchStatistics.total(r.statistics for i, r in enumerate(reports) if i != self.group.rank)
        self.others = replace(others, open=sum(counts) - splitting.pool.count)
        if self.max_domains is not None:
            # This group's part of what is still allowed; none can use up more than that unseen.
            left = self.max_domains - others.bounded - splitting.statistics.bounded
            self._allowed = splitting.statistics.bounded + left / self.group.size

    # -- moving domains ---------------------------------------------------------------------------------------------

    def _move(self, splitting: Splitting[D, Any, Any], moves: list[Move]) -> None:
        """Carry out a plan; every rank knows all of it, so each knows how many domains to expect from whom."""
        rank, size, device = self.group.rank, self.group.size, self.backend.device
        source = moves[0].source
        layout = self.group.broadcast_object(Layout.of(splitting.give(0)) if rank == source else None, source)
        # A row of the message per domain; what does not fit waits for the next meeting.
        most = max(1, _MESSAGE_BYTES // (layout.width * size))
        moves = [replace(m, count=min(m.count, most)) for m in moves]
        out = torch.zeros((size, max(m.count for m in moves), layout.width), dtype=torch.uint8, device=device)
        given = [m for m in moves if m.source == rank]
        count = sum(m.count for m in given)
        if count:
            rows = layout.pack(splitting.give(count))
            if rows.shape[0] != count:
                raise LostDomains(f"group {rank} was to give {count} domains and gave {rows.shape[0]}")
            for move, index in zip(given, deal([m.count for m in given]), strict=True):
                out[move.target, : move.count] = rows[index.to(device)]
            self._sent += count
        got = self.group.all_to_all(out)
        for move in moves:
            if move.target == rank:
                splitting.take(layout.unpack(got[move.source, : move.count], splitting.kind))
                self._received += move.count
