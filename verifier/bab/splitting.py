"""What branch and bound asks of a kind of split: of neurons' phases, or of input boxes."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from verifier.bab.domains import Domains
from verifier.bab.pool import Pool
from verifier.bab.statistics import SearchStatistics, Stop
from verifier.core.backend import ParallelBackend
from verifier.core.errors import VerifierError
from verifier.core.result import Witness

D = TypeVar("D", bound=Domains)  # domains in the pool
C = TypeVar("C", bound=Domains)  # domains that are bounded
B = TypeVar("B")  # what bounding them gives


class Splitting(Protocol, Generic[D, C, B]):
    """Domains of one kind: how they are picked, split, bounded and closed.

    Attributes:
        kind: the class of domains in the pool.
        backend: the ranks that do every step together.
        pool: the open domains of this group of ranks.
        statistics: every domain is accounted for here by the step that makes, closes or keeps it.
        witness: a counterexample, which ends the search.
    """

    kind: type[D]
    backend: ParallelBackend
    pool: Pool[D]
    statistics: SearchStatistics
    witness: Witness | None

    @property
    def roots(self) -> int:
        """Domains that the problem begins with, the same number in every group."""
        ...

    def start(self) -> None:
        """Put the roots into the pool."""
        ...

    def pick(self) -> D:
        """Take the domains of the next round out of the pool; none when no domain is worth a round."""
        ...

    def branch(self, domains: D) -> C:
        """What is to be bounded in the place of some domains: children that cover them."""
        ...

    def parts(self, domains: C) -> list[C]:
        """Batches that are bounded one at a time, the last one first."""
        ...

    def bound(self, domains: C) -> B:
        """Bounds of a batch, and what else the next steps need."""
        ...

    def certify(self, domains: C, found: B) -> B:
        """Close the domains that are refuted with every rounding error accounted for; what is left of the batch."""
        ...

    def offer(self, left: B) -> Witness | None:
        """Try points of open domains as counterexamples."""
        ...

    def push(self, left: B) -> None:
        """Put open domains back into the pool; those that cannot be split further are decided or kept as stuck."""
        ...

    def shrink(self, count: int) -> None:
        """Work on smaller batches: one of ``count`` domains did not fit into memory."""
        ...

    def undo(self, before: SearchStatistics) -> None:
        """Take back what a failed batch has counted."""
        ...

    def postpone(self, domains: C, error: VerifierError) -> None:
        """Put back what cannot be bounded now, or raise the error: time is over, or one domain fills the memory."""
        ...

    def full(self) -> Stop:
        """Whether memory forbids another round, or there is no more work to do."""
        ...

    def count(self) -> SearchStatistics:
        """The statistics, with what is open."""
        ...

    def show(self, others: SearchStatistics) -> None:
        """Report the progress of this group and the others."""
        ...

    def give(self, count: int) -> D:
        """Take domains out of the pool for another group, a fair sample of good and bad ones."""
        ...

    def take(self, domains: D) -> None:
        """Put another group's domains into the pool."""
        ...
