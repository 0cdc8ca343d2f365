"""The question that is asked: does some input of a box make the outputs unsafe?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """An OR over cases; a case is one input box and an AND of linear rows ``c_y.y + c_x.x <= d`` (the unsafe set).

    ``sat`` means: for some case there is an x in its box with every row of the case true. ``unsat`` means that
    every case is refuted on its whole box; a problem without cases (K = N = 0) is refuted by definition. Arrays are
    plain numpy so that parsing needs no torch.

    Attributes:
        lower, upper: float32 (K, n_in), distinct boxes, rounded *outward* from the file's decimals: proofs use these.
        witness_lower, witness_upper: float32 (K, n_in), rounded to nearest: counterexamples stay inside these.
        row_y: float64 (M, n_out), coefficients over the outputs, table of distinct rows; always exact.
        row_x: float64 (M, n_in) or None when no row mentions an input; always exact.
        row_d: float64 (M,), right-hand sides, rounded *up* from the exact number, so that the set never shrinks.
        case_box: int64 (N,), index into the boxes.
        case_rows: int64 (N, S), indices into the rows, padded with -1; a case without rows is its whole box.
        row_strict: bool (M,) or None (no strict row): the file says ``<``. Proofs use ``<=``, replays keep ``<``.
        row_d_inner: float64 (M,) or None (equal to ``row_d``), rounded *down*: replays use these.
    """

    lower: np.ndarray
    upper: np.ndarray
    witness_lower: np.ndarray
    witness_upper: np.ndarray
    row_y: np.ndarray
    row_x: np.ndarray | None
    row_d: np.ndarray
    case_box: np.ndarray
    case_rows: np.ndarray
    row_strict: np.ndarray | None = None
    row_d_inner: np.ndarray | None = None

    @property
    def n_in(self) -> int:
        return int(self.lower.shape[1])

    @property
    def n_out(self) -> int:
        return int(self.row_y.shape[1])

    @property
    def n_cases(self) -> int:
        return int(self.case_box.shape[0])

    def free(self, boxes: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Inputs that differ within a box, bool (K', n_in) for K' chosen boxes.

        A fixed decimal that is no float32 has two neighbouring bounds after rounding outward. It counts as fixed,
        unless nothing in its box has more width.
        """
        low, up = self.lower[boxes], self.upper[boxes]
        wide = up > np.nextafter(low, np.float32(np.inf))
        return np.where(wide.any(1, keepdims=True), wide, up > low)

    def margins(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Slack of every row at given points: ``d - c_y.y - c_x.x``.

        Args:
            x: (n, n_in) inputs; y: (n, n_out) outputs.

        Returns:
            float64 (n, M); a row holds where the slack is >= 0.
        """
        value = y.astype(np.float64) @ self.row_y.T
        if self.row_x is not None:
            value = value + x.astype(np.float64) @ self.row_x.T
        return self.row_d[None, :] - value
