"""Liveness of a job: every rank writes a heartbeat into a store, and a lost rank ends the job with one message.

A rank that raises writes what happened and leaves with ``os._exit``. One that is killed is noticed by its parent, or by
its heartbeat when it runs elsewhere. One that hangs (stopped, deadlocked inside the interpreter) misses heartbeats.
Whoever notices ends the local ranks, which breaks every collective call that waits for them.

Nothing here imports torch: the parent of a query waits for the heartbeat of the process that leads the ranks, too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from verifier.core.messages import decode, encode

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

HEARTBEAT_SECONDS = 1.0
# Who has been silent for so long is given up.
SILENCE_SECONDS = 15.0
_STORE_TIMEOUT = timedelta(seconds=SILENCE_SECONDS)
# What the main thread gets to notice by itself.
_GRACE_SECONDS = 2.0

Log = Callable[[int], str]


@dataclass(frozen=True)
class RankHeartbeat:
    """A rank is alive.

    Attributes:
        count: of its heartbeats; another number means that it still is.
        phase: what it does.
    """

    count: int
    phase: str


@dataclass(frozen=True)
class RankFailure:
    """A rank fails.

    Attributes:
        out_of_memory: the verdict is then ``unknown`` instead of ``error``.
    """

    phase: str
    message: str
    out_of_memory: bool


class Heartbeat(Protocol):
    """What the engine says about itself, and what it hears of the job; see :class:`HeartbeatMonitor`."""

    @property
    def failure(self) -> str | None: ...

    @property
    def memory(self) -> bool: ...

    def phase(self, name: str) -> None: ...

    def report(self, message: str, out_of_memory: bool = False) -> None: ...

    def stop(self) -> None: ...


class NoHeartbeat:
    """One rank: nobody listens."""

    failure: str | None = None
    memory = False

    def phase(self, name: str) -> None:
        pass

    def report(self, message: str, out_of_memory: bool = False) -> None:
        pass

    def stop(self) -> None:
        pass


class HeartbeatMonitor:
    """The heartbeat of one rank, and a watch over the heartbeats of others.

    Args:
        store: a connection of its own; other threads' waits must not delay a heartbeat.
        children: processes of the ranks that were started here, by rank; only the rank that started them has any.
        log: the end of what such a process printed.
        watched: ranks whose heartbeats count for this one.
        fatal: called with the message, from the monitor's thread, when a rank is lost; the main thread may be stuck.

    Attributes:
        failure: which rank was lost and how, once one was.
        memory: that rank lacked memory.
    """

    def __init__(
        self,
        rank: int,
        store: Store,
        children: Mapping[int, subprocess.Popen[bytes]],
        log: Log,
        watched: list[int],
        fatal: Callable[[str], None] | None,
    ) -> None:
        self.rank = rank
        self.failure: str | None = None
        self.memory = False
        self._phase = "start-up"
        self._store, self._children, self._log, self._watched = store, children, log, watched
        self._fatal = fatal
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._phases: dict[int, str] = {}
        self._count = 0
        store.set_timeout(_STORE_TIMEOUT)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._send()
        self._thread.start()

    def stop(self) -> None:
        """No more heartbeats, no more watching."""
        self._over.set()

    def end_job(self) -> None:
        """The job is over, well or badly: ranks that still wait need not."""
        self._store.set("over", "")

    def phase(self, name: str) -> None:
        """What this rank does now, for messages about it."""
        self._phase = name
        with contextlib.suppress(Exception):  # a lost store is noticed by the thread
            self._send()

    def report(self, message: str, out_of_memory: bool = False) -> None:
        """This rank fails; others read why."""
        with contextlib.suppress(Exception):
            failure = RankFailure(self._phase, message, out_of_memory)
            self._store.set(f"error/{self.rank}", encode(failure).decode())

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause = HEARTBEAT_SECONDS / 5 if self._children else HEARTBEAT_SECONDS
        sent = time.monotonic()
        while not self._over.wait(pause):
            try:
                self._look_at_children()
                if time.monotonic() - sent >= HEARTBEAT_SECONDS:
                    sent = time.monotonic()
                    self._send()
                    self._look_at_heartbeats()
            except Exception as error:
                if not self._over.is_set():
                    self._lost(f"the store of the job is out of reach: {str(error).splitlines()[0]}")
            if self.failure is not None:
                return

    def _send(self) -> None:
        with self._lock:
            self._count += 1
            heartbeat = RankHeartbeat(self._count, self._phase)
            with contextlib.suppress(Exception) if self._over.is_set() else contextlib.nullcontext():
                self._store.set(f"heartbeat/{self.rank}", encode(heartbeat).decode())

    def _heartbeat(self, rank: int) -> bytes:
        """The last one of a rank; empty before the first, for which a get would wait."""
        key = f"heartbeat/{rank}"
        return self._store.get(key) if self._store.check([key]) else b""

    def _look_at_children(self) -> None:
        for rank, process in self._children.items():
            code = process.poll()
            if code is not None:
                self._lost(self._died(rank, code))
                return

    def _look_at_heartbeats(self) -> None:
        now = time.monotonic()
        if self.rank != 0 and self._store.check(["over"]):
            self._lost("rank 0 has ended the job")
            return
        for rank in self._watched:
            if self._store.check([f"error/{rank}"]):
                self._lost(self._reported(rank))
                return
            found = self._heartbeat(rank)
            before, since = self._seen.setdefault(rank, (b"", now))
            if found != before:
                self._seen[rank] = (found, now)
                self._phases[rank] = decode(found, RankHeartbeat).phase
            elif now - since > SILENCE_SECONDS + (0.0 if found else 4 * SILENCE_SECONDS):
                during = self._phases.get(rank, "start-up")
                self._lost(f"rank {rank} has not responded for {now - since:.0f} s during {during}")
                return

    def _died(self, rank: int, code: int) -> str:
        with contextlib.suppress(Exception):
            if self._store.check([f"error/{rank}"]):
                return self._reported(rank)
        with contextlib.suppress(Exception):
            self._phases[rank] = decode(self._heartbeat(rank), RankHeartbeat).phase
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        tail = self._log(rank).strip().splitlines()
        said = f": {tail[-1]}" if tail and code > 0 else ""
        return f"rank {rank} {how} during {self._phases.get(rank, 'start-up')}{said}"

    def _reported(self, rank: int) -> str:
        failure = decode(self._store.get(f"error/{rank}"), RankFailure)
        self.memory = failure.out_of_memory
        return f"rank {rank} failed during {failure.phase}: {failure.message}"

    def _lost(self, message: str) -> None:
        """End the job: local ranks die, remote ones see the flag, the main thread meets a broken call or asks."""
        self.failure = message
        for process in self._children.values():
            with contextlib.suppress(OSError):
                process.kill()
        if self._fatal is not None and not self._over.wait(_GRACE_SECONDS):
            self._fatal(message)


def leave(code: int) -> None:
    """End this process at once."""
    os._exit(code)
