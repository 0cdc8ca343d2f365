"""The closed domains of one neuron search: what refutes each of them, on disk while the search runs.

Slopes are written as multiples of 1/128, one byte each. They are rounded before a domain is certified, so that what is
written is what was proved; a domain that is refuted by its own slopes alone keeps them in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verifier.proof.archive import Archive
from verifier.proof.trees import split_tree

STEPS = 128
# Bytes of a spool that stay in memory, and leaves that are read back at once.
_IN_MEMORY, _READ_AT_ONCE = 8 << 20, 4096


def coarse(signs: Tensor, alpha_beta: Tensor) -> Tensor:
    """(B, S, U) with the slopes of free columns rounded to multiples of 1/128; multipliers as they are, at least 0."""
    slopes = (alpha_beta.clamp(0, 1) * STEPS).round() / STEPS
    return torch.where(signs[:, None] == 0, slopes, alpha_beta.clamp(min=0))


class _Spool:
    """Rows of one width on disk, appended and read back by number."""

    def __init__(self, width: int, kind: str) -> None:
        self.width, self.kind, self.count = width, np.dtype(kind), 0
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - it lives as long as the search

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self.kind).tobytes())
        self.count += len(rows)

    def row(self, number: int) -> np.ndarray:
        size = self.width * self.kind.itemsize
        self._file.seek(number * size)
        return np.frombuffer(self._file.read(size), self.kind)

    def blocks(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for first in range(0, len(numbers), _READ_AT_ONCE):
            yield np.stack([self.row(i) for i in numbers[first : first + _READ_AT_ONCE]])

    def close(self) -> None:
        self._file.close()


class LeafLog:
    """What a search of neurons has closed.

    Args:
        width: columns of its splits.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.case: list[int] = []
        self.row: list[int] = []
        self._columns: list[np.ndarray] = []
        self._signs: list[np.ndarray] = []
        self._multipliers: list[np.ndarray] = []
        self._wide: dict[int, int] = {}
        self._slopes, self._wide_slopes = _Spool(width, "u1"), _Spool(width, "<f4")

    def note(self, case: Tensor, signs: Tensor, row: Tensor, values: Tensor, wide: bool = False) -> None:
        """Domains that are closed.

        Args:
            case: (n,). signs: (n, U). row: (n,), which of the case's rows closes each.
            values: (n, U), of that row: slopes of free columns, multipliers of split ones.
            wide: the slopes are no multiples of 1/128.
        """
        if not case.numel():
            return
        sides, numbers = signs.cpu().numpy(), values.float().cpu().numpy()
        free = np.where(sides == 0, numbers, 0).clip(0, 1)
        if wide:
            for i in range(len(sides)):
                self._wide[len(self.case) + i] = self._wide_slopes.count + i
            self._wide_slopes.append(free)
        self._slopes.append(np.round(free * STEPS))
        for side, value in zip(sides, numbers, strict=True):
            at = np.flatnonzero(side)
            self._columns.append(at)
            self._signs.append(side[at])
            self._multipliers.append(np.maximum(value[at], 0).astype(np.float32))
        self.case += case.tolist()
        self.row += row.tolist()

    def write(self, archive: Archive, cases: Sequence[int], columns: list[Any], rows: bool = True) -> dict[str, Any]:
        """The trees of some cases, one after another, as a step has them.

        Args:
            columns: what they are, as a step has it.
            rows: whether it matters which row closes a leaf.

        Raises:
            NoCover: what was noted does not cover a case.
        """
        owner = np.array(self.case, dtype=np.int64)
        nodes: list[int] = []
        order: list[int] = []
        multipliers: list[np.ndarray] = []
        used: list[np.ndarray] = []
        for case in cases:
            mine = np.flatnonzero(owner == case)
            tree = split_tree([self._columns[i] for i in mine], [self._signs[i] for i in mine])
            nodes += tree.nodes
            for leaf, path in zip(tree.leaves, tree.paths, strict=True):
                number = int(mine[leaf])
                known = dict(zip(self._columns[number].tolist(), self._multipliers[number].tolist(), strict=True))
                multipliers.append(np.array([known.get(c, 0.0) for c in path], dtype=np.float32))
                used.append(np.array([c in known for c in path], dtype=np.uint8))
                order.append(number)
        wide = [place for place, number in enumerate(order) if number in self._wide]
        numbers = [self._wide[order[place]] for place in wide]
        flags = np.concatenate([np.zeros(0, np.uint8), *used])
        stream, count = archive.stream, len(order)
        own = stream(self._wide_slopes.blocks(numbers), np.float32, (len(wide), self.width)) if wide else None
        return {
            "columns": columns,
            "nodes": archive.put(np.array(nodes, dtype=np.int32)),
            "row": archive.put(np.array([self.row[i] for i in order], dtype=np.int32)) if rows else None,
            "slopes": stream(self._slopes.blocks(order), np.uint8, (count, self.width)),
            "wide": archive.put(np.array(wide, dtype=np.int32)) if wide else None,
            "wide_slopes": own,
            "multipliers": archive.put(np.concatenate([np.zeros(0, np.float32), *multipliers])),
            "used": None if flags.all() else archive.put(flags),
        }

    def close(self) -> None:
        """Give up what is on disk."""
        self._slopes.close()
        self._wide_slopes.close()
