"""Waiting for workers: their messages, their deadlines, and signals to ourselves."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from verifier.runtime.handle import WorkerHandle

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TICK_SECONDS = 0.2
_LONG_SECONDS = 3600.0  # select refuses to wait for ever so long


class Signals:
    """While active, SIGTERM, SIGINT and SIGHUP are only noted; ``received`` is the first one."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._read, self._write = -1, -1
        self._before: list[tuple[int, object]] = []
        self._wakeup = -1

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = [(number, signal.signal(number, self._note)) for number in _SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._read

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 64)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number


def wait(
    workers: Sequence[WorkerHandle],
    signals: Signals,
    parent: int | None = None,
    tick: Callable[[], None] | None = None,
) -> list[WorkerHandle]:
    """Return the workers that have an outcome, once there is one; a worker past its limit gets the watchdog's.

    A signal, or the end of ``parent`` (a process id that must stay ours), ends every worker with ``unknown``.

    Args:
        tick: called several times per second, for the display.
    """
    while True:
        now = time.monotonic()
        for worker in workers:
            if worker.outcome is None and now >= worker.end:
                worker.time_out()
            elif worker.outcome is None and now >= worker.silent_end:
                worker.read()  # it may have said something since
                if worker.outcome is None and now >= worker.silent_end:
                    worker.hung()
        why = _ended(signals, parent)
        if why is not None:
            for worker in workers:
                worker.cut("unknown", why, 128 + (signals.received or signal.SIGTERM))
        done = [worker for worker in workers if worker.outcome is not None]
        if done:
            return done
        if tick is not None:
            tick()
        until = min((min(worker.end, worker.silent_end) for worker in workers), default=now)
        patience = min(max(0.0, until - time.monotonic()), _LONG_SECONDS)
        if tick is not None or parent is not None:
            patience = min(patience, _TICK_SECONDS)
        ready = select.select([*workers, signals], [], [], patience)[0]
        for source in ready:
            if isinstance(source, WorkerHandle):
                source.read()
            else:
                signals.drain()


def _ended(signals: Signals, parent: int | None) -> str | None:
    if signals.received is not None:
        return f"interrupted by {signal.Signals(signals.received).name}"
    if parent is not None and os.getppid() != parent:
        return "the calling script has ended"
    return None
