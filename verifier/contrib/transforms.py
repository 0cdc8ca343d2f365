"""Discrete Fourier transforms of a constant length: fixed combinations of the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from verifier.frontend.converters import Attributes, Function
from verifier.testing import Node


def _dft(a: Attributes) -> Function:
    inverse, one_sided = bool(a.get("inverse", 0)), bool(a.get("onesided", 0))
    fixed = a.get("axis", 1 if a.version < 20 else -2)

    def run(x: Tensor, length: Any = None, axis: Any = None) -> Tensor:
        d = (fixed if axis is None else int(axis.reshape(()))) % x.dim()
        n = x.shape[d] if length is None else int(length.reshape(()))
        if x.shape[-1] not in (1, 2) or (one_sided and (inverse or x.shape[-1] == 2)):
            raise NotImplementedError("a one-sided DFT of complex numbers, or an inverse one")
        table = _table(x.shape[d], n, inverse)
        table = table[:, : n // 2 + 1] if one_sided else table
        real, imaginary = table.real.to(x.dtype), table.imag.to(x.dtype)

        def times(part: Tensor, matrix: Tensor) -> Tensor:
            moved = part.movedim(d, -1)
            out = moved.reshape(-1, moved.shape[-1]) @ matrix
            return out.reshape(*moved.shape[:-1], matrix.shape[1]).movedim(-1, d)

        first = x.select(-1, 0)
        parts = [times(first, real), times(first, imaginary)]
        if x.shape[-1] == 2:
            second = x.select(-1, 1)
            parts = [parts[0] - times(second, imaginary), parts[1] + times(second, real)]
        return torch.stack(parts, -1)

    return run


def _table(size: int, length: int, inverse: bool) -> Tensor:
    """(size, length): the transform of numbers that are cut off or filled with zeros to a length."""
    whole = torch.eye(max(size, length), dtype=torch.complex128)[:size, :length]
    return torch.fft.ifft(whole, dim=1) if inverse else torch.fft.fft(whole, dim=1)


CONVERTERS = {"DFT": _dft}
NODES = [
    *(Node("DFT", (1, 5, 1), (None, np.array(1)), {"onesided": side}, 20) for side in (0, 1)),
    *(Node("DFT", (1, 6, 2), (None, np.array(1)), {"inverse": way}, 20) for way in (0, 1)),
    Node("DFT", (1, 6, 2), (np.array(4), np.array(1)), {}, 20),
    Node("DFT", (1, 6, 1), (), {"axis": 1}, 17),
]
