"""Domains as rows of bytes, which travel between ranks in one message."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from verifier.bab.balance import LostDomains
from verifier.bab.domains import Domains

D = TypeVar("D", bound=Domains)

_MARK = 1  # the first byte of a row that holds a domain; padding is zero


@dataclass(frozen=True)
class Layout:
    """Domains as rows of bytes: what is in them, in order.

    Attributes:
        parts: name, dtype and shape (without the domain axis) of every field.
    """

    parts: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @staticmethod
    def of(domains: Domains) -> Layout:
        """From any batch, even an empty one."""
        tensors = [(f.name, getattr(domains, f.name)) for f in fields(domains)]
        return Layout(tuple((name, t.dtype, tuple(t.shape[1:])) for name, t in tensors))

    @property
    def width(self) -> int:
        """Bytes of a domain."""
        return 1 + sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.parts)

    def pack(self, domains: Domains) -> Tensor:
        """(n, width) uint8."""
        n = domains.count
        rows = [torch.full((n, 1), _MARK, dtype=torch.uint8, device=domains.case.device)]
        for name, dtype, shape in self.parts:
            flat = getattr(domains, name).reshape(-1)
            if flat.dtype != dtype:
                raise LostDomains(f"field {name} of a domain is {flat.dtype} here and {dtype} elsewhere")
            rows.append(flat.contiguous().view(torch.uint8).reshape(n, dtype.itemsize * math.prod(shape)))
        return torch.cat(rows, 1)

    def unpack(self, rows: Tensor, kind: type[D]) -> D:
        """The domains of (n, width) rows.

        Args:
            kind: their class.

        Raises:
            LostDomains: some row holds no domain.
        """
        if not bool((rows[:, 0] == _MARK).all()):
            raise LostDomains("a message holds fewer domains than were announced")
        out: dict[str, Tensor] = {}
        start = 1
        for name, dtype, shape in self.parts:
            stop = start + dtype.itemsize * math.prod(shape)
            # A copy of its own: a view with another dtype needs an aligned start.
            own = rows[:, start:stop].clone(memory_format=torch.contiguous_format).flatten()
            out[name] = own.view(dtype).reshape(rows.shape[0], *shape)
            start = stop
        return kind(**out)
