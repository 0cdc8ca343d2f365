"""The cases of a search over input boxes, as tensors: their boxes and their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verifier.bab.domains import BoxDomains
from verifier.bounds.crown import Specification
from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.graph.graph import Graph


def varying_inputs(problem: Problem, cases: np.ndarray) -> np.ndarray:
    """Coordinates that differ within a box of some of these cases, int64 (k,)."""
    return np.flatnonzero(problem.free(np.unique(problem.case_box[cases])).any(0))


@dataclass(frozen=True)
class BoxRows:
    """The rows of a batch of boxes.

    Attributes:
        spec: (B, S, ...), or (1, S, ...) where all have the same.
        thresholds: float64 (B, S), +inf where a row is padding.
        strict: (B, S) bool, or None: no row is strict.
    """

    spec: Specification
    thresholds: Tensor
    strict: Tensor | None


@dataclass(frozen=True)
class CaseTable:
    """The cases on the device; K boxes, N cases, M rows, S rows per case.

    Attributes:
        lower, upper: float32 (K, n_in).
        box: (N,) int64.
        rows: (N, S >= 1) int64, padded with -1.
        y: float64 (M, n_out); x: float64 (M, n_in) or None; d: float64 (M,).
        strict: bool (M,), or None: no row is strict.
        varying: (k,) int64.
        single: all cases have the same rows.
    """

    lower: Tensor
    upper: Tensor
    box: Tensor
    rows: Tensor
    y: Tensor
    x: Tensor | None
    d: Tensor
    strict: Tensor | None
    varying: Tensor
    single: bool

    @staticmethod
    def of(problem: Problem, cases: np.ndarray, device: torch.device) -> CaseTable:
        def put(a: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(a)).to(device)

        rows = problem.case_rows
        if rows.shape[1] == 0 or problem.row_y.shape[0] == 0:
            rows = np.full((problem.n_cases, 1), -1, dtype=np.int64)
        y, x, d = problem.row_y, problem.row_x, problem.row_d
        if y.shape[0] == 0:
            y, x, d = np.zeros((1, problem.n_out)), None, np.zeros(1)
        return CaseTable(
            put(problem.lower),
            put(problem.upper),
            put(problem.case_box.astype(np.int64)),
            put(rows.astype(np.int64)),
            put(y.astype(np.float64)),
            None if x is None else put(x.astype(np.float64)),
            put(d.astype(np.float64)),
            None if problem.row_strict is None else put(problem.row_strict),
            put(varying_inputs(problem, cases)),
            bool((rows[cases] == rows[cases[0]]).all()),
        )

    def boxes(self, domains: BoxDomains) -> Interval:
        """Full boxes, float32 (D, n_in)."""
        index = self.box[domains.case]
        low, up = self.lower[index], self.upper[index]
        low[:, self.varying], up[:, self.varying] = domains.lower, domains.upper
        return Interval(low, up)

    def rows_of(self, case: Tensor, graph: Graph) -> BoxRows:
        """Rows of the domains' cases."""
        rows = self.rows[case[:1] if self.single else case]
        index = rows.clamp(min=0)
        pad = rows < 0
        y = self.y[index].masked_fill(pad[..., None], 0.0).reshape(*rows.shape, *graph.whole.output_shape)
        x = None
        if self.x is not None:
            x = self.x[index].masked_fill(pad[..., None], 0.0).reshape(*rows.shape, *graph.whole.input_shape)
        threshold = self.d[index].masked_fill(pad, torch.inf).expand(case.shape[0], -1)
        return BoxRows(Specification(y, x), threshold, self._strict_rows(case))

    def _strict_rows(self, case: Tensor) -> Tensor | None:
        """(B, S) bool: strict rows of the domains' cases; padding is not."""
        if self.strict is None:
            return None
        rows = self.rows[case]
        return self.strict[rows.clamp(min=0)] & (rows >= 0)

    def slack(self, x: Tensor, y: Tensor, case: Tensor) -> Tensor:
        """Smallest ``d - row`` over the rows of each point's case: (P,) float64; NaN outputs give -inf."""
        rows = self.rows[case]
        index = rows.clamp(min=0)
        value = torch.einsum("pso,po->ps", self.y[index], y.double())
        if self.x is not None:
            value = value + torch.einsum("psn,pn->ps", self.x[index], x.double())
        slack = (self.d[index] - value).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        return slack.masked_fill(rows < 0, torch.inf).amin(1)

    def roots(self, case: Tensor) -> BoxDomains:
        """The whole boxes of some cases."""
        index = self.box[case]
        return BoxDomains(
            case,
            self.lower[:, self.varying][index],
            self.upper[:, self.varying][index],
            torch.zeros_like(case, dtype=torch.int16),
            torch.full_like(case, -torch.inf, dtype=torch.float32),
        )
