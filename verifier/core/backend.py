"""What the engine sees of the machine: the protocols behind ``parallel.backend``.

Ops, bounds and the search are unaware of ranks. What they may ask is here: which rows are local, where weights are,
what all ranks agree on. On a single device every answer is trivial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from verifier.core.deadline import Deadline
from verifier.core.handles import WeightStore
from verifier.core.inventory import Usage

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a start node, processed as ``size`` rows (the rest is zero padding)."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Cost:
    """What a row costs, or what a chunk of rows may cost.

    Attributes:
        nbytes: of coefficients that are alive at once.
        flops: counted multiplications and additions of a walk, elementwise work included.
    """

    nbytes: int
    flops: float = 0.0

    def times(self, factor: int) -> Cost:
        return Cost(factor * self.nbytes, factor * self.flops)


CHUNK_MULTIPLE = 24  # divisible by 1, 2, 3, 4, 6, 8 ranks
SHARD_ROWS = 20 * CHUNK_MULTIPLE  # from here on every rank gets whole chunks of at least 20 rows
_ROUNDED_SIZE = 80  # from here on rounding a chunk up to a multiple of four rows costs less than a twentieth
_FEWER_CHUNKS = (1, 2, 4, 8)


def canonical_chunks(n_rows: int, row: Cost, budget: Cost, fewest: int = 1) -> tuple[Chunk, ...]:
    """Cut rows into equal chunks by a rule that depends neither on free memory nor on the number of ranks.

    The geometry depends on the rows, on what one of them costs and on the budget alone, so that every backend makes
    literally the same kernel calls. There are as few chunks as the budget allows, since a walk takes the time of its
    calls however few its rows are. From ``SHARD_ROWS`` rows on their number is 1, 2, 4, 8 or a multiple of
    ``CHUNK_MULTIPLE``, if need be with last ones that hold padding alone; ranks that get none repeat padding meanwhile.

    Args:
        n_rows: rows of the start node.
        row: of one row.
        budget: of a chunk; one of four rows may exceed it.
        fewest: chunks that ``SHARD_ROWS`` rows are cut into at least, for what is kept per row; at most 8.
    """
    if n_rows <= 0:
        return ()
    most = max(4, budget.nbytes // max(row.nbytes, 1) // 4 * 4)
    if row.flops * most > budget.flops:
        most = max(4, int(budget.flops / row.flops) // 4 * 4)
    count = -(-n_rows // most)
    if n_rows < SHARD_ROWS:
        size = -(-n_rows // count)
        size = -(-size // 4) * 4
        return tuple(Chunk(i, min(i + size, n_rows), size) for i in range(0, n_rows, size))
    wanted = max(count, fewest)
    fewer = (n for n in _FEWER_CHUNKS if n >= wanted)
    count = next(fewer, -(-count // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)
    size = -(-n_rows // count)
    if size >= _ROUNDED_SIZE:
        size = -(-size // 4) * 4
    return tuple(Chunk(min(i * size, n_rows), min((i + 1) * size, n_rows), size) for i in range(count))


class Group(Protocol):
    """Ranks that communicate with each other. Calls are collective unless stated otherwise: all ranks of the group make
    the same calls in the same order. One rank alone is a group too.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(P, *shape): the tensors of all ranks, bits unchanged; shapes and dtypes are equal."""
        ...

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """(P, *shape) to (P, *shape): entry j goes to rank j, entry i of the answer came from rank i."""
        ...

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        """A few numbers of every rank, by rank; cheap, on the CPU. Every rank gives equally many."""
        ...

    def objects(self, value: Any) -> list[Any]:
        """One picklable object (tensors on the CPU) of every rank, by rank."""
        ...

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The object that rank ``source`` gives, on all ranks."""
        ...

    def call(self) -> None:
        """Not collective: ask all ranks to synchronise soon (see :meth:`called`)."""
        ...

    def called(self) -> bool:
        """Not collective, cheap: whether some rank has called since the last :meth:`answered`."""
        ...

    def answered(self) -> None:
        """Collective: calls so far are dealt with."""
        ...

    def check(self) -> None:
        """Not collective: raise ``RankFailed`` when a rank of the job is known to be lost."""
        ...


class ParallelBackend(Protocol):
    """Placement of weights and work. Ops, bounds and the search are unaware of ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weights(self) -> WeightStore: ...

    @property
    def usage(self) -> Usage:
        """Memory used by this rank's work so far; whatever allocates memory per row or domain is recorded here."""
        ...

    def row_chunks(self, n_rows: int, row: Cost, fewest: int = 1) -> Sequence[Chunk]:
        """This rank's canonical chunks of a start node's rows; every rank gets equally many."""
        ...

    def gather_rows(self, n_rows: int, parts: Sequence[tuple[Chunk, Tensor]]) -> Tensor:
        """Assemble (B, n_rows, ...) from this and the other ranks' (B, chunk, ...) parts, in chunk order."""
        ...

    def shared_deadline(self, deadline: Deadline) -> Deadline:
        """A deadline that expires for all ranks at the same question; they must ask equally often."""
        ...

    # Where the features of a value are. Without tensor parallelism every rank has all of them.

    @property
    def summands(self) -> int:
        """How many partial sums over features :meth:`total` adds; their roundings are accounted for."""
        ...

    def total(self, partial: Tensor) -> Tensor:
        """A sum over features from this rank's share of it: equal bits on every rank."""
        ...

    def elements(self, index: int, mask: Tensor) -> Tensor:
        """(n,) positions in the whole flat value of a node where a mask of this rank's part, (*shape), is set."""
        ...

    def local_index(self, index: int, elements: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions of whole elements in this rank's flat part, and which of them are in it (None: all of them)."""
        ...

    def gather_features(self, index: int, value: Tensor) -> Tensor:
        """(..., *shape of the part) to (..., *whole shape)."""
        ...

    def local_part(self, index: int, value: Tensor) -> Tensor:
        """(..., *whole shape) to (..., *shape of the part)."""
        ...

    def coefficients(self, index: int, value: Tensor) -> Tensor:
        """Like :meth:`local_part`, for coefficients of linear functions: what pads a part must not count."""
        ...

    def broadcast_result(self, work: Callable[[], T]) -> T:
        """What one rank gets from work that is done on the CPU, on all ranks; picklable."""
        ...

    def agree(self, value: float, op: str = "max") -> float:
        """One value on all ranks (``max``, ``min`` or ``sum``); the identity for one rank."""
        ...
