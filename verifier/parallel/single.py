"""One device: every weight resident, every chunk ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from verifier.core.backend import Chunk, canonical_chunks
from verifier.core.deadline import Deadline
from verifier.core.handles import Handle
from verifier.core.inventory import Usage
from verifier.graph.graph import Graph


class Resident:
    """A weight store that keeps every parameter on the compute device; converted copies are cached while small."""

    def __init__(self, device: torch.device, cache_bytes: int = 256 << 20) -> None:
        self.device = device
        self._tensors: dict[Handle, Tensor] = {}
        self._cast: dict[tuple[Handle, torch.dtype], Tensor] = {}
        self._cache_left = cache_bytes

    def put(self, handle: Handle, tensor: Tensor) -> None:
        self._tensors[handle] = tensor.detach().to(self.device)

    @contextmanager
    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(self._get(h, dtype) for h in handles)

    def _get(self, handle: Handle, dtype: torch.dtype) -> Tensor:
        tensor = self._tensors[handle]
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        key = (handle, dtype)
        if key in self._cast:
            return self._cast[key]
        cast = tensor.to(dtype)
        size = cast.numel() * cast.element_size()
        if size <= self._cache_left:
            self._cache_left -= size
            self._cast[key] = cast
        return cast

    def prefetch(self, handles: Iterable[Handle]) -> None:
        """Nothing to do: everything is resident."""

    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._tensors.values(), *self._cast.values()))


class SingleBackend:
    """The backend of one device."""

    rank = 0
    size = 1

    def __init__(self, graph: Graph, device: torch.device, chunk_bytes: int = 256 << 20) -> None:
        self.device = device
        self.weights = Resident(device)
        self.usage = Usage()
        self.chunk_bytes = chunk_bytes
        for handle, tensor in graph.parameters.items():
            self.weights.put(handle, tensor)

    def row_chunks(self, n_rows: int, row_bytes: int) -> Sequence[Chunk]:
        return canonical_chunks(n_rows, row_bytes, self.chunk_bytes)

    def gather_rows(self, n_rows: int, parts: Sequence[tuple[Chunk, Tensor]]) -> Tensor:
        return torch.cat([value[:, : chunk.stop - chunk.start] for chunk, value in parts], dim=1)

    def agree(self, value: float, op: str = "max") -> float:
        return value

    def together(self, deadline: Deadline) -> Deadline:
        return deadline

    summands = 1

    def total(self, partial: Tensor) -> Tensor:
        return partial

    def elements(self, index: int, mask: Tensor) -> Tensor:
        return mask.flatten().nonzero()[:, 0]

    def here(self, index: int, elements: Tensor) -> tuple[Tensor, Tensor | None]:
        return elements, None

    def whole(self, index: int, value: Tensor) -> Tensor:
        return value

    def part(self, index: int, value: Tensor) -> Tensor:
        return value

    def close(self) -> None:
        """Nothing to release."""
