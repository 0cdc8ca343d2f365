"""Liveness of a job: every rank's heart beats into a store, and a lost rank ends the job with one message.

A rank that raises writes what happened and leaves with ``os._exit``. One that is killed is noticed by its parent, or by
its heart when it runs elsewhere. One that hangs (stopped, deadlocked inside the interpreter) misses its beats. Whoever
notices ends the local ranks, which breaks every collective call that waits for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

BEAT_SECONDS = 1.0
LAPSE_SECONDS = 15.0
_STORE_TIMEOUT = timedelta(seconds=LAPSE_SECONDS)
# What the main thread gets to notice by itself.
_GRACE_SECONDS = 2.0

Log = Callable[[int], str]


class Monitor:
    """The heart of one rank, and the eye of the one that watches.

    Args:
        store: a connection of its own; other threads' waits must not delay a beat.
        children: processes of the ranks that were started here, by rank; only the rank that started them has any.
        log: the end of what such a process printed.
        watched: ranks whose beats count for this one.
        fatal: called with the message, from the monitor's thread, when a rank is lost; the main thread may be stuck.
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
        self._seen: dict[int, tuple[str, float]] = {}
        self._phases: dict[int, str] = {}
        self._count = 0
        store.set_timeout(_STORE_TIMEOUT)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """No more beats, no more watching."""
        self._over.set()

    def dismiss(self) -> None:
        """The job is over, well or badly: ranks that still wait need not."""
        self._store.set("over", "")

    def phase(self, name: str) -> None:
        """What this rank does now, for messages about it."""
        self._phase = name
        with contextlib.suppress(Exception):  # a lost store is noticed by the thread
            self._beat()

    def report(self, kind: str, message: str) -> None:
        """This rank fails; others read why."""
        with contextlib.suppress(Exception):
            text = json.dumps({"phase": self._phase, "kind": kind, "message": message})
            self._store.set(f"error/{self.rank}", text)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        pause = BEAT_SECONDS / 5 if self._children else BEAT_SECONDS
        beaten = time.monotonic()
        while not self._over.wait(pause):
            try:
                self._look_at_children()
                if time.monotonic() - beaten >= BEAT_SECONDS:
                    beaten = time.monotonic()
                    self._beat()
                    self._look_at_beats()
            except Exception as error:
                if not self._over.is_set():
                    self._lost(f"the store of the job is out of reach: {str(error).splitlines()[0]}")
            if self.failure is not None:
                return

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            beat = {"count": self._count, "phase": self._phase}
            with contextlib.suppress(Exception) if self._over.is_set() else contextlib.nullcontext():
                self._store.set(f"beat/{self.rank}", json.dumps(beat))

    def _look_at_children(self) -> None:
        for rank, process in self._children.items():
            code = process.poll()
            if code is not None:
                self._lost(self._died(rank, code))
                return

    def _look_at_beats(self) -> None:
        now = time.monotonic()
        if self.rank != 0 and self._store.check(["over"]):
            self._lost("rank 0 has ended the job")
            return
        for rank in self._watched:
            if self._store.check([f"error/{rank}"]):
                self._lost(self._reported(rank))
                return
            text = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
            before, since = self._seen.setdefault(rank, ("", now))
            if text != before:
                self._seen[rank] = (text, now)
                self._phases[rank] = json.loads(text)["phase"]
            elif now - since > LAPSE_SECONDS + (0.0 if text else 4 * LAPSE_SECONDS):
                during = self._phases.get(rank, "start-up")
                self._lost(f"rank {rank} has not responded for {now - since:.0f} s during {during}")
                return

    def _died(self, rank: int, code: int) -> str:
        with contextlib.suppress(Exception):
            if self._store.check([f"error/{rank}"]):
                return self._reported(rank)
        with contextlib.suppress(Exception):
            if self._store.check([f"beat/{rank}"]):  # a get would wait for the first one
                self._phases[rank] = json.loads(self._store.get(f"beat/{rank}"))["phase"]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        tail = self._log(rank).strip().splitlines()
        said = f": {tail[-1]}" if tail and code > 0 else ""
        return f"rank {rank} {how} during {self._phases.get(rank, 'start-up')}{said}"

    def _reported(self, rank: int) -> str:
        record: dict[str, Any] = json.loads(self._store.get(f"error/{rank}"))
        self.memory = record["kind"] == "memory"
        return f"rank {rank} failed during {record['phase']}: {record['message']}"

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
