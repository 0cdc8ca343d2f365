"""Trees of splits from what is left of a search: its leaves.

A search notes only what it closes. Its leaves are those of a decision tree in some order of the splits: some split
occurs in all of them, its two sides are again such sets, and so on. Where phases followed from refuted sides, no split
may be in all leaves; the most frequent one is taken then, and a leaf without it belongs to both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tree:
    """A tree in preorder.

    Attributes:
        nodes: a column for an inner node, -1 for a leaf.
        leaves: per leaf which of the given ones it is.
        paths: per leaf the columns on its path, from the root downwards.
    """

    nodes: list[int] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)


class NoCover(Exception):
    """Leaves that do not cover everything."""


def split_tree(columns: Sequence[np.ndarray], signs: Sequence[np.ndarray]) -> Tree:
    """The tree of the leaves of one search.

    Args:
        columns: per leaf (k,) the columns that are split; signs: (k,) +1 or -1, on which side.

    Raises:
        NoCover: some part of the box is in no leaf.
    """
    count = len(columns)
    owner = np.repeat(np.arange(count), [len(c) for c in columns])
    column = np.concatenate([np.zeros(0, np.int64), *columns]).astype(np.int64)
    sign = np.concatenate([np.zeros(0, np.int8), *signs])
    out = Tree()
    # An entry is a split of a leaf that is not on the path yet; leaves without one end a path.
    todo: list[tuple[np.ndarray, np.ndarray, tuple[int, ...]]] = [(np.arange(count), np.arange(len(column)), ())]
    while todo:
        leaves, entries, path = todo.pop()
        if not len(leaves):
            raise NoCover
        having = np.unique(owner[entries])
        if len(having) < len(leaves):
            out.nodes.append(-1)
            out.leaves.append(int(np.setdiff1d(leaves, having, assume_unique=True)[0]))
            out.paths.append(path)
            continue
        at = int(np.bincount(column[entries]).argmax())
        here = column[entries] == at
        rest = entries[~here]
        out.nodes.append(at)
        for side in (1, -1):  # the last one that is pushed comes first
            others = owner[entries[here & (sign[entries] != side)]]
            kept = np.setdiff1d(leaves, others, assume_unique=True)
            todo.append((kept, rest[~np.isin(owner[rest], others)], (*path, at)))
    return out


@dataclass
class BoxTree:
    """A tree of splits of inputs in preorder.

    Attributes:
        nodes: an input for an inner node, -1 for a leaf; points: one for every inner node.
        leaves: per leaf which of the given ones it is.
    """

    nodes: list[int] = field(default_factory=list)
    points: list[float] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)


def box_tree(lower: np.ndarray, upper: np.ndarray, low: np.ndarray, up: np.ndarray) -> BoxTree:
    """The tree of boxes that came from halving one box.

    Args:
        lower, upper: float32 (L, k), the boxes.
        low, up: float32 (k,), what they cover.

    Raises:
        NoCover: they do not come from halving.
    """
    out = BoxTree()
    todo = [(np.arange(len(lower)), low, up)]
    half = np.float32(0.5)
    while todo:
        leaves, low, up = todo.pop()
        if not len(leaves):
            raise NoCover
        first = leaves[0]
        if (lower[first] <= low).all() and (upper[first] >= up).all():
            out.nodes.append(-1)
            out.leaves.append(int(first))
            continue
        middle = np.clip(low * half + up * half, low, up)
        below, above = upper[leaves] <= middle, lower[leaves] >= middle
        cuts = (below | above).all(0) & (middle > low) & (middle < up)
        if not cuts.any():
            raise NoCover
        at = int(cuts.argmax())
        out.nodes.append(at)
        out.points.append(float(middle[at]))
        left, right = up.copy(), low.copy()
        left[at] = right[at] = middle[at]
        todo.append((leaves[~below[:, at]], right, up))
        todo.append((leaves[below[:, at]], low, left))
    return out
