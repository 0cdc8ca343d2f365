"""What is known of inputs and radii, and the tables made of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np


class Status(StrEnum):
    """Of an input at a radius.

    ``certified``: ``verify`` answers ``unsat``, every point within the radius has the input's label. ``falsified``:
    ``sat``, there is an adversarial example, perhaps the input itself. ``unknown``: neither could be shown.
    """

    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Answer:
    """One input at one radius.

    Attributes:
        index: of the input.
        by: ``bounds`` (a batch of CROWN bounds), ``attack`` (a batch of short ones), ``verify``, ``input`` (it is
            itself misclassified), ``implied`` (by the answer at another radius) or ``earlier`` (read from a file).
        reason: one sentence; empty for most.
        seconds: that it took; a batch's time is divided among its inputs.
        adversarial: a replayed counterexample in the input's shape, where it is falsified.
    """

    index: int
    epsilon: float
    status: Status
    by: str
    reason: str = ""
    seconds: float = 0.0
    adversarial: np.ndarray | None = None

    def at(self, index: int) -> Answer:
        """The same for an equal input elsewhere."""
        return replace(self, index=index)


@dataclass(frozen=True)
class RadiusCounts:
    """Inputs by status at one radius."""

    epsilon: float
    certified: int
    falsified: int
    unknown: int

    @property
    def total(self) -> int:
        return self.certified + self.falsified + self.unknown


@dataclass(frozen=True, eq=False)
class Certification:
    """What :func:`verifier.certify` found.

    Attributes:
        epsilons: ascending.
        labels: (N,); ``correct``: (N,) bool, whether the network says so of the input itself.
        answers: (N, E), by input and radius.
        norm: of the radii.
        seconds: that all of it took.
    """

    epsilons: tuple[float, ...]
    labels: np.ndarray
    correct: np.ndarray
    answers: Sequence[Sequence[Answer]]
    norm: str
    seconds: float

    @property
    def status(self) -> np.ndarray:
        """(N, E) words: ``certified``, ``falsified`` or ``unknown``."""
        return np.array([[a.status.value for a in row] for row in self.answers], dtype="U9").reshape(
            len(self.labels), len(self.epsilons)
        )

    @property
    def adversarial(self) -> Mapping[tuple[int, float], np.ndarray]:
        """Adversarial examples by input and radius, in the input's shape; those of misclassified inputs included."""
        found = (a for row in self.answers for a in row)
        return {(a.index, a.epsilon): a.adversarial for a in found if a.adversarial is not None}

    @property
    def counts(self) -> tuple[RadiusCounts, ...]:
        """Inputs by status at every radius."""
        out = []
        for place, epsilon in enumerate(self.epsilons):
            column = [row[place].status for row in self.answers]
            out.append(RadiusCounts(epsilon, *(column.count(status) for status in Status)))
        return tuple(out)

    def rows(self) -> list[dict[str, Any]]:
        """Figures by radius; ``certified_accuracy`` and ``robust_accuracy_at_most`` enclose the robust accuracy."""
        n = max(len(self.labels), 1)
        return [
            {
                "epsilon": c.epsilon,
                "inputs": c.total,
                "certified": c.certified,
                "falsified": c.falsified,
                "unknown": c.unknown,
                "certified_accuracy": c.certified / n,
                "robust_accuracy_at_most": 1.0 - c.falsified / n,
            }
            for c in self.counts
        ]

    def table(self) -> str:
        """For people, in plain text."""
        clean = f"accuracy on the inputs themselves: {_percent(float(self.correct.mean()))} of {len(self.labels)}"
        head, body = _cells(self.rows())
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *body)
        ]
        return "\n".join([clean, *lines, f"{self.norm} radii, {self.seconds:.1f} s"])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head, body = _cells(self.rows())
        lines = [head, ["---:"] * len(head), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def csv(self) -> str:
        """Every input at every radius, one line each."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["input", "label", "correct", "epsilon", "status", "by", "seconds", "reason"])
        for row, label, correct in zip(self.answers, self.labels, self.correct, strict=True):
            for a in row:
                line = [
                    a.index,
                    int(label),
                    int(correct),
                    a.epsilon,
                    a.status.value,
                    a.by,
                    f"{a.seconds:.4f}",
                    a.reason,
                ]
                writer.writerow(line)
        return out.getvalue()

    def plot(self, path: str | Path) -> None:
        """Accuracy against radius, as a picture; needs matplotlib.

        Raises:
            InputError: it is not installed, or does not write such files.
        """
        from verifier.certification.plots import accuracy_plot

        accuracy_plot(self, Path(path))


@dataclass(frozen=True)
class Radius:
    """The largest radius at which an input is certified, as far as it was found.

    Attributes:
        certified: the largest radius that is; 0.0 where the input itself is misclassified or nothing was shown.
        falsified: the smallest radius that is known to be falsified; None: none was found.
        unknown: the smallest radius at which neither could be shown; None: there is none.
        adversarial: at the falsified radius, in the input's shape.
    """

    index: int
    certified: float
    falsified: float | None
    unknown: float | None
    seconds: float
    adversarial: np.ndarray | None = None


def radius_csv(found: Sequence[Radius], labels: np.ndarray) -> str:
    """One line per input."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["input", "label", "certified_radius", "falsified_radius", "unknown_radius", "seconds"])
    for r, label in zip(found, labels, strict=True):
        ends = ["" if v is None else v for v in (r.falsified, r.unknown)]
        writer.writerow([r.index, int(label), r.certified, *ends, f"{r.seconds:.4f}"])
    return out.getvalue()


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    shown: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("epsilon", lambda r: f"{r['epsilon']:g}"),
        ("certified", lambda r: str(r["certified"])),
        ("falsified", lambda r: str(r["falsified"])),
        ("unknown", lambda r: str(r["unknown"])),
        ("certified accuracy", lambda r: _percent(r["certified_accuracy"])),
        ("robust accuracy at most", lambda r: _percent(r["robust_accuracy_at_most"])),
    ]
    return [name for name, _ in shown], [[show(row) for _, show in shown] for row in rows]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
