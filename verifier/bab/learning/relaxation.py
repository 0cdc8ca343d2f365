"""The relaxation of one case as a linear program whose bounds say which neurons are split.

On the compact network (:mod:`verifier.bab.compact`) the program has a column for every free input, for every
pre-activation z_k and for every output h_k, and the rows

    z - W s - M h = b,      h_k - z_k >= 0,      h_k <= chord of the root's bounds,      rows of the case <= thresholds.

A split z_k >= 0 is the bounds z_k >= 0 and h_k - z_k <= 0; a split z_k <= 0 is z_k <= 0 and h_k <= 0. So the matrix
stays as it is, and the dual simplex method goes on from where it was. Where there is no point, the multipliers of its
proof tell which splits it needs. The solver works with tolerances, so that they are no more than a proposal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from verifier.bab.compact import Compact


@dataclass(frozen=True)
class Multipliers:
    """What may refute a domain.

    Attributes:
        rows: (S,) >= 0, weights of the case's rows.
        alpha: (U,) slopes of the lower planes, in [0, 1].
        beta: (U,) >= 0 multipliers of the splits.
        used: (U,) bool, splits that the proof rests on.
    """

    rows: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    used: np.ndarray


@dataclass(frozen=True)
class Checked:
    """What the program says of a domain.

    Attributes:
        refuted: how, where there is no point; ``point`` is None then.
        point: (n,) scaled free inputs in [-1, 1] of a point of the relaxation; None, and no ``refuted``: the solver
            gave up.
        error: (U,) >= 0, by how much every neuron's output differs from that of a ReLU there.
        z: (U,) pre-activations there.
    """

    refuted: Multipliers | None = None
    point: np.ndarray | None = None
    error: np.ndarray | None = None
    z: np.ndarray | None = None


class Relaxation:
    """The program of one case, and the domain that it is set to.

    Args:
        net: the compact network; ``first``, ``count``: which of its rows are the case's.

    Attributes:
        work: iterations of the simplex method so far; every solve counts as some.
    """

    def __init__(self, net: Compact, first: int, count: int) -> None:
        self.places = net.places.cpu().numpy()
        self.inputs, self.columns, self.rows = net.input_weight.shape[1], net.size, count
        self.system = _system(net, first, count)
        self._z = self.inputs + self.places
        self._h = self._z + self.columns
        self._tie = self.columns + self.places  # rows h - z
        self._signs = np.zeros(len(self.places), dtype=np.int8)
        low = np.full(self.system.columns, -np.inf)
        high = np.full(self.system.columns, np.inf)
        low[: self.inputs], high[: self.inputs] = -1.0, 1.0
        low[self._h] = 0.0
        self._solver = _solver(self.system, (low, high))
        self.box, self.sides = (low, high), (self.system.lower, self.system.upper)
        self.work = 0

    def check(self, signs: np.ndarray, seconds: float) -> Checked:
        """Whether a domain, given by signs (U,) of its splits, has a point.

        Args:
            seconds: for the solver.
        """
        self._move(signs)
        found = self._solve(seconds)
        if found is None:  # the start may be to blame
            self._solver.clearSolver()
            found = self._solve(seconds)
        return found or Checked()

    def _solve(self, seconds: float) -> Checked | None:
        import highspy

        solver, kinds = self._solver, highspy.HighsModelStatus
        solver.setOptionValue("time_limit", solver.getRunTime() + max(seconds, 0.01))
        solver.run()
        status = solver.getModelStatus()
        self.work += max(0, int(solver.getInfo().simplex_iteration_count)) + 10
        if status == kinds.kOptimal:
            return self._point(np.array(solver.getSolution().col_value))
        if status == kinds.kInfeasible:
            _, exists, ray = solver.getDualRay()
            if exists:
                return Checked(self._multipliers(np.array(ray)))
        return None

    def _move(self, signs: np.ndarray) -> None:
        """Change the bounds that tell the domain from the last one."""
        changed = np.flatnonzero(signs != self._signs)
        self._signs = signs.astype(np.int8)
        if not changed.size:
            return
        s = signs[changed]
        z, h, tie = self._z[changed], self._h[changed], self._tie[changed]
        low, high = self.box
        low[z], high[z] = np.where(s > 0, 0.0, -np.inf), np.where(s < 0, 0.0, np.inf)
        high[h] = np.where(s < 0, 0.0, np.inf)
        self.sides[1][tie] = np.where(s > 0, 0.0, np.inf)
        both = np.concatenate([z, h]).astype(np.int32)
        self._solver.changeColsBounds(len(both), both, low[both], high[both])
        self._solver.changeRowsBounds(len(tie), tie.astype(np.int32), self.sides[0][tie], self.sides[1][tie])

    def _point(self, values: np.ndarray) -> Checked:
        z, h = values[self._z], values[self._h]
        return Checked(None, values[: self.inputs], np.abs(h - np.maximum(z, 0.0)), z)

    def _multipliers(self, ray: np.ndarray) -> Multipliers:
        y = self._oriented(ray)
        cost = self.system.transposed(y)
        tie, on_z, on_h = y[self._tie], cost[self._z], cost[self._h]
        lower, bottom = np.maximum(tie, 0.0), np.maximum(-on_h, 0.0)
        total = lower + bottom
        alpha = np.divide(lower, total, out=np.zeros_like(total), where=total > 0)
        active, inactive = self._signs > 0, self._signs < 0
        # On a split h >= 0, or z <= h, say the same as the split itself.
        at_least, at_most = np.maximum(-on_z, 0.0) + bottom, np.maximum(on_z, 0.0) + lower
        beta = np.where(active, at_least, np.where(inactive, at_most, 0.0))
        used = (active & (tie < -_SMALL)) | (inactive & (on_h > _SMALL)) | (beta > _SMALL)
        rows = np.maximum(-y[len(y) - self.rows :], 0.0)
        return Multipliers(np.where(rows > _SMALL, rows, 0.0), alpha, np.where(used, beta, 0.0), used)

    def _oriented(self, ray: np.ndarray) -> np.ndarray:
        """The ray with the sign, and scaled to the size, of a proof."""
        size = np.abs(ray).max(initial=0.0)
        y = ray / size if size > 0 else ray
        return y if self._proves(y) >= self._proves(-y) else -y

    def _proves(self, y: np.ndarray) -> float:
        """By how much sum of y (row - side) exceeds what columns can give; positive for a proof."""
        return _least(y, *self.sides) + _least(-self.system.transposed(y), *self.box)


_SMALL = 1e-9


def _least(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Least value of weights . v over a box; tiny weights of infinite sides count for nothing."""
    side = np.where(weights > 0, low, high)
    side = np.where(np.isinf(side) & (np.abs(weights) <= 1e-7), 0.0, side)
    return float(np.where(weights == 0, 0.0, weights * np.where(weights == 0, 0.0, side)).sum())


@dataclass(frozen=True)
class _System:
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
    def of(cls, matrix: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> _System:
        at, column = matrix.nonzero()
        return cls(at, column, matrix[at, column], lower, upper, matrix.shape[1])

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """What weights (m,) of the rows give on the columns."""
        return np.bincount(self.column, self.value * y[self.at], self.columns)


def _system(net: Compact, first: int, count: int) -> _System:
    """The rows: pre-activations, outputs less pre-activations, chords, and the case's own."""
    n, t, places = net.input_weight.shape[1], net.size, net.places.cpu().numpy()
    affine = np.zeros((t, n + 2 * t))
    affine[:, n : n + t] = np.eye(t)
    affine[net.entry, :n] = -_array(net.input_weight)
    for layer in net.layers:
        columns = slice(n + t + layer.sources.start, n + t + layer.sources.stop)
        affine[layer.columns, columns] = -_array(layer.weight)
    tie = np.zeros((t, n + 2 * t))
    tie[:, n : n + t], tie[:, n + t :] = -np.eye(t), np.eye(t)
    rows = np.zeros((count, n + 2 * t))
    rows[:, n + t :] = _array(net.rows[first : first + count])
    if net.row_input is not None:
        rows[:, :n] = _array(net.row_input[first : first + count])
    # An output that only ever enters with a positive sign gains nothing from being large.
    above = places[(affine[:, n + t + places] != 0).any(0) | (rows[:, n + t + places] < 0).any(0)]
    chord, here = np.zeros((len(above), n + 2 * t)), np.arange(len(above))
    chord[here, n + t + above], chord[here, n + above] = 1.0, -_array(net.slope)[above]
    bias, kept = _array(net.bias), _array(net.kept) > 0
    lower = np.concatenate([bias, np.zeros(t), np.full(len(above) + count, -np.inf)])
    high = (bias, np.where(kept, 0.0, np.inf), _array(net.intercept)[above], -_array(net.row_constant)[first:][:count])
    return _System.of(np.concatenate([affine, tie, chord, rows]), lower, np.concatenate(high))


def _array(value: Tensor) -> np.ndarray:
    return value.double().cpu().numpy()


def _solver(system: _System, box: tuple[np.ndarray, np.ndarray]) -> Any:
    import highspy

    model = highspy.HighsLp()
    rows = len(system.lower)
    model.num_row_, model.num_col_ = rows, system.columns
    model.col_cost_ = np.zeros(system.columns)
    model.col_lower_, model.col_upper_ = box
    model.row_lower_, model.row_upper_ = system.lower, system.upper
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.append(0, np.cumsum(np.bincount(system.at, minlength=rows))).astype(np.int32)
    model.a_matrix_.index_ = system.column.astype(np.int32)
    model.a_matrix_.value_ = system.value
    solver: Any = highspy._Highs()  # type: ignore[attr-defined]
    for name, value in (("output_flag", False), ("threads", 1), ("solver", "simplex"), ("presolve", "off")):
        solver.setOptionValue(name, value)
    solver.passModel(model)
    return solver
