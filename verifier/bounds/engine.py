"""What every computation of bounds takes along: the network, who computes, until when, and in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from verifier.core.backend import ParallelBackend
from verifier.core.cuda_graphs import CudaGraphs, Recorder
from verifier.core.deadline import Deadline
from verifier.core.runtime import RunModel
from verifier.graph.graph import Graph


@dataclass(frozen=True)
class Arithmetic:
    """What the numbers of a pass are.

    Attributes:
        dtype: of coefficients and bounds.
        rounding: every rounding error is accounted for, so that the results hold in exact arithmetic.
        run: bounds hold for such float32 runs of the network too; None: for the real network alone.
    """

    dtype: torch.dtype
    rounding: bool
    run: RunModel | None = None


PLAIN = Arithmetic(torch.float32, rounding=False)
ROUNDED_32 = Arithmetic(torch.float32, rounding=True)
ROUNDED_64 = Arithmetic(torch.float64, rounding=True)


@dataclass(frozen=True)
class Engine:
    """One network, bounded by one group of ranks.

    Attributes:
        graph: this rank's network.
        backend: holds the weights and knows what the other ranks have.
        deadline: asked between chunks of rows and, where no other rank works along, before every node of a pass.
        arithmetic: of the passes, unless a function says that it has its own. Default: that of proofs.
        recorder: what records steps that come again, on a device where that pays.
    """

    graph: Graph
    backend: ParallelBackend
    deadline: Deadline = field(default_factory=Deadline)
    arithmetic: Arithmetic = ROUNDED_64
    recorder: Recorder | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.arithmetic.dtype

    @property
    def rounding(self) -> bool:
        return self.arithmetic.rounding

    def using(self, arithmetic: Arithmetic) -> Engine:
        """The same in another arithmetic."""
        return replace(self, arithmetic=arithmetic)

    def certifying(self) -> Engine:
        """The same in float64 with rounding errors accounted for, which proofs rest on."""
        return replace(self, arithmetic=replace(ROUNDED_64, run=self.arithmetic.run))

    def unhurried(self) -> Engine:
        """The same without a deadline: for a pass whose result is worth more than the time that it takes."""
        return replace(self, deadline=Deadline())


def recorder(backend: ParallelBackend, wanted: bool = True) -> Recorder | None:
    """What records work on a backend's device: nothing on a CPU, where weights come and go, or with other ranks.

    Args:
        wanted: ``bab.cuda_graphs``.
    """
    alone = backend.size == 1 and not backend.weights.transient
    return CudaGraphs(backend.device) if wanted and alone and backend.device.type == "cuda" else None
