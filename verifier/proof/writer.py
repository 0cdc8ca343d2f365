"""A proof in the making: its sections, one for every box whose hidden bounds are known, and its boxes.

A section follows the bounds of the box. Before every step it claims what the bounds have become since the last one, so
that a reader's table holds the numbers that the step was computed with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.proof.archive import Archive
from verifier.proof.boxes import BoxLog, listed_rows
from verifier.proof.leaves import LeafLog
from verifier.proof.trees import NoCover

VERSION = 1
Slopes = Mapping[int, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Files:
    """What a proof is about.

    Attributes:
        network, property: SHA-256 of the files' bytes. external: of files with external data, by location.
        tensors: ONNX names of the nodes that ReLUs read.
    """

    network: str
    property: str
    external: Mapping[str, str]
    tensors: Mapping[int, str]


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Incomplete(Exception):
    """A proof that refutes less than the query did."""


class Proof:
    """A proof of one query.

    Args:
        without: what the search does without, in words.

    Attributes:
        refuted: (N,) bool, the cases that the file refutes by now.
        broken: why it cannot be finished; empty as long as it can.
    """

    def __init__(self, path: Path, files: Files, graph: Graph, problem: Problem, without: Sequence[str]) -> None:
        self.archive = Archive(path)
        self.files, self.graph, self.problem, self.without = files, graph, problem, tuple(without)
        self.places = {index: place for place, index in enumerate(sorted(files.tensors))}
        empty = np.any(problem.lower > problem.upper, axis=1)
        self.refuted = empty[problem.case_box]
        self.broken = ""
        self.sections: list[Section] = []
        self.boxes: list[dict[str, Any]] = []

    def section(self, box: Interval) -> Section:
        """A new box (1, *input_shape)."""
        self.sections.append(Section(self, box))
        return self.sections[-1]

    def refuted_boxes(self, log: BoxLog, cases: np.ndarray) -> None:
        """Cases that a search over inputs has refuted."""
        try:
            step = log.write(self.archive, self.problem, np.sort(cases))
        except NoCover:
            self.broken = "the boxes that were closed do not cover a case"
            return
        if step is not None:
            self.boxes.append(step)
            self.refuted[cases] = True

    def finish(self, writer: str) -> int:
        """The file; its size in bytes.

        Raises:
            OSError: it cannot be written. Incomplete: it refutes less than the query did.
        """
        if self.broken or not self.refuted.all():
            raise Incomplete(self.broken or f"{int((~self.refuted).sum())} cases are refuted in no step")
        files, problem, put = self.files, self.problem, self.archive.put
        rows = {"y": put(problem.row_y.astype(np.float64)), "d": put(problem.row_d.astype(np.float64))}
        if problem.row_x is not None:
            rows["x"] = put(problem.row_x.astype(np.float64))
        steps = [step for section in self.sections if section.refutes for step in section.steps]
        return self.archive.finish(
            {
                "format": "verifier-proof",
                "version": VERSION,
                "writer": writer,
                "network": {"sha256": files.network, "external": dict(files.external)},
                "property": {"sha256": files.property},
                "tensors": [files.tensors[index] for index in self.places],
                "rows": rows,
                "without": list(self.without),
                "steps": [*steps, *self.boxes],
            }
        )


@dataclass
class Section:
    """The steps of one box.

    Attributes:
        refutes: whether some step refutes a case.
    """

    proof: Proof
    box: Interval
    steps: list[dict[str, Any]] = field(default_factory=list)
    refutes: bool = False
    _table: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, up = (_flat(side) for side in self.box)
        self._step("box", lower=self._put(low), upper=self._put(up))

    def _put(self, array: np.ndarray) -> str:
        return self.proof.archive.put(array)

    def _step(self, kind: str, **what: Any) -> None:
        self.steps.append({"kind": kind, **what})

    # -- hidden bounds --------------------------------------------------------------------------------------------

    def claim(self, bounds: Mapping[int, Interval], last: int | None = None) -> None:
        """Make the table hold what is known of every node that a ReLU reads, up to node ``last``."""
        for index in self.proof.places:
            if last is not None and index > last:
                break
            now = tuple(_flat(side) for side in bounds[index])
            before = self._table.get(index)
            if before is None or any((a != b).any() for a, b in zip(now, before, strict=True)):
                self._step("claim", tensor=self.proof.places[index], lower=self._put(now[0]), upper=self._put(now[1]))
                self._table[index] = (now[0], now[1])

    def rows(self, index: int, elements: Tensor, after: Interval, slopes: Slopes | None, first: int = 0) -> None:
        """Bounds that backward passes have improved.

        Args:
            elements: (n,) flat positions; rows are +e for all of them, then -e.
            after: (1, *shape), what is known now.
            slopes: (1, R, *shape) by ReLU, of the rows from ``first`` on, or None: default ones.
        """
        pick = self._improved(index, elements, after)
        n = elements.shape[0]
        if slopes is not None:
            count = next((v["alpha"].shape[1] for v in slopes.values()), 0)
            pick = pick[(pick >= first) & (pick < first + count)]
        if not len(pick):
            return
        given = None if slopes is None else self._slopes(slopes, pick - first)
        self._step("rows", **self._raised(index, elements, pick, after, n), slopes=given)

    def _improved(self, index: int, elements: Tensor, after: Interval) -> np.ndarray:
        """Which rows (+e, then -e) are tighter than the table."""
        low, up = (_flat(side) for side in after)
        at = elements.cpu().numpy()
        old = self._table[index]
        return np.flatnonzero(np.concatenate([low[at] > old[0][at], up[at] < old[1][at]]))

    def _raised(self, index: int, elements: Tensor, pick: np.ndarray, after: Interval, n: int) -> dict[str, Any]:
        """What a step says of rows, which the table then holds."""
        at, sides = elements.cpu().numpy()[pick % n], (pick >= n).astype(np.uint8)
        low, up = (_flat(side) for side in after)
        values = np.where(sides == 0, low[at], up[at]).astype(np.float32)
        for side in (0, 1):
            self._table[index][side][at[sides == side]] = values[sides == side]
        return {
            "tensor": self.proof.places[index],
            "elements": self._put(at.astype(np.int32)),
            "sides": self._put(sides),
            "values": self._put(values),
        }

    def _slopes(self, slopes: Slopes, rows: np.ndarray) -> dict[str, Any]:
        """Slopes of some rows, at the elements that the table leaves unstable."""
        columns, values = self._columns(slopes)
        return {"columns": columns, "values": self._put(values[rows])}

    def _columns(self, slopes: Slopes) -> tuple[list[Any], np.ndarray]:
        """The unstable elements, as a step has them, and their slopes, float32 (R, U)."""
        columns: list[Any] = []
        parts = []
        for node, given in sorted(slopes.items()):
            index = self.proof.graph.nodes[node].inputs[0]
            low, up = self._table[index]
            at = np.flatnonzero((low < 0) & (up > 0))
            columns.append([self.proof.places[index], self._put(at.astype(np.int32))])
            alpha = given["alpha"][0].detach().float().cpu()
            parts.append(alpha.reshape(alpha.shape[0], -1)[:, at].numpy().clip(0, 1))
        return columns, np.concatenate(parts, 1) if parts else np.zeros((0, 0), np.float32)

    def refined(
        self, index: int, elements: Tensor, after: Interval, log: LeafLog, columns: list[tuple[int, Tensor]]
    ) -> None:
        """Bounds that searches of their own have improved; case i of the log is row i."""
        pick = self._improved(index, elements, after)
        if not len(pick):
            return
        try:
            tree = log.write(self.proof.archive, pick.tolist(), self._listed(columns), rows=False)
        except NoCover:
            self.proof.broken = "the domains that bound a neuron do not cover the box"
            return
        self._step("refine", **self._raised(index, elements, pick, after, elements.shape[0]), tree=tree)

    # -- cases ----------------------------------------------------------------------------------------------------

    def by_interval(self, cases: np.ndarray) -> None:
        """Cases that the intervals of the outputs refute, (n,)."""
        self._cases(cases, method="interval", tree=None)

    def at_root(self, cases: np.ndarray, row: np.ndarray, slopes: Slopes | None, rows: np.ndarray) -> None:
        """Cases that one backward pass each refutes.

        Args:
            row: (n,), which of the case's rows is violated.
            slopes: (1, S, *shape) by ReLU; rows: (n,), which of them a case has; None: default slopes.
        """
        if not len(cases):
            return
        columns, values = ([], None) if slopes is None else self._columns(slopes)
        given = None if values is None else self._put(values[rows])
        tree = {
            "columns": columns,
            "nodes": self._put(np.full(len(cases), -1, np.int32)),
            "row": self._put(row.astype(np.int32)),
            "slopes": given,
            "wide": None,
            "wide_slopes": None,
            "multipliers": self._put(np.zeros(0, np.float32)),
            "used": None,
        }
        self._cases(cases, method="backward", tree=tree)

    def by_search(self, cases: np.ndarray, log: LeafLog, columns: list[tuple[int, Tensor]]) -> None:
        """Cases that a search of neurons has refuted; case i of the log is ``cases[i]``."""
        try:
            tree = log.write(self.proof.archive, range(len(cases)), self._listed(columns))
        except NoCover:
            self.proof.broken = "the domains that were closed do not cover a case"
            return
        self._cases(cases, method="backward", tree=tree)

    def _cases(self, cases: np.ndarray, **what: Any) -> None:
        if len(cases):
            self.refutes = self.proof.refuted[cases] = True
            rows = listed_rows(self.proof.archive, self.proof.problem.case_rows[cases])
            self._step("cases", **rows, **what)

    def _listed(self, columns: list[tuple[int, Tensor]]) -> list[Any]:
        places = self.proof.places
        return [[places[index], self._put(at.cpu().numpy().astype(np.int32))] for index, at in columns]


def _flat(value: Tensor) -> np.ndarray:
    """(n,) float32 of a box's value (1, *shape)."""
    return value.detach().reshape(-1).float().cpu().numpy().copy()
