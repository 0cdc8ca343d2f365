"""The relaxation of one case as a linear program whose bounds say which neurons are split.

On the compact network (:mod:`verifier.bab.compact`) the program has a column for every free input, for every
pre-activation z_k and for every output h_k, and the rows

    z - W s - M h = b,      h_k - z_k >= 0,      h_k <= chord of the root's bounds,      rows of the case <= thresholds.

A split z_k >= 0 is the bounds z_k >= 0 and h_k - z_k <= 0; a split z_k <= 0 is z_k <= 0 and h_k <= 0. So the matrix
stays as it is, and the dual simplex method goes on from where it was. Where there is no point, the multipliers of its
proof tell which splits it needs. The solver works with tolerances, so that they are no more than a proposal. These are
absolute, and networks may be scaled in any way: every neuron is therefore measured in a unit of its own, the power of
two next to its range, and so is every row of the case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from verifier.bab.compact import Compact
from verifier.bab.learning.elastic import Elastic
from verifier.bab.learning.programs import Program, solver_of

# Multipliers of a ray, whose largest is 1, that count as none.
_SMALL = 1e-9
# Rows that are violated but for so much, relative to their constants: the program knows no better.
_NEARLY = 1e-5
# Of a neuron's chord above its ReLU, relative to the width of its bounds: what counts as none.
_FLAT = 1e-4
# What splits and rows are violated by in sum, up to which the program counts as having a point.
_NOTHING = 1e-7


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
    """What the program says of a domain; nothing: the solver gave up.

    Attributes:
        refuted: how, where there is no point.
        point: (n,) scaled free inputs in [-1, 1] of a point of the relaxation.
        z: (U,) pre-activations there.
    """

    refuted: Multipliers | None = None
    point: np.ndarray | None = None
    z: np.ndarray | None = None


class Relaxation:
    """The program of one case, and the domain that it is set to.

    Args:
        net: the compact network; ``first``, ``count``: which of its rows are the case's.

    Attributes:
        bent: neurons that splitting matters for: the chord of the others is their ReLU, nearly.
        work: iterations of the simplex method so far; every solve counts as some.
    """

    def __init__(self, net: Compact, first: int, count: int) -> None:
        self._net = _Net.of(net, slice(first, first + count))
        self.places, self.rows = self._net.places, count
        self.inputs, self.columns = self._net.input_weight.shape[1], net.size
        self.system = _system(self._net)
        self._z = self.inputs + self.places
        self._h = self._z + self.columns
        self._tie = self.columns + self.places  # rows h - z
        self._signs = np.zeros(len(self.places), dtype=np.int8)
        low = np.full(self.system.columns, -np.inf)
        high = np.full(self.system.columns, np.inf)
        low[: self.inputs], high[: self.inputs] = -1.0, 1.0
        low[self._h] = 0.0
        self._solver = solver_of(self.system, (low, high))
        self.box, self.sides = (low, high), (self.system.lower, self.system.upper)
        self._elastic: Elastic | None = None
        self.work = 0
        slope = self._net.slope[self.places]  # u / (u - l); the chord is at most -l u / (u - l) above the ReLU
        self.bent = np.flatnonzero(slope * (1 - slope) > _FLAT)

    @property
    def numbers(self) -> int:
        """Entries of the program's matrix."""
        return len(self.system.value)

    def check(self, signs: np.ndarray, seconds: float) -> Checked:
        """Whether a domain, given by signs (U,) of its splits, has a point.

        Args:
            seconds: for the solver.
        """
        self._move(signs)
        return self._solve(seconds) or self._violation(seconds) or Checked()

    def _violation(self, seconds: float) -> Checked | None:
        """What the least violation says where the solver gives up."""
        if self._elastic is None:
            box = self.box[0].copy(), self.box[1].copy()
            box[0][self._z], box[1][self._z], box[1][self._h] = -np.inf, np.inf, np.inf
            upper = self.system.upper.copy()
            upper[self._tie] = np.inf
            program = replace(self.system, upper=upper)
            self._elastic = Elastic(program, box, self._z, self._h, self._tie, self.rows)
        found = self._elastic.solve(self._signs, seconds)
        if found is None:
            self.work += 10
            return None
        total, values, y, iterations = found
        self.work += iterations + 10
        return Checked(self._multipliers(y)) if total > _NOTHING else self._point(values)

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

    def violates(self, point: np.ndarray) -> bool:
        """Whether scaled free inputs (n,) violate all rows of the case, or nearly so."""
        net, h = self._net, np.zeros(self.columns)
        z = net.bias.copy()
        z[net.entry] += net.input_weight @ point
        for columns, sources, weight in net.layers:
            z[columns] += weight @ h[sources]
            h[columns] = np.where(net.kept[columns], z[columns], np.maximum(z[columns], 0.0))
        slack = net.row_constant + net.rows @ h + net.row_input @ point
        return bool((slack <= _NEARLY * (1 + np.abs(net.row_constant))).all())

    def _point(self, values: np.ndarray) -> Checked:
        return Checked(None, values[: self.inputs], values[self._z])

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
        rows = np.where(rows > _SMALL, rows, 0.0) / self._net.row_units
        return Multipliers(rows, alpha, np.where(used, beta, 0.0) / self._net.units[self.places], used)

    def _oriented(self, ray: np.ndarray) -> np.ndarray:
        """The ray with the sign, and scaled to the size, of a proof."""
        size = np.abs(ray).max(initial=0.0)
        y = ray / size if size > 0 else ray
        return y if self._proves(y) >= self._proves(-y) else -y

    def _proves(self, y: np.ndarray) -> float:
        """By how much sum of y (row - side) exceeds what columns can give; positive for a proof."""
        return _least(y, *self.sides) + _least(-self.system.transposed(y), *self.box)


def _least(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Least value of weights . v over a box; tiny weights of infinite sides count for nothing."""
    side = np.where(weights > 0, low, high)
    side = np.where(np.isinf(side) & (np.abs(weights) <= 1e-7), 0.0, side)
    return float(np.where(weights == 0, 0.0, weights * np.where(weights == 0, 0.0, side)).sum())


@dataclass(frozen=True)
class _Net:
    """A compact network and the rows of one case, float64, in units of their own.

    Attributes:
        layers: columns, the columns that feed them, and the weights between.
        units: (T,) of the columns; a value of the network is so many times the one here.
        row_units: (S,) of the case's rows.
    """

    layers: tuple[tuple[slice, slice, np.ndarray], ...]
    places: np.ndarray
    kept: np.ndarray
    bias: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    entry: slice
    input_weight: np.ndarray
    rows: np.ndarray
    row_input: np.ndarray
    row_constant: np.ndarray
    units: np.ndarray
    row_units: np.ndarray

    @classmethod
    def of(cls, net: Compact, rows: slice) -> _Net:
        def array(value: Tensor) -> np.ndarray:
            return value.double().cpu().numpy()

        layers = tuple((layer.columns, layer.sources, array(layer.weight)) for layer in net.layers)
        weight, constant, bias = array(net.input_weight), array(net.row_constant[rows]), array(net.bias)
        row_input = np.zeros((len(constant), weight.shape[1]))
        row_input = row_input if net.row_input is None else array(net.row_input[rows])
        slope, intercept = array(net.slope), array(net.intercept)
        units = _powers(_reach(layers, bias, slope, intercept, net.entry, weight))
        outputs = array(net.rows[rows]) * units
        row_units = _powers(np.maximum(np.abs(outputs).max(1, initial=0.0), np.abs(row_input).max(1, initial=0.0)))
        return cls(
            tuple((to, of, part * units[of] / units[to, None]) for to, of, part in layers),
            net.places.cpu().numpy(),
            net.kept.cpu().numpy().astype(bool),
            bias / units,
            slope,
            intercept / units,
            net.entry,
            weight / units[net.entry, None],
            outputs / row_units[:, None],
            row_input / row_units[:, None],
            constant / row_units,
            units,
            row_units,
        )


def _reach(
    layers: tuple[tuple[slice, slice, np.ndarray], ...],
    bias: np.ndarray,
    slope: np.ndarray,
    intercept: np.ndarray,
    entry: slice,
    weight: np.ndarray,
) -> np.ndarray:
    """(T,) sizes that values of the columns hardly exceed: their bounds where a chord tells them, else sums."""
    reach = np.abs(bias)
    reach[entry] += np.abs(weight).sum(1)
    bent = (slope > 0) & (slope < 1) & (intercept > 0)
    known = np.full_like(reach, np.inf)
    known[bent] = intercept[bent] / np.minimum(slope[bent], 1 - slope[bent])  # the larger one of -l and u
    for columns, sources, part in layers:
        reach[sources] = np.minimum(reach[sources], known[sources])
        reach[columns] += np.abs(part) @ reach[sources]
    return np.minimum(reach, known)


def _powers(sizes: np.ndarray) -> np.ndarray:
    """The powers of two next to some sizes; 1 for none."""
    return np.exp2(np.round(np.log2(np.where((sizes > 0) & np.isfinite(sizes), sizes, 1.0))))


def _system(net: _Net) -> Program:
    """The rows: pre-activations, outputs less pre-activations, chords, and the case's own."""
    n, t, places, count = net.input_weight.shape[1], len(net.bias), net.places, len(net.rows)
    affine = np.zeros((t, n + 2 * t))
    affine[:, n : n + t] = np.eye(t)
    affine[net.entry, :n] = -net.input_weight
    for columns, sources, weight in net.layers:
        affine[columns, n + t + sources.start : n + t + sources.stop] = -weight
    tie = np.zeros((t, n + 2 * t))
    tie[:, n : n + t], tie[:, n + t :] = -np.eye(t), np.eye(t)
    rows = np.zeros((count, n + 2 * t))
    rows[:, :n], rows[:, n + t :] = net.row_input, net.rows
    # An output that only ever enters with a positive sign gains nothing from being large.
    above = places[(affine[:, n + t + places] != 0).any(0) | (rows[:, n + t + places] < 0).any(0)]
    chord, here = np.zeros((len(above), n + 2 * t)), np.arange(len(above))
    chord[here, n + t + above], chord[here, n + above] = 1.0, -net.slope[above]
    lower = np.concatenate([net.bias, np.zeros(t), np.full(len(above) + count, -np.inf)])
    upper = (net.bias, np.where(net.kept, 0.0, np.inf), net.intercept[above], -net.row_constant)
    return Program.of(np.concatenate([affine, tie, chord, rows]), lower, np.concatenate(upper))
