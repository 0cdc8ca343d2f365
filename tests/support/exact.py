"""Exact truth for small ReLU networks by mixed-integer programming (HiGHS through scipy).

Every ReLU that its interval leaves undecided gets a binary variable and the usual big-M rows; affine layers become
equalities. Nothing here shares code with the verifier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from tests.support.networks import Dag


@dataclass(frozen=True)
class Minimum:
    """Least value of a linear function of the outputs over a box.

    Attributes:
        bound: proved by the solver, up to its tolerance of about 1e-6: no point has a smaller value.
        value: attained at ``point``, evaluated by the network in float64; bound <= value up to the tolerance.
        point: float64 (*input_shape), inside the box.
    """

    bound: float
    value: float
    point: np.ndarray


def exact_min(network: Dag, lower: Tensor, upper: Tensor, row: np.ndarray | Tensor, seconds: float = 60.0) -> Minimum:
    """Minimise ``row . network(x)`` over ``lower <= x <= upper``.

    Args:
        network: float32 or float64; taken as exact real arithmetic on its stored parameters.
        lower, upper: (*input_shape).
        row: (n_out,).
        seconds: raises TimeoutError when this does not suffice.
    """
    exact = _double(network)
    row = np.asarray(row, dtype=np.float64)
    model = _Model()
    shapes = exact.shapes
    sizes = [int(np.prod(s)) for s in shapes]
    low = [lower.double().numpy().ravel()]
    high = [upper.double().numpy().ravel()]
    columns = [model.variables(low[0], high[0])]
    for step, shape in zip(exact.steps, [shapes[s.inputs[0]] for s in exact.steps], strict=True):
        i = step.inputs[0]
        if step.kind == "affine":
            weight, bias = affine_matrix(exact.parts[step.module], shape)
            lo = np.clip(weight, 0, None) @ low[i] + np.clip(weight, None, 0) @ high[i] + bias
            hi = np.clip(weight, 0, None) @ high[i] + np.clip(weight, None, 0) @ low[i] + bias
            out = model.variables(*_widen(lo, hi))
            model.equal([(columns[i], weight), (out, -np.eye(len(out)))], -bias)
        elif step.kind == "relu":
            lo, hi = np.maximum(low[i], 0), np.maximum(high[i], 0)
            out = model.relu(columns[i], low[i], high[i])
        else:
            j = step.inputs[1]
            lo, hi = low[i] + low[j], high[i] + high[j]
            eye = np.eye(sizes[i])
            out = model.variables(*_widen(lo, hi))
            model.equal([(columns[i], eye), (columns[j], eye), (out, -eye)], np.zeros(sizes[i]))
        columns.append(out)
        low.append(lo)
        high.append(hi)
    bound, x = model.minimise(columns[-1], row, seconds)
    point = np.clip(x[columns[0]], low[0], high[0]).reshape(network.input_shape)
    with torch.no_grad():
        value = float(exact(torch.from_numpy(point)[None]).flatten().numpy() @ row)
    return Minimum(bound, value, point)


def affine_matrix(module: torch.nn.Module, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Weight (n_out, n_in) and bias (n_out,) of an affine float64 module, read off by applying it to unit vectors."""
    n = int(np.prod(input_shape))
    with torch.no_grad():
        bias = module(torch.zeros(1, *input_shape, dtype=torch.float64)).flatten()
        images = module(torch.eye(n, dtype=torch.float64).reshape(n, *input_shape)).flatten(1)
    return (images - bias).T.numpy(), bias.numpy()


def _double(network: Dag) -> Dag:
    """A float64 copy; the original is left alone."""
    import copy

    return copy.deepcopy(network).double()


def _widen(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Room for the rounding of the interval arithmetic, so that no row becomes infeasible by 1e-16."""
    slack = 1e-7 * (1 + np.maximum(np.abs(lower), np.abs(upper)))
    return lower - slack, upper + slack


class _Model:
    """Variables and rows of a MILP, collected."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self.high: list[float] = []
        self.integer: list[int] = []
        self.entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.row_low: list[np.ndarray] = []
        self.row_high: list[np.ndarray] = []
        self.rows = 0

    def variables(self, lower: np.ndarray, upper: np.ndarray, integer: int = 0) -> np.ndarray:
        """New variables within bounds; their column numbers."""
        start = len(self.low)
        self.low.extend(lower)
        self.high.extend(upper)
        self.integer.extend([integer] * len(lower))
        return np.arange(start, len(self.low))

    def equal(self, terms: list[tuple[np.ndarray, np.ndarray]], value: np.ndarray) -> None:
        """sum of matrix @ variables == value."""
        self._rows(terms, value, value)

    def relu(self, x: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
        """Columns of max(x, 0)."""
        y = self.variables(np.maximum(lower, 0), _widen(lower, np.maximum(upper, 0))[1])
        on, off = np.flatnonzero(lower >= 0), np.flatnonzero((upper <= 0) & (lower < 0))
        mixed = np.flatnonzero((lower < 0) & (upper > 0))
        self._rows([(x[on], np.eye(len(on))), (y[on], -np.eye(len(on)))], np.zeros(len(on)), np.zeros(len(on)))
        for k in off:
            self.high[y[k]] = 0.0
        if len(mixed):
            eye, infinite = np.eye(len(mixed)), np.full(len(mixed), np.inf)
            lo, hi = _widen(lower[mixed], upper[mixed])
            a = self.variables(np.zeros(len(mixed)), np.ones(len(mixed)), integer=1)
            self._rows([(y[mixed], eye), (x[mixed], -eye)], np.zeros(len(mixed)), infinite)  # y >= x
            self._rows([(y[mixed], eye), (a, -np.diag(hi))], -infinite, np.zeros(len(mixed)))  # y <= u a
            self._rows([(y[mixed], eye), (x[mixed], -eye), (a, -np.diag(lo))], -infinite, -lo)  # y <= x - l (1 - a)
        return y

    def _rows(self, terms: list[tuple[np.ndarray, np.ndarray]], low: np.ndarray, high: np.ndarray) -> None:
        for columns, matrix in terms:
            r, c = np.nonzero(matrix)
            self.entries.append((r + self.rows, columns[c], matrix[r, c]))
        self.row_low.append(low)
        self.row_high.append(high)
        self.rows += len(low)

    def minimise(self, columns: np.ndarray, row: np.ndarray, seconds: float) -> tuple[float, np.ndarray]:
        """Proved lower bound and the best point."""
        cost = np.zeros(len(self.low))
        cost[columns] = row
        r, c, v = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        matrix = coo_array((v, (r, c)), shape=(self.rows, len(self.low))).tocsc()
        result = milp(
            cost,
            integrality=np.array(self.integer),
            bounds=Bounds(np.array(self.low), np.array(self.high)),
            constraints=LinearConstraint(matrix, np.concatenate(self.row_low), np.concatenate(self.row_high)),
            options={"time_limit": seconds, "mip_rel_gap": 1e-9},
        )
        if result.status == 1 or result.x is None:
            raise TimeoutError(f"the MILP was not solved in {seconds:g} s: {result.message}")
        bound = result.fun if result.mip_dual_bound is None else result.mip_dual_bound  # a plain LP has none
        return float(bound), result.x
