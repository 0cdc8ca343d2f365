"""Open domains as one struct of tensors on the device: pushing and popping cost what moves, not what is stored."""

from __future__ import annotations

from dataclasses import fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from verifier.bab.domains import Domains

D = TypeVar("D", bound=Domains)

_FEWEST = 64


class Pool(Generic[D]):
    """A bag of domains of one kind, in one growing set of tensors.

    Which domains are taken is the search's business: the worst ones (:meth:`by_gap`), the last ones (:meth:`last`), or
    any others (:meth:`take`).
    """

    def __init__(self) -> None:
        self._store: D | None = None
        self.count = 0

    def push(self, batch: D) -> None:
        """Add domains."""
        n = batch.count
        if n == 0:
            return
        need = self.count + n
        if self._store is None:
            self._store = batch.map(lambda t: t.new_empty((max(_FEWEST, n), *t.shape[1:])))
        elif need > self._store.count:
            self._store = self._grown(self._store, max(need, self._store.count * 3 // 2))
        for f in fields(batch):
            getattr(self._store, f.name)[self.count : need] = getattr(batch, f.name)
        self.count = need

    def _grown(self, store: D, room: int) -> D:
        def larger(t: Tensor) -> Tensor:
            out = t.new_empty((room, *t.shape[1:]))
            out[: self.count] = t[: self.count]
            return out

        return store.map(larger)

    @property
    def domains(self) -> D:
        """All of them as views, in the order of the store; there must have been some."""
        assert self._store is not None
        return self._store[: self.count]

    def cut(self, count: int) -> None:
        """Forget what was pushed after there were ``count`` domains."""
        self.count = min(self.count, count)

    def by_gap(self, n: int, worst_first: bool = True) -> D:
        """Take the ``n`` domains with the lowest (or highest) gap."""
        n = min(n, self.count)
        return self.take(torch.topk(self.gaps, n, largest=not worst_first).indices)

    def last(self, n: int) -> D:
        """Take the ``n`` domains that were pushed last."""
        first = max(0, self.count - n)
        out = self.domains[first:].map(torch.clone)
        self.count = first
        return out

    def take(self, index: Tensor) -> D:
        """Take the domains at distinct places of the store; others move into the holes."""
        out = self.domains[index]
        keep = self.count - index.shape[0]
        # Fill the holes below the new end with the survivors above it.
        taken = self._mask(index)
        holes = taken[:keep].nonzero()[:, 0]
        movers = (~taken[keep:]).nonzero()[:, 0] + keep
        for f in fields(self.domains):
            t = getattr(self._store, f.name)
            t[holes] = t[movers]
        self.count = keep
        return out

    def take_in_order(self, index: Tensor) -> D:
        """Take the domains at distinct places of the store, lowest first; the others keep their order."""
        taken, domains = self._mask(index), self.domains
        out, self._store = domains[taken], domains[~taken]
        self.count = self._store.count
        return out

    def _mask(self, index: Tensor) -> Tensor:
        taken = torch.zeros(self.count, dtype=torch.bool, device=index.device)
        taken[index] = True
        return taken

    @property
    def gaps(self) -> Tensor:
        """(count,) gaps in the order of the store."""
        return self.domains.gap  # type: ignore[attr-defined]

    def worst(self) -> float:
        """Lowest gap among the open domains; +inf when there are none."""
        return float(self.gaps.min()) if self.count else float("inf")

    def nbytes(self) -> int:
        """Memory that the pool holds."""
        return 0 if self._store is None else self._store.nbytes
