"""The parent's view of a running query: the pipe that its messages come from, the clock, and the process behind it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from verifier.core.messages import MessageError, decode
from verifier.parallel.heartbeat import SILENCE_SECONDS
from verifier.report.record import Outcome
from verifier.runtime.clock import limits
from verifier.runtime.gpu_context import begin_context
from verifier.runtime.messages import (
    WORKER_MESSAGES,
    Figure,
    Figures,
    Finished,
    Note,
    PhaseBegun,
    Standing,
    WorkerHeartbeat,
    WorkerMessage,
)
from verifier.runtime.processes import ForkedProcess, Process, lead_group
from verifier.runtime.query import Query
from verifier.runtime.worker import work


@dataclass
class WorkerHandle:
    """The parent's view of a running query.

    Attributes:
        query: what is asked.
        process: who works on it.
        pipe: our end of the pipe, not blocking.
        phase, figures, notes, seconds: what the child has reported.
        stands: an outcome that holds whatever comes, while the child tries to make it say more.
        outcome: once it is over.
        told: called with ``stands``.
    """

    query: Query
    process: Process
    pipe: int
    phase: str = "start"
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stands: Outcome | None = None
    outcome: Outcome | None = None
    told: Callable[[Outcome], None] = lambda outcome: None
    _before: int = 0  # domains bounded before this phase
    _has_heartbeat: bool = False
    _heard: float = 0.0
    _buffer: bytearray = field(default_factory=bytearray)
    _began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, query: Query) -> WorkerHandle:
        """Fork. The caller must not have started threads or torch."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(query, write, parent)
        os.close(write)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        os.set_blocking(read, False)
        return cls(query, ForkedProcess(pid), read)

    def fileno(self) -> int:
        return self.pipe

    @property
    def rate(self) -> float | None:
        """Domains bounded per second in this phase, for the display."""
        domains, seconds = self.figures.get("domains"), time.monotonic() - self._began
        if not isinstance(domains, int) or domains <= self._before or seconds <= 0.0:
            return None
        return (domains - self._before) / seconds

    @property
    def end(self) -> float:
        """``time.monotonic()`` at which the watchdog ends the query."""
        hard = limits(self.query.timeout).hard
        return float("inf") if hard is None else self.query.start + hard

    @property
    def silent_end(self) -> float:
        """``time.monotonic()`` at which a worker that leads other ranks has been silent for too long."""
        return self._heard + SILENCE_SECONDS if self._has_heartbeat else float("inf")

    def hung(self) -> Outcome:
        """The outcome of a worker that does not respond."""
        message = f"rank 0 has not responded for {SILENCE_SECONDS:.0f} s during {self.phase}"
        outcome = self.cut("error", message, 1)
        if outcome.reason == message:
            outcome = self.outcome = replace(outcome, error={"kind": "RankFailed", "message": message})
        return outcome

    def read(self) -> None:
        """Take what the child has sent; sets ``outcome`` once the child has finished or died."""
        if self._drain() and self.outcome is None:
            self.outcome = self._died()

    def _drain(self) -> bool:
        """Take what lies in the pipe; True when the child has closed it."""
        while self.outcome is None:
            try:
                data = os.read(self.pipe, 1 << 20)
            except BlockingIOError:
                return False
            if not data:
                return True
            self._heard = time.monotonic()
            self._buffer += data
            *lines, rest = self._buffer.split(b"\n")
            self._buffer = bytearray(rest)
            for line in lines:
                try:
                    self._take(decode(line, *WORKER_MESSAGES))
                except MessageError as error:
                    self._unreadable(error)
        return False

    def _unreadable(self, error: MessageError) -> None:
        """A message that says nothing, perhaps the outcome, ends the query; a proof that stands does so still."""
        self.process.kill()
        message = f"internal error: {error} (from the worker process, during {self.phase})"
        if self.outcome is None:
            self.outcome = self.stands or self._error("MessageError", message)

    def _take(self, message: WorkerMessage) -> None:
        match message:
            case Finished(outcome):
                self.outcome = outcome
            case Standing(outcome):
                self.stands = replace(outcome, notes=tuple(self.notes))
                self.told(self.stands)
            case PhaseBegun(name):
                now = time.monotonic()
                self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._began
                self.phase, self._began = name, now
                domains = self.figures.get("domains")
                self._before = domains if isinstance(domains, int) else 0
            case Figures(values):
                self.figures.update(values)
            case Note(text):
                self.notes.append(text)
            case WorkerHeartbeat():
                self._has_heartbeat = True

    def cut(self, verdict: str, why: str, exit_code: int = 0) -> Outcome:
        """End the child and its children now; the outcome keeps the last figures."""
        self.process.kill()
        self._drain()
        if self.outcome is None:  # otherwise the child finished just before
            figures, notes = self.figures, tuple(self.notes)
            self.outcome = self.stands or Outcome(
                verdict, why, seconds=self.seconds, statistics=figures, notes=notes, exit_code=exit_code
            )
        return self.outcome

    def time_out(self) -> Outcome:
        """The watchdog's outcome."""
        limit = f"{self.query.timeout:g} s"
        return self.cut("timeout", f"time limit of {limit} reached during {self.phase}{describe(self.figures)}")

    def close(self) -> None:
        self.process.kill()
        os.close(self.pipe)

    def _died(self) -> Outcome:
        if self.stands is not None:
            return self.stands
        status = self.process.reap(0.2)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            message = f"killed (signal {signal.SIGKILL.value}) during {self.phase}, perhaps for lack of memory"
        else:
            how = "" if code is None else f" with signal {-code}" if code < 0 else f" with exit status {code}"
            message = f"internal error: the worker process ended{how} during {self.phase}"
        return self._error("WorkerDied", message)

    def _error(self, kind: str, message: str) -> Outcome:
        return Outcome(
            "error",
            message,
            error={"kind": kind, "message": message},
            exit_code=1,
            seconds=self.seconds,
            statistics=self.figures,
            notes=tuple(self.notes),
        )


def describe(figures: Mapping[str, Figure]) -> str:
    """`` (12 domains open, worst bound -0.01)`` or nothing."""
    parts = []
    if figures.get("open") is not None:
        parts.append(f"{figures['open']} domains open")
    worst = figures.get("worst")
    if worst is not None:
        parts.append(f"worst bound {worst:.4g}" if isinstance(worst, float) else f"worst bound {worst}")
    return f" ({', '.join(parts)})" if parts else ""


def _child(query: Query, pipe: int, parent: int) -> None:
    """Everything the forked process does; never returns."""
    code = 1
    try:
        lead_group(parent)
        with contextlib.suppress(OSError):
            if query.quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.dup2(2, 1)  # stdout belongs to the verdict
        begin_context(query.config)
        work(query, pipe)
        code = 0
    finally:
        os._exit(code)
