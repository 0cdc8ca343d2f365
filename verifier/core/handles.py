"""Weights are referred to by handles; the tensors live in a weight store and are fetched just before use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """Name, shape and stored dtype of one weight tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Blocks(ABC):
    """A matrix (n, m) that is never whole: its column blocks (n, w) arrive one after the other.

    Using it in blocks changes how sums over columns are rounded, so every store cuts it at the same places.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def __iter__(self) -> Iterator[Tensor]: ...


class WeightStore(Protocol):
    """Where weights are stored. Ops get tensors from ``fetch`` and must not hold on to them."""

    @property
    def device(self) -> torch.device:
        """Where fetched tensors are: the compute device."""
        ...

    def put(self, handle: Handle, tensor: Tensor) -> None:
        """Store one weight tensor of any strides (while loading, one at a time)."""
        ...

    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> AbstractContextManager[tuple[Tensor, ...]]:
        """The full tensors of ``handles`` in ``dtype`` on the compute device, valid inside the context.

        A matrix that the store streams comes as :class:`Blocks`; only ops that declare it streamable meet one.
        """
        ...

    @property
    def transient(self) -> bool:
        """Whether what is fetched is a copy that should be dropped at once (and never kept for gradients)."""
        ...

    def prefetch(self, handles: Iterable[Handle]) -> None:
        """A hint that these handles are needed next."""
        ...

    def held(self) -> Iterable[Tensor]:
        """The tensors that this rank stores, on the compute device or the host."""
        ...

    def resident_bytes(self) -> int:
        """Bytes that this rank stores on its compute device."""
        ...
