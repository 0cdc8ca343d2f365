"""What a person sees on stderr while a query runs: one live line on a terminal, nothing in a pipe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any, TextIO


def count(value: float) -> str:
    """A count with at most four digits: ``950``, ``12.3k``, ``4.56M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.0f}"


def status_line(phase: str, figures: Mapping[str, Any], left: float | None) -> str:
    """Phase, time left, domains open and done, worst bound, rate; what is not known is left out."""
    parts = [phase]
    if left is not None:
        parts.append(f"{max(left, 0.0):.0f} s left")
    domains = [f"{count(figures[key])} {key}" for key in ("open", "done") if isinstance(figures.get(key), (int, float))]
    if domains:
        parts.append("domains " + ", ".join(domains))
    if isinstance(figures.get("worst"), (int, float)):
        parts.append(f"worst bound {figures['worst']:.4g}")
    if isinstance(figures.get("rate"), (int, float)):
        parts.append(f"{count(figures['rate'])}/s")
    return " | ".join(parts)


class Console:
    """Writes progress of one query.

    Args:
        stream: usually stderr.
        live: rewrite one line in place (a terminal).
        verbose: also keep one line per phase and every note, terminal or not.
        end: ``time.monotonic()`` of the limit, or ``None``.
    """

    def __init__(self, stream: TextIO, live: bool, verbose: bool, start: float, end: float | None) -> None:
        self._stream, self._live, self._verbose = stream, live, verbose
        self._start, self._end = start, end
        self._shown_phase = ""
        self._shown_notes = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to show at all."""
        return self._live or self._verbose

    def show(self, phase: str, figures: Mapping[str, Any], notes: list[str]) -> None:
        """Bring the display up to date."""
        now = time.monotonic()
        for note in notes[self._shown_notes :]:
            self.line(f"note: {note}")
        self._shown_notes = len(notes)
        if self._verbose and phase != self._shown_phase:
            self.line(f"{now - self._start:8.2f} s  {phase}")
            self._shown_phase = phase
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            text = status_line(phase, figures, None if self._end is None else self._end - now)[:width]
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()

    def line(self, text: str) -> None:
        """One line that stays."""
        if self.wanted:
            self._stream.write(("\r\x1b[K" if self._live else "") + text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Remove the live line."""
        if self._live:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
