"""A group of ranks that are threads of this process: fast enough for tests of every collective call.

torch's thread-local modes (``no_grad``) and generators belong to each rank; global state such as ``set_num_threads`` is
shared, so ranks must not change it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_PATIENCE = 120.0  # seconds that a rank waits for the others before the test fails


class _Room:
    """Where ranks meet: each leaves a value, all see all values."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=_PATIENCE)
        self.left: list[Any] = [None] * size
        self.called = False
        self.meetings = 0
        self.bytes = 0

    def synchronise(self, rank: int, kind: str, value: Any) -> list[Any]:
        """Values of all ranks, by rank; a rank that calls something else is an error, not a hang."""
        self.left[rank] = (kind, value)
        self.barrier.wait()
        seen = list(self.left)
        self.barrier.wait()
        kinds = {k for k, _ in seen}
        if len(kinds) > 1:
            raise AssertionError(f"ranks make different calls: {[k for k, _ in seen]}")
        if rank == 0:
            self.meetings += 1
        return [v for _, v in seen]


class ThreadGroup:
    """One rank's view of a room."""

    def __init__(self, room: _Room, rank: int, size: int) -> None:
        self.room, self.rank, self.size = room, rank, size

    def all_gather(self, tensor: Tensor) -> Tensor:
        all_of_them = self._equal("all_gather", tensor)
        return torch.stack(all_of_them)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        assert tensor.shape[0] == self.size and tensor.is_contiguous()
        all_of_them = self._equal("all_to_all", tensor)
        return torch.stack([t[self.rank] for t in all_of_them])

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        return [list(v) for v in self.room.synchronise(self.rank, f"numbers {len(values)}", list(values))]

    def objects(self, value: Any) -> list[Any]:
        return [copy.deepcopy(v) for v in self.room.synchronise(self.rank, "objects", value)]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return copy.deepcopy(self.room.synchronise(self.rank, f"share {source}", value)[source])

    def call(self) -> None:
        self.room.called = True

    def called(self) -> bool:
        return self.room.called

    def answered(self) -> None:
        self.room.synchronise(self.rank, "answered", None)
        self.room.called = False

    def check(self) -> None:
        if self.room.barrier.broken:
            raise RuntimeError("another rank failed")

    def _equal(self, kind: str, tensor: Tensor) -> list[Tensor]:
        # A copy: the owner may write to its tensor while slower ranks still read.
        self.room.bytes += tensor.nbytes
        return self.room.synchronise(self.rank, f"{kind} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().clone())


def on_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What ``work`` returns on every rank; the first rank's own error when one fails."""
    room = _Room(size)
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(room, rank, size))
        except BaseException as error:
            errors[rank] = error
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [e for e in errors if e is not None]
    own = [e for e in failed if not isinstance(e, threading.BrokenBarrierError)]
    if own or failed:
        raise (own or failed)[0]
    return results
