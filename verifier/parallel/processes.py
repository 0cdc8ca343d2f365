"""Groups of several processes over torch.distributed."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

# The same collective under the name that newer versions prefer.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# How often a rank asks the store whether someone has called.
_POLL_SECONDS = 0.005


class ProcessGroup:
    """Several processes.

    Args:
        members: their ranks in the whole job, in order; this process is one of them.
        data: for tensors (nccl or gloo); control: for numbers and objects (gloo).
        store: for calls; a prefix of its own.
        watch: raises when a rank of the job is lost.
    """

    def __init__(
        self,
        members: Sequence[int],
        data: dist.ProcessGroup,
        control: dist.ProcessGroup,
        store: Store,
        watch: Callable[[], None],
    ) -> None:
        self._members = tuple(members)
        self._data, self._control, self._store, self.check = data, control, store, watch
        self.size = len(self._members)
        self.rank = self._members.index(dist.get_rank())
        self._generation = 0
        self._polled = 0.0

    def all_gather(self, tensor: Tensor) -> Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        if tensor.numel():
            _gather(out.view(-1), tensor.contiguous().view(-1), group=self._data)
        return out

    def start_gather(self, out: Tensor, part: Tensor) -> dist.Work:
        """All parts (flat, equal sizes) into ``out``, without waiting."""
        work = _gather(out, part, group=self._data, async_op=True)
        assert work is not None
        return work

    def all_to_all(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        out = torch.empty_like(tensor)
        if tensor.numel():
            dist.all_to_all_single(out.view(-1), tensor.view(-1), group=self._data)
        return out

    def numbers(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64)
        out = torch.empty(self.size * len(values), dtype=torch.float64)
        _gather(out, mine, group=self._control)
        return out.view(self.size, -1).tolist()

    def objects(self, value: Any) -> list[Any]:
        data = _bytes(value)
        lengths = [int(n) for (n,) in self.numbers([len(data)])]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(data)] = data
        out = torch.empty(self.size * len(padded), dtype=torch.uint8)
        _gather(out, padded, group=self._control)
        return [_object(part[:n]) for part, n in zip(out.view(self.size, -1), lengths, strict=True)]

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        data = _bytes(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, self._members[source], group=self._control)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, self._members[source], group=self._control)
        return value if self.rank == source else _object(data)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """A CPU tensor of rank ``source`` on all ranks; the others give one of equal shape and dtype to write to."""
        # Dims of size 1 may have any stride even in a contiguous tensor, which its bytes must not.
        whole = tensor.contiguous()
        flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
        if flat.numel():
            dist.broadcast(flat, self._members[source], group=self._control)
        return tensor if whole is tensor or self.rank == source else tensor.copy_(whole)

    def call(self) -> None:
        self._store.add(f"call/{self._generation}", 1)

    def called(self) -> bool:
        now = time.monotonic()
        if now - self._polled < _POLL_SECONDS:
            return False
        self._polled = now
        return self._store.add(f"call/{self._generation}", 0) > 0

    def answered(self) -> None:
        self._generation += 1
        self._polled = 0.0


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _object(data: Tensor) -> Any:
    # The bytes come from a rank of the same job, which runs the same program for the same user.
    return pickle.load(io.BytesIO(data.numpy().tobytes()))  # noqa: S301
