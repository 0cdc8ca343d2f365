"""What the engine sees of the machine: the protocol behind ``parallel.backend``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from verifier.core.handles import WeightStore


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a start node, processed as ``size`` rows (the rest is zero padding)."""

    start: int
    stop: int
    size: int


CHUNK_MULTIPLE = 24  # divisible by 1, 2, 3, 4, 6, 8 ranks
SHARD_ROWS = 20 * CHUNK_MULTIPLE  # from here on every rank gets whole chunks of at least 20 rows


def canonical_chunks(n_rows: int, row_bytes: int, chunk_bytes: int) -> tuple[Chunk, ...]:
    """Cut rows into equal chunks by a rule that knows neither free memory nor the number of ranks.

    The geometry depends on the rows, on the bytes that one row keeps alive and on the configured budget alone, so that
    every backend makes literally the same kernel calls.

    Args:
        n_rows: rows of the start node.
        row_bytes: bytes of coefficients that one row keeps alive.
        chunk_bytes: configured ``memory.chunk_bytes``.
    """
    if n_rows <= 0:
        return ()
    most = max(4, chunk_bytes // max(row_bytes, 1) // 4 * 4)
    count = -(-n_rows // most)
    if n_rows >= SHARD_ROWS:
        count = -(-count // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    size = -(-n_rows // count)
    size = -(-size // 4) * 4
    return tuple(Chunk(i, min(i + size, n_rows), size) for i in range(0, n_rows, size))


class ParallelBackend(Protocol):
    """Placement of weights and work. Ops, bounds and the search never see a rank."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weights(self) -> WeightStore: ...

    def row_chunks(self, n_rows: int, row_bytes: int) -> Sequence[Chunk]:
        """This rank's canonical chunks of a start node's rows; every rank gets equally many."""
        ...

    def gather_rows(self, n_rows: int, parts: Sequence[tuple[Chunk, Tensor]]) -> Tensor:
        """Assemble (B, n_rows) from this and the other ranks' (B, chunk) parts, in chunk order."""
        ...

    def agree(self, value: float, op: str = "max") -> float:
        """One value on all ranks (``max``, ``min`` or ``sum``); the identity for one rank."""
        ...

    def close(self) -> None:
        """Release what the backend holds."""
        ...
