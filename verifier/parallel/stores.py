"""Where weights live: on the device, sharded over ranks, or in host memory.

Every store hands out the same bits. A transient tensor is freed as soon as the caller drops it; nothing that needs
gradients may keep it, which is why slopes have closed-form gradients and the graph's forward pass fetches again in its
backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from verifier.core.handles import Blocks, Handle
from verifier.graph.graph import Graph

if TYPE_CHECKING:
    from verifier.parallel.processes import ProcessGroup

Columns = Mapping[Handle, int]

# How long a layer that is not needed any more may keep the next one waiting.
_SETTLE_SECONDS = 0.02


def column_blocks(graph: Graph, stream: int | None) -> dict[Handle, int]:
    """Columns of a block of every matrix that is streamed: a function of the layer and the setting alone.

    Args:
        stream: bytes of a block (``parallel.stream``), or None for whole layers.
    """
    found: dict[Handle, int] = {}
    for handle in graph.streamable if stream is not None else ():
        rows, columns = handle.shape
        if stream is not None and rows * columns * handle.dtype.itemsize > stream:
            found[handle] = max(1, stream // (rows * handle.dtype.itemsize))
    return found


class Resident:
    """Keeps every parameter on the compute device; converted copies are cached while small.

    Args:
        cache_bytes: what converted copies may take.
        columns: matrices to be used in blocks of so many columns, the ones that other stores gather.
    """

    transient = False

    def __init__(self, device: torch.device, cache_bytes: int = 256 << 20, columns: Columns | None = None) -> None:
        self.device = device
        self._columns = columns or {}
        self._tensors: dict[Handle, Tensor] = {}
        self._cast: dict[tuple[Handle, torch.dtype], Tensor] = {}
        self._cache_left = cache_bytes

    def put(self, handle: Handle, tensor: Tensor) -> None:
        self._tensors[handle] = tensor.detach().to(self.device)

    @contextmanager
    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(cast(Tensor, self._get(h, dtype)) for h in handles)

    def _get(self, handle: Handle, dtype: torch.dtype) -> Tensor | Blocks:
        width = self._columns.get(handle)
        tensor = self._tensors[handle]
        if width is not None:
            return _Columns(tensor, width, dtype)
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        key = (handle, dtype)
        if key in self._cast:
            return self._cast[key]
        converted = tensor.to(dtype)
        size = converted.numel() * converted.element_size()
        if size <= self._cache_left:
            self._cache_left -= size
            self._cast[key] = converted
        return converted

    def prefetch(self, handles: Iterable[Handle]) -> None:
        """Nothing to do: everything is resident."""

    def held(self) -> Iterable[Tensor]:
        return (*self._tensors.values(), *self._cast.values())

    def resident_bytes(self) -> int:
        return sum(t.nbytes for t in self.held())


@dataclass(frozen=True)
class _Columns(Blocks):
    """Column blocks of a matrix at hand, each contiguous, as a gathered block is."""

    tensor: Tensor
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return (self.tensor.shape[0], self.tensor.shape[1])

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.tensor.shape[1], self.width):
            yield self.tensor[:, start : start + self.width].contiguous().to(self.dtype)


class HostOffload:
    """Keeps every parameter in host memory (pinned for a GPU) and copies it to the device before use.

    Args:
        prefetch: whether :meth:`prefetch` starts copies; a second layer then lies on the device.
    """

    transient = True

    def __init__(self, device: torch.device, prefetch: bool = True, columns: Columns | None = None) -> None:
        self.device = device
        self._columns, self._early = columns or {}, prefetch
        self._tensors: dict[Handle, Tensor] = {}
        self._started: dict[Handle, Tensor] = {}
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, handle: Handle, tensor: Tensor) -> None:
        host = tensor.detach().to("cpu").contiguous()
        self._tensors[handle] = host.pin_memory() if self._side is not None else host

    @contextmanager
    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(cast(Tensor, self._get(h, dtype)) for h in handles)

    def _get(self, handle: Handle, dtype: torch.dtype) -> Tensor | Blocks:
        width = self._columns.get(handle)
        if width is not None:
            return _HostColumns(self._tensors[handle], width, dtype, self.device)
        tensor = self._started.pop(handle, None)
        if tensor is None:
            tensor = self._copy(handle)
        elif self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _copy(self, handle: Handle) -> Tensor:
        # On a CPU host and device memory are one; the copy keeps the accounting the same.
        return self._tensors[handle].to(self.device, copy=True, non_blocking=self._side is not None)

    def prefetch(self, handles: Iterable[Handle]) -> None:
        if not self._early or self._side is None:
            return
        wanted = [h for h in handles if h not in self._columns]
        self._started = {h: t for h, t in self._started.items() if h in wanted}
        with torch.cuda.stream(self._side):
            for handle in wanted:
                if handle not in self._started:
                    self._started[handle] = self._copy(handle)

    def held(self) -> Iterable[Tensor]:
        return self._tensors.values()

    def resident_bytes(self) -> int:
        """None: what is at rest is on the host."""
        return 0


@dataclass(frozen=True)
class _HostColumns(_Columns):
    """Column blocks copied from the host one by one."""

    device: torch.device

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.tensor.shape[1], self.width):
            yield self.tensor[:, start : start + self.width].contiguous().to(self.device).to(self.dtype)


@dataclass(frozen=True)
class _Shard:
    """One rank's part of a parameter: ``rows`` of the leading dim (streamed), or a slice of the flat tensor."""

    part: Tensor
    columns: int | None


class Sharded:
    """1/P of every parameter at rest; gathered before use, bit-identical to what was stored, and freed after it.

    Every fetch is collective: all ranks of the group fetch the same parameters in the same order.

    Args:
        group: the ranks that hold a copy of the network between them.
        prefetch: whether :meth:`prefetch` starts gathering; a second layer is then on the device.
    """

    transient = True

    def __init__(
        self,
        group: ProcessGroup,
        device: torch.device,
        prefetch: bool = True,
        columns: Columns | None = None,
    ) -> None:
        self.device = device
        self._group, self._early, self._columns = group, prefetch, columns or {}
        self._shards: dict[Handle, _Shard] = {}
        self._started: dict[Handle, tuple[Tensor, Any]] = {}
        self._used: list[StorageWeakRef] = []

    def put(self, handle: Handle, tensor: Tensor) -> None:
        size, rank = self._group.size, self._group.rank
        width = self._columns.get(handle)
        tensor = tensor.detach()
        if width is not None:
            rows = -(-tensor.shape[0] // size)
            part = tensor.new_zeros((rows, tensor.shape[1]))
            mine = tensor[rank * rows : (rank + 1) * rows]
            part[: mine.shape[0]] = mine
        else:
            flat = tensor.reshape(-1)
            each = -(-flat.numel() // size)
            part = flat.new_zeros(each)
            mine = flat[rank * each : (rank + 1) * each]
            part[: mine.numel()] = mine
        self._shards[handle] = _Shard(part.to(self.device), width)

    @contextmanager
    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        if handles:
            self._settle()
        yield tuple(cast(Tensor, self._get(h, dtype)) for h in handles)

    def _settle(self) -> None:
        """Let go of the last layer before the next one arrives: a thread of the backend may hold it a little longer."""
        until = time.monotonic() + _SETTLE_SECONDS
        while not self._early and any(not ref.expired() for ref in self._used) and time.monotonic() < until:
            time.sleep(0.0002)
        self._used = []

    def _get(self, handle: Handle, dtype: torch.dtype) -> Tensor | Blocks:
        shard = self._shards[handle]
        if shard.columns is not None:
            return _GatheredColumns(self._group, shard.part, handle.shape, shard.columns, dtype, self._early)
        started = self._started.pop(handle, None)
        out, work = started if started is not None else self._start(handle)
        work.wait()
        self._used.append(StorageWeakRef(out.untyped_storage()))
        tensor = out[: math.prod(handle.shape)].reshape(handle.shape)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _start(self, handle: Handle) -> tuple[Tensor, Any]:
        part = self._shards[handle].part
        out = part.new_empty(part.numel() * self._group.size)
        return out, (self._group.start_gather(out, part) if part.numel() else _Done())

    def prefetch(self, handles: Iterable[Handle]) -> None:
        if not self._early:
            return
        wanted = [h for h in handles if self._shards[h].columns is None]
        for handle in [h for h in self._started if h not in wanted]:
            self._started.pop(handle)[1].wait()
        for handle in wanted:
            if handle not in self._started:
                self._started[handle] = self._start(handle)

    def held(self) -> Iterable[Tensor]:
        return [s.part for s in self._shards.values()]

    def resident_bytes(self) -> int:
        return sum(t.nbytes for t in self.held())


class _Done:
    def wait(self) -> None:
        """Nothing was sent."""


@dataclass(frozen=True)
class _GatheredColumns(Blocks):
    """Column blocks gathered one by one; the next one is on its way while one is used."""

    group: ProcessGroup
    part: Tensor
    shape: tuple[int, ...]
    width: int
    dtype: torch.dtype
    early: bool

    def __iter__(self) -> Iterator[Tensor]:
        starts = range(0, self.shape[1], self.width)
        pending = self._start(0)
        for start in starts:
            if pending is None:
                pending = self._start(start)
            out, work, columns = pending
            work.wait()
            after = start + self.width
            pending = self._start(after) if self.early and after < self.shape[1] else None
            block = out.view(-1, columns)[: self.shape[0]]
            del out
            yield block.to(self.dtype)
            del block

    def _start(self, start: int) -> tuple[Tensor, Any, int]:
        mine = self.part[:, start : start + self.width].contiguous()
        out = mine.new_empty(mine.numel() * self.group.size)
        return out, self.group.start_gather(out, mine.view(-1)), mine.shape[1]
