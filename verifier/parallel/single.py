"""One device: every chunk ours, nothing to agree on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from verifier.core.backend import Chunk, Cost, canonical_chunks
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.handles import WeightStore
from verifier.core.inventory import Usage
from verifier.graph.graph import Graph
from verifier.parallel.stores import Resident

T = TypeVar("T")


class WholeValues:
    """Where features are when every rank has all of them."""

    @property
    def summands(self) -> int:
        return 1

    def total(self, partial: Tensor) -> Tensor:
        return partial

    def elements(self, index: int, mask: Tensor) -> Tensor:
        return mask.flatten().nonzero()[:, 0]

    def local_index(self, index: int, elements: Tensor) -> tuple[Tensor, Tensor | None]:
        return elements, None

    def gather_features(self, index: int, value: Tensor) -> Tensor:
        return value

    def local_part(self, index: int, value: Tensor) -> Tensor:
        return value

    def coefficients(self, index: int, value: Tensor) -> Tensor:
        return value


class SingleBackend(WholeValues):
    """The backend of one device.

    Args:
        graph: its parameters are put into the store.
        chunk_bytes: see :func:`verifier.core.backend.canonical_chunks`.
        weights: a store that is filled already; default all parameters of the graph on the device.
    """

    rank = 0
    size = 1

    def __init__(
        self, graph: Graph, device: torch.device, chunk_bytes: int = 256 << 20, weights: WeightStore | None = None
    ) -> None:
        self.device = device
        self.usage = Usage()
        self.chunk_bytes = chunk_bytes
        if weights is None:
            weights = Resident(device)
            for handle, tensor in graph.parameters.items():
                weights.put(handle, tensor)
        self.weights = weights

    def row_chunks(self, n_rows: int, row: Cost, fewest: int = 1) -> Sequence[Chunk]:
        return canonical_chunks(n_rows, row, Cost(self.chunk_bytes, facts(self.device).chunk_flops), fewest)

    def gather_rows(self, n_rows: int, parts: Sequence[tuple[Chunk, Tensor]]) -> Tensor:
        return torch.cat([value[:, : chunk.stop - chunk.start] for chunk, value in parts], dim=1)

    def broadcast_result(self, work: Callable[[], T]) -> T:
        return work()

    def agree(self, value: float, op: str = "max") -> float:
        return value

    def shared_deadline(self, deadline: Deadline) -> Deadline:
        return deadline
