"""Linear programs as lists of entries, and the solver that takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Program:
    """Rows of a program as a list of entries, and their sides.

    Attributes:
        at, column, value: row, column and value of every entry, row by row.
        lower, upper: (m,) sides.
        columns: how many.
    """

    at: np.ndarray
    column: np.ndarray
    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    columns: int

    @classmethod
    def of(cls, matrix: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> Program:
        at, column = matrix.nonzero()
        return cls(at, column, matrix[at, column], lower, upper, matrix.shape[1])

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """What weights (m,) of the rows give on the columns."""
        return np.bincount(self.column, self.value * y[self.at], self.columns)


def solver_of(program: Program, box: tuple[np.ndarray, np.ndarray], cost: np.ndarray | None = None) -> Any:
    """HiGHS, one thread of the simplex method, with a program in it.

    Args:
        box: (low, high) of the columns.
        cost: of the columns, to be minimised; default none.
    """
    import highspy

    model = highspy.HighsLp()
    rows = len(program.lower)
    model.num_row_, model.num_col_ = rows, program.columns
    model.col_cost_ = np.zeros(program.columns) if cost is None else cost
    model.col_lower_, model.col_upper_ = box
    model.row_lower_, model.row_upper_ = program.lower, program.upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.append(0, np.cumsum(np.bincount(program.at, minlength=rows))).astype(np.int32)
    model.a_matrix_.index_ = program.column.astype(np.int32)
    model.a_matrix_.value_ = program.value
    solver: Any = highspy._Highs()  # type: ignore[attr-defined]
    for name, value in (
        ("output_flag", False),
        ("threads", 1),
        ("solver", "simplex"),
        ("presolve", "off"),
        ("simplex_scale_strategy", 0),
    ):
        solver.setOptionValue(name, value)
    solver.passModel(model)
    return solver
