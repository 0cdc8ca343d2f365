"""Bounds of tensors on boxes: intervals and linear functions forward, rows (CROWN) backward.

Zhang et al., Efficient neural network robustness certification with general activation functions, NeurIPS 2018. A row
is moved from the tensors where it starts back to the input; at a nonlinear step, positive coefficients take the line
below and negative ones the line above, as the row is bounded from below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from proofcheck.arithmetic import _TINY, _U, Dyadic, Exact, ExactTotal, FloatTotal, dyadic
from proofcheck.network import Affine, Network, Unary
from proofcheck.relaxation import default_slopes, image, intercepts

Interval = tuple[np.ndarray, np.ndarray]  # (B, n) each
Slopes = Callable[[Unary, np.ndarray, np.ndarray], Interval]
Hook = Callable[[Any, dict[str, Interval]], Interval]


class Sizes:
    """Magnitudes of all tensors on a set of boxes, with which rounding errors of rows are measured.

    Args:
        bounds: intervals of all tensors.
    """

    def __init__(self, network: Network, bounds: dict[str, Interval]) -> None:
        self.network = network
        self.of = {n: np.maximum(np.abs(low), np.abs(up)).max(0) for n, (low, up) in bounds.items()}
        self.largest = max(float(m.max()) for m in self.of.values())
        self._reach: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def reach(self, step: Affine) -> tuple[np.ndarray, np.ndarray | None]:
        """(n_out,) what u |row| is multiplied with for the rounding errors of a step; and what `loose` costs."""
        if step.out not in self._reach:
            rounded, total = np.zeros(self.network.sizes[step.out]), np.zeros(self.network.sizes[step.out])
            for name, m in step.terms:
                part = m.apply(_absolute(m), self.of[name][None])[0]
                rounded, total = rounded + m.terms * part, total + part
            total = total if step.bias is None else total + np.abs(step.bias)
            self._reach[step.out] = (rounded, 1.05 * step.loose * total if step.loose else None)
        return self._reach[step.out]


def _absolute(m: Any) -> np.ndarray | None:
    return None if m.weight is None else np.abs(m.weight)


def intervals(
    ar: Any, network: Network, given: dict[str, Interval], upto: str | None = None, hook: Hook | None = None
) -> dict[str, Interval]:
    """Intervals of all tensors, or of those before and including `upto`.

    Args:
        given: of the input and of other tensors, for which nothing is computed.
        hook: called after every step that is not given with what is known; returns the interval to go on with.
    """
    found = dict(given)
    for step in network.steps:
        if step.out not in given:
            if isinstance(step, Unary):
                found[step.out] = image(ar, step, *found[step.source])
            else:
                found[step.out] = (_exact_affine if ar.exact else _affine)(ar, step, found)
                if step.out in network.tangled:
                    found[step.out] = by_rows(ar, network, found, step.out, None, stop=True)
            if hook:
                found[step.out] = hook(step, found)
        if step.out == upto:
            break
    return found


def _affine(ar: Any, step: Affine, found: dict[str, Interval]) -> Interval:
    """M c - |M| r, M c + |M| r for an interval c - r, c + r."""
    centre = radius = error = total = np.zeros(1)
    for name, m in step.terms:
        low, up = found[name]
        c = 0.5 * low + 0.5 * up
        r = np.maximum(up - c, c - low) * (1.0 + 2.0**-51) + _TINY
        centre, radius = centre + m.apply(m.weight, c), radius + m.apply(_absolute(m), r)
        part = m.apply(_absolute(m), np.abs(c) + r)
        error, total = error + (m.terms + 2.0 * len(step.terms) + 4.0) * part, total + part
    if step.bias is not None:
        centre, total = centre + step.bias, total + np.abs(step.bias)
    radius = radius + _U * (error + 8.0 * total) + 1.05 * step.loose * total + _TINY
    return np.nextafter(centre - radius, -np.inf), np.nextafter(centre + radius, np.inf)


def _exact_affine(ar: Exact, step: Affine, found: dict[str, Interval]) -> Interval:
    centre = radius = total = dyadic(np.zeros(1))
    for name, m in step.terms:
        low, up = (dyadic(x) for x in found[name])
        centre, radius = centre + ar.apply(m, up + low, False), radius + ar.apply(m, up - low, True)
        total = total + (ar.apply(m, abs(up + low) + (up - low), True) if step.loose else total)
    if step.bias is not None:
        centre, total = centre + dyadic(2.0 * step.bias), total + dyadic(2.0 * np.abs(step.bias))
    radius = radius + dyadic(np.array([step.loose])) * total
    return Dyadic((centre - radius).n, (centre - radius).e - 1).floats(-1), Dyadic(
        (centre + radius).n, (centre + radius).e - 1).floats(1)  # fmt: skip


def by_rows(
    ar: Any, network: Network, found: dict[str, Interval], name: str, which: np.ndarray | None, stop: bool = False
) -> Interval:
    """The interval of a tensor, narrowed by rows with default slopes for some elements or all of them.

    Args:
        stop: end rows at the outputs of nonlinear steps, with their intervals: intervals of functions that are affine.
    """
    low, up = (x.copy() for x in found[name])
    which = np.arange(low.shape[1]) if which is None else which
    known = {n: found[n] for n in (network.input, *(s.out for s in network.steps)) if n in found}
    sizes = Sizes(network, known)
    for first in range(0, which.size, 256):
        part = which[first : first + 256]
        for sign, bound, better in ((1.0, low, np.fmax), (-1.0, up, np.fmin)):
            start = np.zeros((1, part.size, low.shape[1]))
            start[0, np.arange(part.size), part] = sign
            start = np.broadcast_to(start, (low.shape[0], *start.shape[1:]))
            total = new_total(ar, sizes, start.shape[:2])
            linear_bounds(ar, sizes, found, {name: ar.of(start)}, total, default_slopes, stop)
            bound[:, part] = better(bound[:, part], sign * total.lower())
    return low, up


def unstable(ar: Any, network: Network) -> Hook:
    """A hook: what nonlinear steps read is narrowed by rows where its interval has a zero inside, on some box."""

    def hook(step: Any, found: dict[str, Interval]) -> Interval:
        low, up = found[step.out]
        open_ = np.flatnonzero(((low < 0) & (up > 0)).any(0))
        if step.out not in network.curved or not open_.size:
            return low, up
        better, free = by_rows(ar, network, found, step.out, open_), (low < 0) & (up > 0)
        # Bounds of a box must not depend on the others of its batch: what is stable on it stays as it is.
        return np.where(free, better[0], low), np.where(free, better[1], up)

    return hook


class Forward:
    """A hook: every value is a linear function of the input plus an interval.

    value = C (x - centre of the box) + m, up to r; |x - centre| <= `radius`. Arrays are (B, inputs, n), (B, n), (B, n).
    A nonlinear step becomes the band between two lines of the same slope.
    """

    def __init__(self, ar: Any, network: Network, low: np.ndarray, up: np.ndarray) -> None:
        self.ar, centre = ar, 0.5 * low + 0.5 * up
        self.radius = np.nextafter(np.maximum(up - centre, centre - low), np.inf)[:, :, None]
        one = np.broadcast_to(np.eye(low.shape[1]), (low.shape[0], low.shape[1], low.shape[1]))
        c = ar.of(one)
        self.values = {network.input: (c, ar.of(centre), ar.of(np.zeros_like(centre)), self._reach(c))}

    def __call__(self, step: Any, found: dict[str, Interval]) -> Interval:
        c, m, r = self._affine(step) if isinstance(step, Affine) else self._unary(step, found)
        reach = self._reach(c)
        self.values[step.out], spread = (c, m, r, reach), r + reach
        low, up = found[step.out]
        if self.ar.exact:
            return np.maximum(low, (m - spread).floats(-1)), np.minimum(up, (m + spread).floats(1))
        spread = spread + 2.0**-51 * (np.abs(m) + spread)
        return np.fmax(low, m - spread), np.fmin(up, m + spread)

    def _reach(self, c: Any) -> Any:
        """|C| radius, rounded up."""
        if self.ar.exact:
            products = abs(c) * dyadic(self.radius)
            return Dyadic(products.n.sum(1), products.e)
        return (self.radius.swapaxes(1, 2) @ np.abs(c))[:, 0] * (1.0 + 2.0 * _U * (c.shape[1] + 2)) + _TINY

    def _affine(self, step: Affine) -> tuple[Any, Any, Any]:
        ar, parts = self.ar, []
        for name, w in step.terms:
            c, m, r, reach = self.values[name]
            all_of = abs(m) + r + reach
            parts.append(
                (ar.apply(w, c, False), ar.apply(w, m, False), ar.apply(w, r, True), ar.apply(w, all_of, True))
            )
        c, m, r, total = (sum(x[1:], x[0]) for x in map(list, zip(*parts, strict=True)))
        if step.bias is not None:
            m, total = m + ar.of(step.bias), total + ar.of(np.abs(step.bias))
        rounded = 0.0 if ar.exact else _U * (max(w.terms for _, w in step.terms) + 3 * len(parts) + 8)
        return (
            c,
            m,
            r + ar.of(np.array([rounded + 1.05 * step.loose])) * total + ar.of(np.array([_TINY * (not ar.exact)])),
        )

    def _unary(self, step: Unary, found: dict[str, Interval]) -> tuple[Any, Any, Any]:
        ar, (c, m, r, reach), (low, up) = self.ar, self.values[step.source], found[step.source]
        slope = default_slopes(step, low, up)[1]
        below, above = intercepts(ar, step, low, up, slope, slope)
        s, half = ar.of(slope), ar.of(np.array([0.5]))
        spread = (above - below) * half
        made = Dyadic(s.n[:, None], s.e) if ar.exact else s[:, None]
        new, error = s * m + (above + below) * half, ar.of(np.zeros(1))
        if not ar.exact:
            error = 2.0**-49 * (np.abs(s) * (np.abs(m) + r + reach) + np.abs(above) + np.abs(below)) + _TINY
        return made * c, new, abs(s) * r + spread + error


def new_total(ar: Any, sizes: Sizes, shape: tuple[int, ...]) -> Any:
    """A total without constants."""
    return (ExactTotal if ar.exact else FloatTotal)(shape[:2], sizes.largest)


def linear_bounds(
    ar: Any,
    sizes: Sizes,
    bounds: dict[str, Interval],
    rows: dict[str, Any],
    total: Any,
    slopes: Slopes,
    stop: bool = False,
) -> Any:
    """Lower bounds of rows over boxes: `total`, completed.

    Args:
        sizes: of boxes that contain these.
        bounds: of the input and of what nonlinear steps read (or make, for `stop`).
        rows: coefficients (B, r, n) of every tensor in which the rows start. total: with the rows' constants.
        slopes: of a unary step, given the interval (B, 1, n) of what it reads: below and above, broadcastable to
            (B, r, n).
        stop: see :func:`by_rows`.
    """
    network, rows = sizes.network, dict(rows)

    def push(name: str, part: Any) -> None:
        if name in rows:
            part = rows[name] + part
            total.rounded(part, sizes.of[name])
        rows[name] = part

    for step in reversed(network.steps[: max(network.place[n] for n in rows) + 1]):
        if step.out not in rows:
            continue
        if isinstance(step, Unary) and stop:
            continue
        a = rows.pop(step.out)
        if isinstance(step, Affine):
            reach, loose = sizes.reach(step)
            total.rounded(a, reach)
            if loose is not None:
                total.lose(a, loose)
            if step.bias is not None:
                bias = ar.of(step.bias)
                total.dot(a, bias, bias)
            for name, m in step.terms:
                push(name, ar.back(m, a))
        else:
            l, u = (x[:, None, :] for x in bounds[step.source])
            low, up = slopes(step, l, u)
            total.dot(a, *intercepts(ar, step, l, u, low, up))
            part = ar.mix(a, ar.of(low), ar.of(up))
            total.rounded(part, sizes.of[step.source])
            push(step.source, part)
    for name, a in rows.items():
        low, up = (ar.of(x[:, None, :]) for x in bounds[name])
        total.dot(a, low, up)
    return total
