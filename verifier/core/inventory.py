"""Memory use of one rank by kind: counted where it arises, written into records."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from typing import Any, Literal

PeakKind = Literal["allocator", "tensors", "rss"]


@dataclass(frozen=True)
class RowState:
    """Bytes used for optimising rows, besides the coefficients; those of several chunks add up.

    Attributes:
        slopes: slopes and split multipliers, and the copy of the best ones.
        gradients: of the slopes and multipliers.
        optimizer: the optimiser's two moments.
        chunks: number of chunks of rows over which these figures are summed; one chunk's share exists at a time.
    """

    slopes: int = 0
    gradients: int = 0
    optimizer: int = 0
    chunks: int = 0

    def __add__(self, other: RowState) -> RowState:
        return RowState(
            self.slopes + other.slopes,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.chunks + other.chunks,
        )


@dataclass
class Usage:
    """Peak memory of every kind used by a rank's work so far.

    Attributes:
        coefficients: bytes of the largest linear form (A) held during a backward pass.
        rows: of the start node (or batch of domains) whose rows used most, summed over this rank's chunks of it.
        domains: bytes of the pool of open domains.
    """

    coefficients: int = 0
    rows: RowState = field(default_factory=RowState)
    domains: int = 0

    def note_coefficients(self, size: int) -> None:
        self.coefficients = max(self.coefficients, size)

    def note_rows(self, state: RowState) -> None:
        self.rows = max(self.rows, state, key=lambda s: (s.slopes, s.optimizer))

    def note_domains(self, size: int) -> None:
        self.domains = max(self.domains, size)

    def merged(self, other: Usage) -> Usage:
        """The most of both."""
        rows = max(self.rows, other.rows, key=lambda s: (s.slopes, s.optimizer))
        return Usage(max(self.coefficients, other.coefficients), rows, max(self.domains, other.domains))


@dataclass(frozen=True)
class Inventory:
    """One rank's memory.

    Attributes:
        weights: bytes of resident weights.
        usage: everything else by kind.
        peak: most bytes in use at any time.
        peak_kind: ``allocator``: by a GPU's tensors; ``tensors``: by the tensors of bound computation on a CPU, weights
            included; ``rss``: by the whole process on a CPU, libraries and the parsed network included.
    """

    rank: int
    weights: int
    usage: Usage
    peak: int
    peak_kind: PeakKind

    def entry(self) -> dict[str, Any]:
        """As it stands in a record."""
        rows = self.usage.rows
        return {
            "rank": self.rank,
            "resident": {
                "weights": self.weights,
                "A": self.usage.coefficients,
                "slopes": rows.slopes,
                "gradients": rows.gradients,
                "optimizer": rows.optimizer,
                "domains": self.usage.domains,
            },
            "chunks": rows.chunks,
            "peak": self.peak,
            "peak_kind": self.peak_kind,
        }


def process_peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
