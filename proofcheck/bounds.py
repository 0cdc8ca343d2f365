"""Bounds of tensors on boxes: intervals forward, linear bounds (CROWN) backward.

Zhang et al., Efficient neural network robustness certification with general activation functions, NeurIPS 2018. A row
is moved from the tensors where it starts back to the input; at a nonlinear step, positive coefficients take the line
below and negative ones the line above, as the row is bounded from below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proofcheck.arithmetic import _TINY, _U, Exact, ExactTotal, Float, FloatTotal, dyadic
from proofcheck.failures import Refused, require
from proofcheck.network import Affine, Network, Product, Unary
from proofcheck.relaxation import default_slopes, image, intercepts

Interval = tuple[np.ndarray, np.ndarray]
Slopes = Callable[[str, np.ndarray, np.ndarray], Interval | None]


@dataclass
class Table:
    """What is known of every tensor on a box: intervals (1, n) in float64, which only ever become narrower.

    Boxes of parts are (B, n). `magnitudes` are what rounding errors are measured with.
    """

    network: Network
    known: dict[str, Interval] = field(default_factory=dict)
    _reach: dict[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)

    def magnitude(self, name: str) -> np.ndarray:
        """(n,) bounds of the absolute values."""
        low, up = self.known[name]
        return np.maximum(np.abs(low), np.abs(up))[0]

    def largest(self) -> float:
        return max(float(self.magnitude(n).max(initial=0.0)) for n in self.known)

    def tighten(self, name: str, low: np.ndarray, up: np.ndarray) -> None:
        """Intersect a tensor's interval with another one, (n,) or (1, n); NaN is refused, crossing bounds are not: they
        say that the box has no point, which only a wrong claim or an empty box can bring about."""
        low, up = np.atleast_2d(low), np.atleast_2d(up)
        if name in self.known:
            low, up = np.maximum(low, self.known[name][0]), np.minimum(up, self.known[name][1])
        require((low <= up).all(), f"bounds of {name!r}: a lower one is not below the upper one")
        self.known[name] = (low, up)
        self._reach.clear()

    def reach(self, step: Affine) -> tuple[np.ndarray, np.ndarray | None]:
        """(n_out,) what u |row| is multiplied with for the rounding errors of a step; and what `loose` costs."""
        if step.out not in self._reach:
            self._reach[step.out] = self._reached(step)
        return self._reach[step.out]

    def _reached(self, step: Affine) -> tuple[np.ndarray, np.ndarray | None]:
        size = self.network.sizes[step.out]
        rounded, total = np.zeros(size), np.zeros(size)
        for name, m in step.terms:
            part = m.apply(None if m.weight is None else np.abs(m.weight), self.magnitude(name)[None])[0]
            rounded, total = rounded + m.terms * part, total + part
        if step.bias is not None:
            total = total + np.abs(step.bias)
        return rounded, 1.05 * step.loose * total if step.loose else None


def intervals(ar: Any, table: Table, box: dict[str, Interval], upto: int) -> dict[str, Interval]:
    """Intervals (B, n) of all tensors up to a step, from those of the input and, where `box` has them, of others;
    intersected with the table."""
    found = dict(box)
    for step in table.network.steps[: upto + 1]:
        if isinstance(step, Affine):
            low, up = _affine(ar, table, step, found)
        elif isinstance(step, Unary):
            low, up = image(ar, step, *found[step.source])
        else:
            low, up = _product(found[step.left], found[step.right])
        for other in (table.known.get(step.out), box.get(step.out)):
            if other is not None:
                low, up = np.maximum(low, other[0]), np.minimum(up, other[1])
        found[step.out] = (low, up)
    return found


def _affine(ar: Any, table: Table, step: Affine, found: dict[str, Interval]) -> Interval:
    """M c - |M| r, M c + |M| r for an interval c - r, c + r."""
    if ar.exact:
        return _exact_affine(ar, table, step, found)
    centre = radius = error = np.zeros(1)
    for name, m in step.terms:
        low, up = found[name]
        c = 0.5 * low + 0.5 * up
        r = np.maximum(up - c, c - low) * (1.0 + 2.0**-51) + _TINY
        w = None if m.weight is None else np.abs(m.weight)
        centre, radius = centre + m.apply(m.weight, c), radius + m.apply(w, r)
        error = error + (m.terms + len(step.terms) + 4) * m.apply(w, np.abs(c) + r)
    total = np.abs(radius) + np.abs(centre)
    if step.bias is not None:
        centre, error = centre + step.bias, error + 2.0 * np.abs(step.bias)
    error = _U * (error + 8.0 * total) + _TINY
    loose = table.reach(step)[1] if step.loose else None
    radius = radius + (error if loose is None else error + loose)
    return np.nextafter(centre - radius, -np.inf), np.nextafter(centre + radius, np.inf)


def _exact_affine(ar: Exact, table: Table, step: Affine, found: dict[str, Interval]) -> Interval:
    centre = radius = dyadic(np.zeros(1))
    for name, m in step.terms:
        low, up = dyadic(found[name][0]), dyadic(found[name][1])
        for x, absolute in ((up + low, False), (up - low, True)):  # twice the centre and the radius
            w = ar.weight(m)
            part = m.apply(None if w is None else np.abs(w.n) if absolute else w.n, x.n)
            part = type(x)(part, x.e + (0 if w is None else w.e) - 1)
            centre, radius = (centre, radius + part) if absolute else (centre + part, radius)
    if step.bias is not None:
        centre = centre + dyadic(step.bias)
    loose = table.reach(step)[1] if step.loose else None
    radius = radius if loose is None else radius + dyadic(loose)
    return (centre - radius).floats(-1), (centre + radius).floats(1)


def _product(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a for y in b]
    low, up = np.minimum.reduce(corners), np.maximum.reduce(corners)
    return np.nextafter(low, -np.inf) - _TINY, np.nextafter(up, np.inf) + _TINY


def linear_bounds(
    ar: Any,
    table: Table,
    bounds: dict[str, Interval],
    rows: dict[str, Any],
    constant: Any,
    slopes: Slopes,
) -> FloatTotal | ExactTotal:
    """Lower bounds of rows over boxes.

    Args:
        bounds: intervals (B, n) or (1, n) of the input and of what nonlinear steps read.
        rows: coefficients (B, r, n) of every tensor in which the rows start. constant: (B, r).
        slopes: of a unary step, given its tensor and its interval (B, 1, n): below and above, broadcastable to
            (B, r, n), or None for the default ones.
    """
    network, rows = table.network, dict(rows)
    shape = next(iter(rows.values())).shape[:2]
    total = (ExactTotal if ar.exact else FloatTotal)(shape, table.largest())
    total.add(constant)

    def push(name: str, part: Any) -> None:
        if name in rows:
            part = rows[name] + part
            total.rounded(part, table.magnitude(name))
        rows[name] = part

    for step in reversed(network.steps[: max(network.place[n] for n in rows) + 1]):
        if step.out not in rows:
            continue
        a = rows.pop(step.out)
        if isinstance(step, Affine):
            reach, loose = table.reach(step)
            total.rounded(a, reach)
            if loose is not None:
                total.lose(a, loose)
            if step.bias is not None:
                bias = ar.of(step.bias)
                total.dot(a, bias, bias)
            for name, m in step.terms:
                push(name, ar.back(m, a))
        elif isinstance(step, Unary):
            l, u = (x[:, None, :] for x in bounds[step.source])
            low, up = slopes(step.source, l, u) or default_slopes(step, l, u)
            total.dot(a, *intercepts(ar, step, l, u, low, up))
            part = ar.mix(a, ar.of(low), ar.of(up))
            total.rounded(part, table.magnitude(step.source))
            push(step.source, part)
        else:
            for name, part in _mccormick(ar, table, bounds, step, a, total):
                push(name, part)
    if network.input in rows:
        low, up = (ar.of(x[:, None, :]) for x in bounds[network.input])
        total.dot(rows[network.input], low, up)
    return total


def _mccormick(ar: Any, table: Table, bounds: dict[str, Interval], step: Product, a: Any, total: Any) -> list:
    """x y >= ly x + lx y - lx ly and x y <= uy x + lx y - lx uy."""
    (lx, _), (ly, uy) = ((x[:, None, :] for x in bounds[n]) for n in (step.left, step.right))
    parts = [(step.left, ar.mix(a, ar.of(ly), ar.of(uy))), (step.right, ar.mix(a, ar.of(lx), ar.of(lx)))]
    for name, part in parts:
        total.rounded(part, table.magnitude(name))
    zero = ar.of(np.zeros(1))
    below, above = ar.of(lx) * ar.of(ly), ar.of(lx) * ar.of(uy)
    if not ar.exact:  # each product is off by at most half a unit in the last place
        below, above = np.nextafter(below, np.inf) + _TINY, np.nextafter(above, -np.inf) - _TINY
    total.dot(a, zero - below, zero - above)
    return parts


def default(name: str, l: np.ndarray, u: np.ndarray) -> None:
    """Slopes by the rule."""
    return


__all__ = ["Exact", "Float", "Interval", "Refused", "Table", "default", "intervals", "linear_bounds"]
