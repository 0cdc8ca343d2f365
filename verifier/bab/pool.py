"""Open domains as one struct of tensors on the device: pushing and popping cost what moves, not what is stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Fields = dict[str, Tensor]


class Pool:
    """A bag of domains. Every field leads with the domain axis; the key ``gap`` (float) orders them.

    ``gap`` is the best lower bound minus its threshold: positive means proved, and the most negative is the worst.
    """

    def __init__(self) -> None:
        self._fields: Fields = {}
        self.count = 0

    def push(self, batch: Mapping[str, Tensor]) -> None:
        """Add domains; all batches must have the same fields."""
        n = int(next(iter(batch.values())).shape[0])
        if n == 0:
            return
        if not self._fields:
            self._fields = {k: v.new_empty((max(64, 2 * n), *v.shape[1:])) for k, v in batch.items()}
        need = self.count + n
        for k, v in batch.items():
            room = self._fields[k]
            if need > room.shape[0]:
                larger = room.new_empty((max(need, room.shape[0] * 3 // 2), *room.shape[1:]))
                larger[: self.count] = room[: self.count]
                self._fields[k] = room = larger
            room[self.count : need] = v
        self.count = need

    def pop(self, n: int, worst_first: bool = True) -> Fields:
        """Take the ``n`` domains with the lowest (or highest) gap."""
        n = min(n, self.count)
        return self._remove(torch.topk(self._fields["gap"][: self.count], n, largest=not worst_first).indices)

    def sample(self, positions: Tensor) -> Fields:
        """Take the domains at some positions of the order by gap, worst first.

        Args:
            positions: distinct, int64, below :attr:`count`.
        """
        order = torch.argsort(self._fields["gap"][: self.count], stable=True)
        return self._remove(order[positions.to(order.device)])

    def _remove(self, index: Tensor) -> Fields:
        """Take the domains at distinct places of the store."""
        out = {k: v[index] for k, v in self._fields.items()}
        keep = self.count - index.shape[0]
        # Fill the holes below the new end with the survivors above it.
        taken = torch.zeros(self.count, dtype=torch.bool, device=index.device)
        taken[index] = True
        holes = taken[:keep].nonzero()[:, 0]
        movers = (~taken[keep:]).nonzero()[:, 0] + keep
        for v in self._fields.values():
            v[holes] = v[movers]
        self.count = keep
        return out

    def worst(self) -> float:
        """Lowest gap among the open domains; +inf when there are none."""
        return float(self._fields["gap"][: self.count].min()) if self.count else float("inf")

    def bytes(self) -> int:
        """Memory that the pool holds."""
        return sum(v.numel() * v.element_size() for v in self._fields.values())
