"""The question to be answered: is there an input in a box for which the outputs are unsafe?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Variable:
    """A tensor that a property names (VNN-LIB 2.0).

    Attributes:
        name, dtype: as the property declares them.
        shape: likewise; () is a scalar.
        is_input: whether its elements are inputs of the problem; else they are outputs.
        index: int64 (size,), where its elements are among these, row-major. Inputs that are equal are one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_input: bool
    index: np.ndarray


@dataclass(frozen=True)
class Problem:
    """An OR over cases; a case is one input box and an AND of linear rows ``c_y.y + c_x.x <= d`` (the unsafe set).

    ``sat`` means: for some case there is an x in its box with every row of the case true. ``unsat`` means that
    every case is refuted on its whole box; a problem without cases (K = N = 0) is refuted by definition. Arrays are
    plain numpy so that parsing needs no torch.

    Attributes:
        lower: float32 (K, n_in), lower bounds of the boxes, rounded *outward* from the file's decimals: proofs use
            these, whatever the network's input type.
        upper: the upper bounds, likewise.
        witness_lower: (K, n_in), lower bounds rounded to nearest, in the network's input type after :meth:`typed`,
            float32 before: counterexamples stay inside these.
        witness_upper: the upper bounds, likewise.
        row_y: float64 (M, n_out), coefficients over the outputs, table of distinct rows; always exact.
        row_x: float64 (M, n_in) or None when no row mentions an input; always exact.
        row_d: float64 (M,), right-hand sides, rounded *up* from the exact number, so that the set never shrinks.
        case_box: int64 (N,), index into the boxes.
        case_rows: int64 (N, S), indices into the rows, padded with -1; a case without rows is its whole box.
        row_strict: bool (M,) or None (no strict row): the file says ``<``. Proofs use ``<=``, replays ``<``.
        row_d_inner: float64 (M,) or None (equal to ``row_d``), rounded *down*: replays use these.
        inner_lower: (K, n_in) or None (equal to the witness bounds), lower bounds rounded *inward*: counterexamples are
            searched for in here first. float64, and perhaps empty, before :meth:`typed`.
        inner_upper: the upper bounds, likewise.
        nearest_lower: float64 (K, n_in) or None (equal to the witness bounds), lower bounds rounded to nearest, from
            which :meth:`typed` derives the witness bounds of a float64 network.
        nearest_upper: the upper bounds, likewise.
        variables: the tensors that a witness lists, in order; none: inputs and outputs are X_i and Y_j.
        products: what the last outputs are, one tuple of factors each: i >= 0 is input i, ~j output j, and a factor
            stands there once per power. Replays compute them exactly from the other outputs.
        input_shape: of the point or box that the problem was made from in Python; None: not known, as from a file.
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
    inner_lower: np.ndarray | None = None
    inner_upper: np.ndarray | None = None
    nearest_lower: np.ndarray | None = None
    nearest_upper: np.ndarray | None = None
    variables: tuple[Variable, ...] = ()
    products: tuple[tuple[int, ...], ...] = ()
    input_shape: tuple[int, ...] | None = None

    @property
    def n_in(self) -> int:
        return int(self.lower.shape[1])

    @property
    def n_out(self) -> int:
        return int(self.row_y.shape[1])

    @property
    def n_values(self) -> int:
        """Outputs that are no products."""
        return self.n_out - len(self.products)

    @property
    def n_cases(self) -> int:
        return int(self.case_box.shape[0])

    @property
    def dtype(self) -> np.dtype:
        """Type of the witness bounds: of the network's input, once :meth:`typed` was asked for it."""
        return self.witness_lower.dtype

    def typed(self, dtype: np.dtype | type) -> Problem:
        """The same question with the witness and inner bounds in the type of a network's input.

        An input between whose exact bounds the type has no number keeps its bounds rounded to nearest.

        Args:
            dtype: float32 or float64.
        """
        dtype = np.dtype(dtype)
        if self.dtype == dtype and (self.inner_lower is None or self.inner_lower.dtype == dtype):
            return self
        low, up = self.witness_lower, self.witness_upper
        if dtype == np.float64 and self.nearest_lower is not None and self.nearest_upper is not None:
            low, up = self.nearest_lower, self.nearest_upper
        low, up = low.astype(dtype), up.astype(dtype)
        inner_low = inner_up = None
        if self.inner_lower is not None and self.inner_upper is not None:
            inner_low, inner_up = _not_below(self.inner_lower, dtype), -_not_below(-self.inner_upper, dtype)
            empty = inner_low > inner_up
            inner_low, inner_up = np.where(empty, low, inner_low), np.where(empty, up, inner_up)
            # A scorer may compare float64 inputs with bounds rounded to float32: they fit these too, where they can.
            both_low, both_up = np.maximum(inner_low, self.witness_lower), np.minimum(inner_up, self.witness_upper)
            room = both_low <= both_up
            inner_low, inner_up = np.where(room, both_low, inner_low), np.where(room, both_up, inner_up)
        return replace(
            self,
            witness_lower=low,
            witness_upper=up,
            inner_lower=inner_low,
            inner_upper=inner_up,
            nearest_lower=None,
            nearest_upper=None,
        )

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


def _not_below(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The smallest numbers of a type that are not below the given ones."""
    near = values.astype(dtype)
    return np.where(near < values, np.nextafter(near, dtype.type(np.inf)), near) + dtype.type(0)
