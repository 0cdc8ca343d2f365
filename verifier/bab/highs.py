"""Linear programs by HiGHS (Huangfu and Hall, Mathematical Programming Computation 2018), silent and warm-started."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FOREVER = 1e9  # seconds


@dataclass(frozen=True)
class Solved:
    """What the solver says; its tolerances are absolute, so none of it proves anything.

    Attributes:
        infeasible: there is no point, or the solver cannot say.
        point: (n,) of the least value, or of the best one when time ran out; None when there is none.
        duals: (m,) of the rows, <= 0 up to tolerances; None when there are none.
        iterations: of the simplex method.
    """

    infeasible: bool
    point: np.ndarray | None
    duals: np.ndarray | None
    iterations: int


@dataclass
class WarmStarts:
    """Optimal bases of earlier programs, one for each shape: where a program of the same shape starts."""

    _bases: dict[tuple[int, int], Any] = field(default_factory=dict)

    def minimise(
        self, cost: np.ndarray, rows: np.ndarray, right: np.ndarray, box: tuple[np.ndarray, np.ndarray], seconds: float
    ) -> Solved:
        """Minimise ``cost . x`` subject to ``rows x <= right`` and ``box[0] <= x <= box[1]``.

        Args:
            cost: (n,); ``rows``: (m, n), dense; ``right``: (m,); infinite bounds are none.
            seconds: for the solver.
        """
        import highspy  # a tenth of a second, and few problems come to a linear program

        kinds, began = highspy.HighsModelStatus, time.monotonic()
        model, known = _model(cost, rows, right, box), self._bases.pop(rows.shape, None)
        solver = _solver(model, known, seconds)
        if known is not None and solver.getModelStatus() not in (kinds.kOptimal, kinds.kInfeasible, kinds.kTimeLimit):
            solver = _solver(model, None, max(0.0, seconds - (time.monotonic() - began)))  # the start may be to blame
        if solver.getModelStatus() == kinds.kOptimal:
            self._bases[rows.shape] = solver.getBasis()
        elif solver.getModelStatus() != kinds.kTimeLimit:
            return Solved(True, None, None, 0)
        found, count = solver.getSolution(), int(solver.getInfo().simplex_iteration_count)
        point = np.array(found.col_value) if found.value_valid else None
        duals = np.array(found.row_dual) if found.dual_valid else None
        return Solved(False, _finite(point), _finite(duals), count)


def _solver(model: Any, basis: Any, seconds: float) -> Any:
    """A solver that has run, from a basis if there is one."""
    import highspy

    # The base class: what is derived from it prints a banner.
    solver: Any = highspy._Highs()  # type: ignore[attr-defined]
    for name, value in (("output_flag", False), ("threads", 1), ("solver", "simplex")):
        solver.setOptionValue(name, value)
    solver.setOptionValue("time_limit", min(seconds, _FOREVER))
    solver.passModel(model)
    if basis is not None:
        solver.setBasis(basis)
    solver.run()
    return solver


def _model(cost: np.ndarray, rows: np.ndarray, right: np.ndarray, box: tuple[np.ndarray, np.ndarray]) -> Any:
    import highspy

    model = highspy.HighsLp()
    model.num_row_, model.num_col_ = rows.shape
    model.col_cost_, model.row_upper_ = cost, right
    model.col_lower_, model.col_upper_ = box
    model.row_lower_ = np.full(len(right), -highspy.kHighsInf)
    at, column = rows.nonzero()
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.append(0, np.cumsum(np.bincount(at, minlength=len(right)))).astype(np.int32)
    model.a_matrix_.index_ = column.astype(np.int32)
    model.a_matrix_.value_ = rows[at, column]
    return model


def _finite(values: np.ndarray | None) -> np.ndarray | None:
    return values if values is not None and bool(np.isfinite(values).all()) else None
