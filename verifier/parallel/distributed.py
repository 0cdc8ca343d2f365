"""Many ranks: whole chunks of rows are dealt to them, and what they find is put together in order.

Only bounds travel. A chunk is the same kernel call on whichever rank it runs, so the bits do not depend on how many
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from verifier.core.backend import SHARD_ROWS, Chunk, Cost, Group, canonical_chunks
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.handles import WeightStore
from verifier.core.inventory import Usage
from verifier.parallel.single import WholeValues

T = TypeVar("T")
AGREEMENTS: dict[str, Callable[[list[float]], float]] = {"max": max, "min": min, "sum": sum}


class AgreedDeadline(Deadline):
    """Expires for all ranks at the same question: when it has expired for one of them.

    Args:
        agree: combines a value of every rank.
    """

    def __init__(self, own: Deadline, agree: Callable[[float, str], float]) -> None:
        super().__init__(own.limit, own.start)
        self._agree = agree

    def expired(self) -> bool:
        return self._agree(float(super().expired()), "max") > 0

    def sub(self, seconds: float) -> Deadline:
        return AgreedDeadline(super().sub(seconds), self._agree)


class DistributedBackend(WholeValues):
    """Replicated or sharded weights, and rows dealt to ranks.

    Args:
        everyone: ranks that work in lockstep.
        weights: a filled store; if it gathers, then from ranks of ``everyone``.
        sharded: deal rows; otherwise every rank computes all of them.
    """

    def __init__(
        self, everyone: Group, device: torch.device, weights: WeightStore, chunk_bytes: int, sharded: bool = True
    ) -> None:
        self.device, self.weights, self.chunk_bytes = device, weights, chunk_bytes
        self._everyone, self._sharded = everyone, sharded
        self.usage = Usage()

    @property
    def rank(self) -> int:
        return self._everyone.rank

    @property
    def size(self) -> int:
        return self._everyone.size

    def _dealt(self, n_rows: int) -> bool:
        return self._sharded and n_rows >= SHARD_ROWS and self._everyone.size > 1

    def row_chunks(self, n_rows: int, row: Cost, fewest: int = 1) -> Sequence[Chunk]:
        budget = Cost(self.chunk_bytes, facts(self.device).chunk_flops)
        chunks = canonical_chunks(n_rows, row, budget, fewest)
        if not self._dealt(n_rows):
            return chunks
        each = -(-len(chunks) // self._everyone.size)
        # Ranks keep in step: where their number does not divide that of the chunks, the last ones get empty chunks.
        padding = Chunk(n_rows, n_rows, chunks[0].size)
        dealt = [*chunks, *[padding] * (each * self._everyone.size - len(chunks))]
        first = self._everyone.rank * each
        return dealt[first : first + each]

    def gather_rows(self, n_rows: int, parts: Sequence[tuple[Chunk, Tensor]]) -> Tensor:
        if not self._dealt(n_rows):
            return torch.cat([value[:, : chunk.stop - chunk.start] for chunk, value in parts], dim=1)
        mine = torch.cat([value for _, value in parts], dim=1)
        # Chunks have equal sizes and padding comes last: all ranks' rows in order are the rows in order.
        return self._everyone.all_gather(mine).transpose(0, 1).flatten(1, 2)[:, :n_rows].contiguous()

    def broadcast_result(self, work: Callable[[], T]) -> T:
        return self._everyone.broadcast_object(work() if self._everyone.rank == 0 else None)

    def agree(self, value: float, op: str = "max") -> float:
        return AGREEMENTS[op]([v for (v,) in self._everyone.numbers([value])])

    def shared_deadline(self, deadline: Deadline) -> Deadline:
        return AgreedDeadline(deadline, self.agree) if self.size > 1 else deadline
