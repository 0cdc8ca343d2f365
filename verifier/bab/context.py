"""What every search of one query works with: one argument instead of ten that travel together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from verifier.bounds.engine import Engine
from verifier.config import BabConfig
from verifier.core.backend import Group, ParallelBackend
from verifier.core.claims import Claims
from verifier.core.deadline import Deadline
from verifier.core.progress import Progress, SilentProgress
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.parallel.group import Solo
from verifier.proof.writer import Proof

# Replays a candidate (n_in,) and returns a witness when it is one. With several ranks it is called on the first rank of
# the first group alone.
Accept = Callable[[np.ndarray], Witness | None]

# Looks for a counterexample near points (k, n_in), with a share of the work of a whole attack.
Hunt = Callable[[np.ndarray, float], Witness | None]


def accept_nothing(x: np.ndarray) -> None:
    """Rows that have no counterexamples, such as those of hidden neurons."""


@dataclass(frozen=True)
class SearchContext:
    """The network, how it is computed, the limits of a search, and who listens.

    Attributes:
        graph: the network, or what there is of it up to a hidden layer.
        accept: the judge of candidates.
        claims: what a bound must hold for to close a domain; root bounds hold for it. Default: the real network.
        certify: proofs account for every rounding error; otherwise they are plain float32.
        team: this rank's peers in the other groups, which take part in a search with the same arguments.
        memory_limit: bytes that the open domains of this rank may take.
        hunt: between two searches, from where the bounds of open domains are smallest; None: nobody does, as where
            other ranks would wait meanwhile.
        proof: where it is written down how boxes are refuted.
    """

    graph: Graph
    backend: ParallelBackend
    config: BabConfig
    deadline: Deadline
    accept: Accept = accept_nothing
    progress: Progress = field(default_factory=SilentProgress)
    claims: Claims = field(default_factory=Claims)
    certify: bool = True
    team: Group = field(default_factory=Solo)
    memory_limit: int = 1 << 62
    hunt: Hunt | None = None
    proof: Proof | None = None

    @property
    def engine(self) -> Engine:
        """For bounds of the network until the deadline, in the arithmetic of proofs unless another is asked for."""
        return Engine(self.graph, self.backend, self.deadline)
