"""The process that does the work of one query.

Its parent forks before anything heavy is imported and stays small (:mod:`verifier.runtime.handle`): it holds the clock,
shows progress and is the only one that writes results, so that a verdict and the watchdog cannot overwrite each other.
This process imports torch, solves and sends messages through a pipe; the last one is the outcome. It dies with its
parent. Instead of a fork, the warm server (:mod:`verifier.runtime.warm_server`) may provide it; nothing else differs
then.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from verifier.core.allocator import keep_freed_blocks
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, PluginFailed, VerifierError
from verifier.core.messages import Json, encode
from verifier.core.plugins import Plugin, blamed, noted
from verifier.parallel.heartbeat import HEARTBEAT_SECONDS
from verifier.report.record import Outcome, plain
from verifier.runtime.clock import solver_deadline
from verifier.runtime.messages import (
    Figure,
    Figures,
    Finished,
    Note,
    PhaseBegun,
    Standing,
    WorkerHeartbeat,
    WorkerMessage,
)
from verifier.runtime.query import Query

if TYPE_CHECKING:
    from verifier.core.result import Result, Witness

Send = Callable[[WorkerMessage], None]

_UPDATE_SECONDS = 0.1


class PipeProgress:
    """Sends phases at once and figures a few times per second; adds up the seconds of every phase.

    ``domains`` counts from zero in every search; what is sent counts all searches of the query.

    Attributes:
        stands: a proof that stands while it is tried to make it cover more.
    """

    def __init__(self, send: Send) -> None:
        self.seconds: dict[str, float] = {}
        self.stands: Outcome | None = None
        self._send = send
        self._phase: tuple[str, float] | None = None
        self._figures: dict[str, Figure] = {}
        self._sent = 0.0
        self._domains, self._earlier = 0, 0  # of the current search, and of those before it

    def phase(self, name: str) -> None:
        self.finish()
        self._next_search()
        self._phase = (name, time.monotonic())
        self._send(PhaseBegun(name))

    def update(self, **figures: Figure) -> None:
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
            self._send(Figures(plain(self._figures)))
            self._figures = {}

    def standing(self, result: Result) -> None:
        self.stands = _outcome(result)
        self._send(Standing(self.stands))

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
            self._send(Note(text))


def solve(query: Query, send: Send) -> Outcome:
    """Answer one query; every exception becomes an outcome."""
    progress = PipeProgress(send)
    notes = _Notes(send)
    logger = logging.getLogger("verifier")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not query.verbose:
        warnings.simplefilter("ignore")

    def told(found: Sequence[Plugin]) -> None:
        """At once, for the record of a query that is cut off; figures are numbers and texts."""
        send(Figures({"plugins": json.dumps([plugin.entry() for plugin in found])}))

    with noted(told) as used:
        outcome = _ended(query, progress, _LostRank(progress, notes, send, used=used))
    if used and "plugins" not in outcome.statistics:
        outcome = replace(outcome, statistics={**outcome.statistics, **_listed(used)})
    progress.finish()
    logger.removeHandler(notes)
    return replace(outcome, notes=tuple(notes.texts), seconds={**progress.seconds, **outcome.seconds})


def _ended(query: Query, progress: PipeProgress, lost: _LostRank) -> Outcome:
    try:
        return _answer(query, progress, lost)
    except DeadlineExceeded as error:
        return Outcome("timeout", str(error))
    except (MemoryExceeded, MemoryError) as error:
        return Outcome("unknown", f"not enough memory: {error}")
    except Exception as raised:
        error = blamed(raised)
        if isinstance(error, VerifierError):
            return _failure(error, str(error), error.exit_code)
        first = str(error).strip().splitlines()[:1]
        return _failure(error, f"internal error: {type(error).__name__}: {' '.join(first)}", 1)


def _listed(used: Sequence[Plugin]) -> dict[str, Json]:
    """Plug-ins as they stand among the statistics."""
    return {"plugins": [dict(plugin.entry()) for plugin in used]} if used else {}


@dataclass
class _LostRank:
    """What is sent from another thread when a rank was lost and the main thread is stuck waiting for it."""

    progress: PipeProgress
    notes: _Notes
    send: Send
    witness: Callable[[], Witness | None] = lambda: None
    used: Sequence[Plugin] = field(default_factory=list)

    def send_heartbeats(self) -> None:
        """From now on the parent hears from this process every second, or ends it: other ranks wait for it."""

        def run() -> None:
            while True:
                self.send(WorkerHeartbeat())
                time.sleep(HEARTBEAT_SECONDS)

        threading.Thread(target=run, daemon=True).start()

    def end(self, message: str) -> None:
        """Send the outcome and end the process. A witness that was replayed stands, nothing else does."""
        seconds, notes = dict(self.progress.seconds), tuple(self.notes.texts)
        known = partial(Outcome, seconds=seconds, notes=notes, statistics=_listed(self.used))
        witness = self.witness()
        if witness is not None:
            text, numbers = _witness_texts(witness)
            outcome = known("sat", message, witness_text=text, witness=numbers)
        elif self.progress.stands is not None:
            outcome = self.progress.stands
        else:
            error = {"kind": "RankFailed", "message": message}
            outcome = known("error", message, error=error, exit_code=1)
        self.send(Finished(outcome))
        os._exit(outcome.exit_code)


def _answer(query: Query, progress: PipeProgress, lost: _LostRank) -> Outcome:
    progress.phase("import")
    from verifier import api

    deadline = solver_deadline(query.timeout, query.start)
    with api.job(query.config, lost.end) as ranks:
        lost.witness = lambda: ranks.witness
        ranks.joined = lost.send_heartbeats
        network = dict(query.networks) if query.networks else query.onnx
        terms = api.Terms(deadline, progress, ranks, query.proof)
        result = api.answer(network, query.vnnlib, query.config, terms)
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


def _witness(result: Result) -> tuple[str | None, dict[str, Json] | None]:
    """The counterexample as the result file has it, and as numbers; nothing unless the verdict is ``sat``."""
    from verifier.core.result import Verdict

    if result.verdict is not Verdict.SAT:
        return None, None
    if result.witness is None:
        raise RuntimeError("sat without a witness")
    return _witness_texts(result.witness)


def _witness_texts(witness: Witness) -> tuple[str, dict[str, Json]]:
    from verifier.spec.witness import format_witness

    numbers: dict[str, Json] = {
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
        trace=traceback.format_exc() if isinstance(error, PluginFailed) or not isinstance(error, VerifierError) else "",
    )


def work(query: Query, pipe: int) -> None:
    """Answer one query into the pipe."""
    lock = threading.Lock()

    def send(message: WorkerMessage) -> None:
        data = memoryview(encode(message) + b"\n")
        with lock:
            while data:
                data = data[os.write(pipe, data) :]

    keep_freed_blocks()
    send(Finished(solve(query, send)))
