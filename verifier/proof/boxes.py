"""The closed boxes of a search over inputs: where they are, and by which bounds they are closed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from verifier.core.problem import Problem
from verifier.proof.archive import Archive
from verifier.proof.trees import BoxTree, box_tree

METHODS = {"interval": 0, "linear": 1, "crown": 2}


@dataclass
class BoxLog:
    """What a search over inputs has closed.

    Args:
        varying: (k,) inputs that are split.
    """

    varying: np.ndarray
    _case: list[np.ndarray] = field(default_factory=list)
    _lower: list[np.ndarray] = field(default_factory=list)
    _upper: list[np.ndarray] = field(default_factory=list)
    _method: list[np.ndarray] = field(default_factory=list)
    _weights: list[np.ndarray] = field(default_factory=list)

    def note(self, case: Tensor, lower: Tensor, upper: Tensor, method: str, weights: Tensor) -> None:
        """Boxes that are closed.

        Args:
            case: (n,). lower, upper: float32 (n, k).
            weights: float32 (n, S) of the rows; zero where one row alone closes a box.
        """
        if case.numel():
            self._case.append(case.cpu().numpy().astype(np.int32))
            self._lower.append(lower.cpu().numpy())
            self._upper.append(upper.cpu().numpy())
            self._method.append(np.full(case.shape[0], METHODS[method], np.uint8))
            self._weights.append(weights.cpu().numpy().astype(np.float32))

    def write(self, archive: Archive, problem: Problem, cases: np.ndarray) -> dict[str, Any] | None:
        """The trees of the cases that are refuted, as a step; None when there is none.

        Raises:
            NoCover: what was noted does not cover a case.
        """
        if not len(cases):
            return None
        case = np.concatenate(self._case)
        lower, upper = np.concatenate(self._lower), np.concatenate(self._upper)
        order = np.argsort(case, kind="stable")
        low, up = problem.lower[problem.case_box[cases]], problem.upper[problem.case_box[cases]]
        starts, ends = np.searchsorted(case[order], cases), np.searchsorted(case[order], cases, side="right")
        trees: list[BoxTree] = []
        leaves: list[np.ndarray] = []
        for i in range(len(cases)):
            mine = order[starts[i] : ends[i]]
            tree = box_tree(lower[mine], upper[mine], low[i, self.varying], up[i, self.varying])
            trees.append(tree)
            leaves.append(mine[tree.leaves])
        leaf = np.concatenate(leaves)
        nodes = np.concatenate([np.array(tree.nodes, dtype=np.int32) for tree in trees])
        nodes = np.where(nodes >= 0, self.varying.astype(np.int32)[nodes], nodes).astype(np.int32)
        points = np.concatenate([np.array(tree.points, dtype=np.float32) for tree in trees])
        weights = np.concatenate(self._weights)[leaf]
        rows = problem.case_rows[cases]
        most = int((rows >= 0).sum(1).max(initial=0))
        return {
            "kind": "boxes",
            "lower": archive.put(low.astype(np.float32)),
            "upper": archive.put(up.astype(np.float32)),
            **listed_rows(archive, rows),
            "nodes": archive.put(nodes),
            "points": archive.put(points),
            "methods": archive.put(np.concatenate(self._method)[leaf]),
            "weights": archive.put(weights[:, :most]) if weights.any() else None,
        }


def listed_rows(archive: Archive, rows: np.ndarray) -> dict[str, str]:
    """The rows of some cases, (N, S) padded with -1 at the end, as a step has them."""
    starts = np.concatenate([[0], np.cumsum((rows >= 0).sum(1))])
    return {"starts": archive.put(starts.astype(np.int32)), "rows": archive.put(rows[rows >= 0].astype(np.int32))}
