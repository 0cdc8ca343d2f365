"""The process that does the work of one query, and its parent's view of it.

The parent forks before anything heavy is imported and stays small: it holds the clock, shows progress and is the only
one that writes results, so that a verdict and the watchdog cannot overwrite each other. The child imports torch, solves
and sends lines of JSON through a pipe; the last line is the outcome. The child dies with its parent. Instead of a fork,
the resident worker (:mod:`verifier.cli.resident`) may provide it; nothing else differs then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from verifier.cli.clock import limits, solver_deadline
from verifier.cli.device import begin_context
from verifier.core.allocator import keep_freed_blocks
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, VerifierError
from verifier.report.record import Outcome, plain

if TYPE_CHECKING:
    from verifier.config import Config
    from verifier.core.result import Result, Witness

Send = Callable[[dict[str, Any]], None]

_UPDATE_SECONDS = 0.1
# A worker that leads other ranks is given up after this long without a sign of life.
BEAT_SECONDS, LAPSE_SECONDS = 1.0, 15.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One query.

    Attributes:
        onnx, vnnlib: the files; they exist.
        settings: ``None``: the defaults, which are then only built where they are needed.
        timeout: seconds, or ``None``.
        start: ``time.monotonic()`` from which the limit counts.
        verbose: keep the warnings of libraries.
        quiet: drop what libraries print. The caller's pipes then close with the parent, however long the system takes
            to free the child's memory.
    """

    onnx: Path
    vnnlib: Path
    settings: Config | None
    timeout: float | None
    start: float
    verbose: bool = False
    quiet: bool = False

    @cached_property
    def config(self) -> Config:
        """All settings."""
        from verifier.config import Config

        return Config() if self.settings is None else self.settings


# -------------------------------------------------------------------------------------------------------- the child


class PipeProgress:
    """Sends phases at once and figures a few times per second; adds up the seconds of every phase.

    ``domains`` counts from zero in every search; what is sent counts all searches of the query.
    """

    def __init__(self, send: Send) -> None:
        self.seconds: dict[str, float] = {}
        self._send = send
        self._phase: tuple[str, float] | None = None
        self._figures: dict[str, Any] = {}
        self._sent = 0.0
        self._domains, self._earlier = 0, 0  # of the current search, and of those before it

    def phase(self, name: str) -> None:
        self.finish()
        self._next_search()
        self._phase = (name, time.monotonic())
        self._send({"phase": name})

    def update(self, **figures: float | int | str | None) -> None:
        domains = figures.get("domains")
        if isinstance(domains, int):
            if domains < self._domains:
                self._next_search()
            self._domains = domains
            figures["domains"] = self._earlier + domains
        self._figures.update(figures)
        now = time.monotonic()
        if now - self._sent >= _UPDATE_SECONDS:
            self._sent = now
            self._send({"figures": plain(self._figures)})
            self._figures = {}

    def _next_search(self) -> None:
        self._earlier, self._domains = self._earlier + self._domains, 0

    def finish(self) -> None:
        """Close the current phase."""
        if self._phase is not None:
            name, began = self._phase
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        self._phase = None


class _Notes(logging.Handler):
    """Forwards what the package logs; each sentence once."""

    def __init__(self, send: Send) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.texts:
            self.texts.append(text)
            self._send({"note": text})


def solve(job: Job, send: Send) -> Outcome:
    """Answer one query; every exception becomes an outcome."""
    progress = PipeProgress(send)
    notes = _Notes(send)
    logger = logging.getLogger("verifier")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not job.verbose:
        warnings.simplefilter("ignore")
    holder = _Salvage(progress, notes, send)
    try:
        outcome = _answer(job, progress, holder)
    except DeadlineExceeded as error:
        outcome = Outcome("timeout", str(error))
    except (MemoryExceeded, MemoryError) as error:
        outcome = Outcome("unknown", f"not enough memory: {error}")
    except VerifierError as error:
        outcome = _failure(error, str(error), error.exit_code)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        outcome = _failure(error, f"internal error: {type(error).__name__}: {' '.join(first)}", 1)
    progress.finish()
    logger.removeHandler(notes)
    outcome = {**asdict(outcome), "notes": tuple(notes.texts), "seconds": {**progress.seconds, **outcome.seconds}}
    return Outcome(**outcome)


@dataclass
class _Salvage:
    """What is sent from another thread when a rank was lost and the main thread is stuck waiting for it."""

    progress: PipeProgress
    notes: _Notes
    send: Send
    witness: Callable[[], Any] = lambda: None
    stands: Outcome | None = None

    def announce(self, result: Result) -> None:
        """A proof that stands while it is tried to make it cover more."""
        self.stands = _outcome(result)
        self.send({"stands": asdict(self.stands)})

    def beat(self) -> None:
        """From now on the parent hears from this process every second, or ends it: other ranks wait for it."""

        def run() -> None:
            while True:
                self.send({"beat": BEAT_SECONDS})
                time.sleep(BEAT_SECONDS)

        threading.Thread(target=run, daemon=True).start()

    def lost(self, message: str) -> None:
        """Send the outcome and end the process. A witness that was replayed stands, nothing else does."""
        seconds, notes = dict(self.progress.seconds), tuple(self.notes.texts)
        witness = self.witness()
        if witness is not None:
            text, numbers = _witness_texts(witness)
            outcome = Outcome("sat", message, witness_text=text, witness=numbers, seconds=seconds, notes=notes)
        elif self.stands is not None:
            outcome = self.stands
        else:
            error = {"kind": "RankFailed", "message": message}
            outcome = Outcome("error", message, error=error, exit_code=1, seconds=seconds, notes=notes)
        self.send({"outcome": asdict(outcome)})
        os._exit(outcome.exit_code)


def _answer(job: Job, progress: PipeProgress, salvage: _Salvage) -> Outcome:
    progress.phase("import")
    from verifier import api

    deadline = solver_deadline(job.timeout, job.start)
    with api.job(job.config, salvage.lost) as ranks:
        salvage.witness = lambda: ranks.witness
        ranks.joined = salvage.beat
        result = api.answer(
            job.onnx,
            job.vnnlib,
            job.config,
            deadline,
            progress,
            ranks=ranks,
            announce=salvage.announce,
        )
    return _outcome(result)


def _outcome(result: Result) -> Outcome:
    from verifier.core.result import Verdict

    text, numbers = _witness(result)
    return Outcome(
        verdict=result.verdict.value,
        reason=result.reason,
        witness_text=text,
        witness=numbers,
        certified=result.certified,
        seconds=dict(result.seconds),
        statistics=plain(result.statistics),
        memory=result.memory,
        device=result.device,
        covers=asdict(result.covers),
        exit_code=1 if result.verdict is Verdict.ERROR else 0,
    )


def _witness(result: Result) -> tuple[str | None, dict[str, Any] | None]:
    """The counterexample as the result file has it, and as numbers; nothing unless the verdict is ``sat``."""
    from verifier.core.result import Verdict

    if result.verdict is not Verdict.SAT:
        return None, None
    if result.witness is None:
        raise RuntimeError("sat without a witness")
    return _witness_texts(result.witness)


def _witness_texts(witness: Witness) -> tuple[str, dict[str, Any]]:
    from verifier.spec.witness import format_witness

    numbers = {
        "inputs": witness.inputs.tolist(),
        "outputs": witness.outputs.tolist(),
        "margin": float(witness.margin),
        "case": int(witness.case),
    }
    return format_witness(witness), numbers


def _failure(error: Exception, message: str, exit_code: int) -> Outcome:
    return Outcome(
        verdict="error",
        reason=message,
        error={"kind": type(error).__name__, "message": message},
        exit_code=exit_code,
        trace="" if isinstance(error, VerifierError) else traceback.format_exc(),
    )


def lead_group(parent: int) -> None:
    """Make this forked process the leader of a group of its own, with the usual signals, that dies with its parent."""
    os.setpgid(0, 0)
    die_with_parent(True)
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def die_with_parent(wanted: bool) -> None:
    """Whether the kernel kills this process when its parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0, 0, 0, 0)


def work(job: Job, pipe: int) -> None:
    """Answer one query into the pipe."""
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        with lock:
            while data:
                data = data[os.write(pipe, data) :]

    keep_freed_blocks()
    send({"outcome": asdict(solve(job, send))})


def _child(job: Job, pipe: int, parent: int) -> None:
    """Everything the forked process does; never returns."""
    code = 1
    try:
        lead_group(parent)
        with contextlib.suppress(OSError):
            if job.quiet:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.dup2(2, 1)  # stdout belongs to the verdict
        begin_context(job.config)
        work(job, pipe)
        code = 0
    finally:
        os._exit(code)


# ------------------------------------------------------------------------------------------------------- the parent


class Process(Protocol):
    """The process behind a worker."""

    def kill(self) -> None:
        """SIGKILL to it and its children, now; nothing when it has ended."""

    def reap(self, seconds: float) -> int | None:
        """Wait a little for its end; its wait status, or ``None`` when it is not over yet or not known."""


@dataclass
class Forked:
    """A child of ours, leader of its own process group."""

    pid: int
    _reaped: int | None = None

    def kill(self) -> None:
        if self._reaped is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def reap(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while self._reaped is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._reaped = 0
                break
            if pid:
                self._reaped = status
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(0.005)
        return self._reaped


@dataclass
class Worker:
    """The parent's view of a running query.

    Attributes:
        job: the query.
        process: who works on it.
        pipe: our end of the pipe, not blocking.
        phase, figures, notes, seconds: what the child has reported.
        stands: an outcome that holds whatever comes, while the child tries to make it say more.
        outcome: once it is over.
        told: called with ``stands``.
    """

    job: Job
    process: Process
    pipe: int
    phase: str = "start"
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    stands: Outcome | None = None
    outcome: Outcome | None = None
    told: Callable[[Outcome], None] = lambda outcome: None
    _before: int = 0  # domains bounded before this phase
    _beats: bool = False
    _heard: float = 0.0
    _buffer: bytearray = field(default_factory=bytearray)
    _began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, job: Job) -> Worker:
        """Fork. The caller must not have started threads or torch."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(job, write, parent)
        os.close(write)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        os.set_blocking(read, False)
        return cls(job, Forked(pid), read)

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
        hard = limits(self.job.timeout).hard
        return float("inf") if hard is None else self.job.start + hard

    @property
    def lapse(self) -> float:
        """``time.monotonic()`` at which a worker that leads other ranks has been silent for too long."""
        return self._heard + LAPSE_SECONDS if self._beats else float("inf")

    def hung(self) -> Outcome:
        """The outcome of a worker that does not respond."""
        message = f"rank 0 has not responded for {LAPSE_SECONDS:.0f} s during {self.phase}"
        self.cut("error", message, 1)
        assert self.outcome is not None
        if self.outcome.reason == message:
            self.outcome = replace(self.outcome, error={"kind": "RankFailed", "message": message})
        return self.outcome

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
                self._take(json.loads(line))
        return False

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"outcome": values}:
                values["notes"] = tuple(values["notes"])
                self.outcome = Outcome(**values)
            case {"stands": values}:
                self.stands = Outcome(**{**values, "notes": tuple(self.notes)})
                self.told(self.stands)
            case {"phase": name}:
                now = time.monotonic()
                self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._began
                self.phase, self._began = name, now
                self._before = self.figures.get("domains") or 0
            case {"figures": figures}:
                self.figures.update(figures)
            case {"note": text}:
                self.notes.append(text)
            case {"beat": _}:
                self._beats = True

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
        limit = f"{self.job.timeout:g} s"
        return self.cut("timeout", f"time limit of {limit} reached during {self.phase}{describe(self.figures)}")

    def close(self) -> None:
        self.process.kill()
        os.close(self.pipe)

    def _died(self) -> Outcome:
        if self.stands is not None:
            return self.stands
        status = self.process.reap(0.2)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        common: dict[str, Any] = {"seconds": self.seconds, "statistics": self.figures, "notes": tuple(self.notes)}
        if code == -signal.SIGKILL:
            message = f"killed (signal {signal.SIGKILL.value}) during {self.phase}, perhaps for lack of memory"
        else:
            how = "" if code is None else f" with signal {-code}" if code < 0 else f" with exit status {code}"
            message = f"internal error: the worker process ended{how} during {self.phase}"
        return Outcome("error", message, error={"kind": "WorkerDied", "message": message}, exit_code=1, **common)


def describe(figures: dict[str, Any]) -> str:
    """`` (12 domains open, worst bound -0.01)`` or nothing."""
    parts = []
    if figures.get("open") is not None:
        parts.append(f"{figures['open']} domains open")
    worst = figures.get("worst")
    if worst is not None:
        parts.append(f"worst bound {worst:.4g}" if isinstance(worst, float) else f"worst bound {worst}")
    return f" ({', '.join(parts)})" if parts else ""
