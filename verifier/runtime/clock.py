"""When a process began, on the monotonic clock: a time limit counts from there, not from the first line of ours."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from verifier.core.deadline import Deadline

WATCHDOG_SECONDS = 0.3
_PLAUSIBLE_AGE = 3600.0


def process_start(pid: int | None = None) -> float:
    """``time.monotonic()`` at the start of a process (ours by default), from ``/proc``; now when that is not known.

    The kernel counts from boot in ticks of 10 ms; the figure is rounded down, so that a limit is never exceeded by it.
    """
    now = time.monotonic()
    try:
        with open(f"/proc/{pid or 'self'}/stat", encoding="ascii", errors="replace") as handle:
            ticks = int(handle.read().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return now
    return now - age if 0.0 <= age <= _PLAUSIBLE_AGE else now


class Limits(NamedTuple):
    """Seconds after the start at which the solver should end, and at which it is ended."""

    soft: float | None
    hard: float | None


def solver_deadline(timeout: float | None, start: float) -> Deadline:
    """The solver's clock: it runs out early enough to report, and names the limit that the user gave."""
    soft = limits(timeout).soft
    if timeout is None or soft is None:
        return Deadline(None, start)
    return Deadline(timeout, start - (timeout - soft))


def limits(timeout: float | None) -> Limits:
    """Leave the watchdog 0.3 s (a fifth of a very short limit), and the solver the same again to report."""
    if timeout is None:
        return Limits(None, None)
    margin = min(WATCHDOG_SECONDS, timeout / 5)
    return Limits(timeout - 2 * margin, timeout - margin)
