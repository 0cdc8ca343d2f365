"""Parameters are named by handles; the tensors live in a weight store and are fetched just before use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """Name, shape and stored dtype of one parameter tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class WeightStore(Protocol):
    """Where parameters live. Ops get tensors from ``fetch`` and must not keep them."""

    def put(self, handle: Handle, tensor: Tensor) -> None:
        """Store one parameter (while loading, one at a time)."""
        ...

    def fetch(self, handles: Sequence[Handle], dtype: torch.dtype) -> AbstractContextManager[tuple[Tensor, ...]]:
        """The full tensors of ``handles`` in ``dtype`` on the compute device, valid inside the context."""
        ...

    def prefetch(self, handles: Iterable[Handle]) -> None:
        """A hint that these handles are needed next."""
        ...

    def resident_bytes(self) -> int:
        """Bytes that this rank holds at rest."""
        ...
