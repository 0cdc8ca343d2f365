"""Plain ReLU networks, whose least values are found by mixed-integer programs and made exact at a vertex."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Layers = Sequence[tuple[np.ndarray, np.ndarray]]
_SECONDS = 2.0
_NEAR = 1e-6  # a pre-activation or a bound counts as met


def least(layers: Layers, row: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """A point of the box, doubles (n,), where ``row . y`` is least; None when the program has no answer in time.

    Args:
        layers: weights (m, n) and biases (m,); a ReLU behind each but the last.
        row: (m,) over the last layer.
    """
    x = _program(layers, row, low, high)
    if x is None:
        return None
    better = _vertex(layers, x, low, high)
    found = [p for p in (x, better) if p is not None]
    return min(found, key=lambda p: value(layers, row, p))


def value(layers: Layers, row: np.ndarray, x: np.ndarray) -> Fraction:
    """``row . y`` at a point of doubles, exactly."""
    a = [Fraction(float(v)) for v in x]
    for k, (w, b) in enumerate(layers):
        z = [_sum(zip(r, a, strict=True)) + Fraction(c) for r, c in zip(w.tolist(), b.tolist(), strict=True)]
        a = z if k == len(layers) - 1 else [max(v, Fraction(0)) for v in z]
    return _sum(zip(row.tolist(), a, strict=True))


def _sum(pairs: object) -> Fraction:
    return sum((Fraction(u) * v for u, v in pairs if u), Fraction(0))  # type: ignore[attr-defined]


def _program(layers: Layers, row: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """Inputs, then an output and a phase for every ReLU, with constants from interval bounds."""
    widths = [w.shape[0] for w, _ in layers[:-1]]
    n, hidden = low.size, sum(widths)
    size = n + 2 * hidden
    matrix, most = [], []
    before, at, lo, hi = slice(0, n), n, low, high
    upper = np.concatenate([high, np.zeros(hidden), np.ones(hidden)])
    for w, b in layers[:-1]:
        w, b = w.astype(np.float64), b.astype(np.float64)
        middle, radius = w @ (lo + hi) / 2 + b, np.abs(w) @ (hi - lo) / 2 + 1e-9
        for k in range(w.shape[0]):
            l, u, out, phase = middle[k] - radius[k], middle[k] + radius[k], at + k, at + hidden + k
            upper[out] = max(u, 0.0)
            for signs in ((1, -1, 0.0, -b[k]), (-1, 1, -min(l, 0.0), b[k] - min(l, 0.0)), (0, 1, -max(u, 0.0), 0.0)):
                of_z, of_a, of_phase, limit = signs
                line = np.zeros(size)
                line[before], line[out], line[phase] = of_z * w[k], of_a, of_phase
                matrix.append(line)
                most.append(limit)
        before, lo, hi = slice(at, at + w.shape[0]), np.maximum(middle - radius, 0), np.maximum(middle + radius, 0)
        at += w.shape[0]
    cost = np.zeros(size)
    cost[before] = row @ layers[-1][0].astype(np.float64)
    whole = np.zeros(size)
    whole[n + hidden :] = 1
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(matrix), -np.inf, np.array(most)) if matrix else None,
        integrality=whole,
        bounds=Bounds(np.concatenate([low, np.zeros(2 * hidden)]), upper),
        options={"time_limit": _SECONDS},
    )
    return None if found.x is None else np.clip(found.x[:n], low, high)


def _vertex(layers: Layers, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The point where the pre-activations and bounds that x meets up to tolerances are met, to a double's accuracy."""
    n = x.size
    lines, values = [], []
    for i in range(n):
        for bound in (low[i], high[i]):
            if abs(x[i] - bound) < _NEAR:
                lines.append(np.eye(n)[i])
                values.append(bound)
    gradient, constant = np.eye(n), np.zeros(n)
    for w, b in layers[:-1]:
        gradient, constant = w.astype(np.float64) @ gradient, w.astype(np.float64) @ constant + b
        z = gradient @ x + constant
        for k in np.flatnonzero(np.abs(z) < _NEAR):
            lines.append(gradient[k])
            values.append(-constant[k])
        gradient, constant = gradient * (z > 0)[:, None], constant * (z > 0)
    if not lines:
        return None
    moved = np.linalg.lstsq(np.array(lines), np.array(values) - np.array(lines) @ x, rcond=1e-9)[0]
    return np.clip(x + moved, low, high)
