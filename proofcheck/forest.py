"""Binary trees in preorder, and their leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from proofcheck.failures import require

_ENTRIES = 1 << 21  # of the paths of a batch
_DEEPEST = 1 << 14


@dataclass
class Leaves:
    """Some leaves, one after another.

    Attributes:
        first: number of the first one. tree: (b,) which tree each is in.
        leaf, split, upper: of every split on their paths, from the root downwards, one leaf after another: which leaf
            (from 0), which split (by its place among all splits), and whether it is on the second side.
    """

    first: int
    tree: np.ndarray
    leaf: np.ndarray
    split: np.ndarray
    upper: np.ndarray

    def some(self, which: np.ndarray) -> tuple[Leaves, np.ndarray]:
        """A part of them, and where the entries of their paths are."""
        new = np.full(self.tree.size, -1)
        new[which] = np.arange(which.size)
        kept = new[self.leaf] >= 0
        return Leaves(self.first, self.tree[which], new[self.leaf[kept]], self.split[kept], self.upper[kept]), kept


def leaves(nodes: np.ndarray, trees: int, batch: int, where: str) -> Iterator[Leaves]:
    """The leaves of trees, at most `batch` at a time.

    Args:
        nodes: -1 for a leaf, and anything above for an inner node, in preorder, tree after tree.

    A node is reached if and only if its parent was, an inner node has both sides, and nothing is left at the end: so
    the leaves of each tree cover its box.
    """
    path: list[tuple[int, bool]] = []
    got: list[tuple[int, list[tuple[int, bool]]]] = []
    first = split = entries = tree = 0
    require(nodes.size and trees and nodes.min() >= -1, f"{where}: no tree, or a node below -1")
    for node in nodes.tolist():
        require(tree < trees, f"{where}: nodes after the end of the last tree")
        if node >= 0:
            path.append((split, False))
            split += 1
            require(len(path) <= _DEEPEST, f"{where}: tree {tree} is too deep")
            continue
        got.append((tree, list(path)))
        entries += len(path)
        while path and path[-1][1]:
            path.pop()
        if path:
            path[-1] = (path[-1][0], True)
        else:
            tree += 1
        if len(got) == batch or entries > _ENTRIES:
            yield _packed(first, got)
            first, entries, got = first + len(got), 0, []
    require(tree == trees and not path, f"{where}: a hole in tree {tree}: nodes are missing at the end")
    if got:
        yield _packed(first, got)


def _packed(first: int, got: list[tuple[int, list[tuple[int, bool]]]]) -> Leaves:
    leaf = np.repeat(np.arange(len(got)), [len(p) for _, p in got])
    flat = [entry for _, p in got for entry in p]
    split, upper = np.array([s for s, _ in flat], np.int64), np.array([s for _, s in flat], dtype=bool)
    return Leaves(first, np.array([t for t, _ in got], np.int64), leaf, split, upper)
