"""What a person sees on stderr while a query runs: one live line on a terminal, nothing in a pipe."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(stream: TextIO, total: float | None, bar_format: str, initial: int = 0) -> tqdm:
    """A bar on a terminal that is removed in the end and starts neither threads nor processes, so that its process can
    fork.

    Args:
        total: what ``n`` counts up to.
        bar_format: as tqdm's.
        initial: where ``n`` begins.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    size = shutil.get_terminal_size()  # tqdm hides its bars on a terminal that says that it has no rows
    return Bar(
        total=total,
        initial=initial,
        file=stream,
        bar_format=bar_format,
        leave=False,
        ncols=size.columns - 1,
        nrows=size.lines,
    )


def count(value: float) -> str:
    """A count with at most four digits: ``950``, ``12.3k``, ``4.56M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}"


def status_line(phase: str, figures: Mapping[str, float | int | str | None], left: float | None) -> str:
    """Phase, time left, domains open and done, worst bound, rate; what is not known is left out."""
    parts = [phase]
    if left is not None:
        parts.append(f"{max(left, 0.0):.0f} s left")
    known = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    domains = [f"{count(known[key])} {key}" for key in ("open", "done") if key in known]
    if domains:
        parts.append("domains " + ", ".join(domains))
    if "worst" in known:
        parts.append(f"worst bound {known['worst']:.4g}")
    if "rate" in known:
        parts.append(f"{count(known['rate'])}/s")
    return " | ".join(parts)


class Console:
    """Writes progress of one query.

    Args:
        stream: usually stderr.
        live: one line in place (a terminal); with a limit, a bar shows how much of it has passed.
        verbose: also keep one line per phase and every note, terminal or not.
        end: ``time.monotonic()`` of the limit, or ``None``.
    """

    def __init__(self, stream: TextIO, live: bool, verbose: bool, start: float, end: float | None) -> None:
        self._stream, self._live, self._verbose = stream, live, verbose
        self._start, self._end = start, end
        self._bar: tqdm | None = None
        self._shown_phase = ""
        self._shown_notes = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to show at all."""
        return self._live or self._verbose

    def show(self, phase: str, figures: Mapping[str, float | int | str | None], notes: list[str]) -> None:
        """Bring the display up to date."""
        now = time.monotonic()
        for note in notes[self._shown_notes :]:
            self.line(f"note: {note}")
        self._shown_notes = len(notes)
        if self._verbose and phase != self._shown_phase:
            self.line(f"{now - self._start:8.2f} s  {phase}")
            self._shown_phase = phase
        if self._live:
            self._draw(status_line(phase, figures, None if self._end is None else self._end - now), now - self._start)

    def _draw(self, text: str, passed: float) -> None:
        total = None if self._end is None else self._end - self._start
        if self._bar is None:
            self._bar = progress_bar(self._stream, total, "{desc}" if total is None else "{bar:12} {desc}")
        self._bar.ncols = shutil.get_terminal_size().columns - 1
        self._bar.n = passed if total is None else min(passed, total)
        self._bar.set_description_str(text)

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self.wanted:
            self._stream.write(text + "\n")
        if self.wanted:
            self._stream.flush()

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
