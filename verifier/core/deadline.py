"""One clock for a whole query, which parsing, attack, bounds, search and clean-up all check."""

from __future__ import annotations

import math
import time

from verifier.core.errors import DeadlineExceeded


class Deadline:
    """A point on the monotonic clock.

    Args:
        seconds: time limit counted from ``start``; ``None`` or infinity for no limit.
        start: a ``time.monotonic()`` value; defaults to now. Pass the process start to include start-up.
    """

    def __init__(self, seconds: float | None = None, start: float | None = None) -> None:
        self.start = time.monotonic() if start is None else start
        self.limit = math.inf if seconds is None else float(seconds)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def remaining(self) -> float:
        """Seconds left; negative once the limit is past."""
        return self.limit - self.elapsed()

    def expired(self) -> bool:
        return self.remaining() <= 0.0

    def check(self, what: str = "") -> None:
        """Raise :class:`DeadlineExceeded` when no time is left."""
        if self.expired():
            raise DeadlineExceeded(f"time limit of {self.limit:g} s reached{' during ' + what if what else ''}")

    def sub(self, seconds: float) -> Deadline:
        """A deadline at most ``seconds`` from now and never later than this one."""
        end = min(self.elapsed() + seconds, self.limit)
        return Deadline(end, self.start)
