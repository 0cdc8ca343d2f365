"""Lines below and above nonlinear functions on intervals.

Slopes are proposals, from the proof or from a rule; every slope is valid, because the intercepts are computed here: the
least and the greatest value of f(x) - slope x on [l, u], rounded outward in float64, exact for piecewise linear f in
exact arithmetic. For those, extremes lie at l, u or at a knot between them.

Smooth functions are bounded in float64 in both modes. Where f is convex, the tangent of f(x) - slope x at any point p
is a lower bound, a tight one if p is close to the minimiser; where it is concave, the ends have the minimum. exp is
evaluated here, as numpy's has no guaranteed error; sigmoid and tanh follow from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from proofcheck.arithmetic import _TINY, Float, dyadic
from proofcheck.failures import NotCovered
from proofcheck.network import Unary

_GRID = 2.0**48  # slopes are multiples of 1 / _GRID, for short integers
_RELATIVE = 2.0**-45  # of the exponential function below
_TWO_F0 = {"sigmoid": 1.0, "tanh": 0.0}
_CONVEX = ("exp", "square", "reciprocal")


def snapped(slope: np.ndarray) -> np.ndarray:
    """Slopes with few bits; NaN becomes zero, as any slope is valid."""
    return np.nan_to_num(np.rint(np.clip(slope, -(2.0**40), 2.0**40) * _GRID) / _GRID, nan=0.0)


def default_slopes(step: Unary, l: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes below and above for functions on [l, u]: the chord on the side of curvature where it is valid, the longer
    piece (of a ReLU: 1 where u > -l) on the other; one slope for both sides of functions that bend both ways."""
    with np.errstate(all="ignore"):
        if step.function != "linear pieces":
            a, b = (_derivative(step.function, p)[0] for p in (l, u))
            chord = (_value(step.function, u)[0] - _value(step.function, l)[0]) / np.maximum(u - l, 1e-9)
            if step.function in _CONVEX:
                return snapped(_derivative(step.function, 0.5 * (l + u))[0]), snapped(chord)
            both = snapped(np.minimum(a, b))
            return both, both
        if is_relu(step):
            chord = np.where(l >= 0, 1.0, np.where(u <= 0, 0.0, snapped(np.clip(u / (u - l), 0.0, 1.0))))
            return (u > -l).astype(np.float64), chord
        knots, slopes = np.array(step.knots), np.array(step.slopes)
        first = slopes[(l[..., None] >= knots).sum(-1)]
        last = slopes[(u[..., None] > knots).sum(-1)]
        same = (l[..., None] >= knots).sum(-1) >= (u[..., None] > knots).sum(-1)
        chord = (_pieces(Float, step, u) - _pieces(Float, step, l)) / (u - l)
        chord = snapped(np.where(same, last, np.clip(chord, slopes.min(), slopes.max())))
        longer = np.where(same | (u - knots[0] > knots[0] - l), last, first)
        rises = np.diff(slopes)
        if (rises >= 0).all():
            return longer, chord
        return chord, longer if (rises <= 0).all() else chord


def is_relu(step: Unary) -> bool:
    return step.knots == (0.0,) and step.slopes == (0.0, 1.0)


def intercepts(ar: Any, step: Unary, l: np.ndarray, u: np.ndarray, low: np.ndarray, up: np.ndarray) -> tuple[Any, Any]:
    """b and t with low x + b <= f(x) <= up x + t on [l, u], as arrays of the arithmetic.

    For Float, |low|, |up| <= 2^40 are expected; what is not finite comes out as infinity or NaN.
    """
    with np.errstate(all="ignore"):
        if step.function != "linear pieces":
            return ar.of(_least(step.function, low, l, u)), ar.of(_greatest(step.function, up, l, u))
        if not ar.exact and is_relu(step) and _unit(low) and _unit(up):
            t = np.maximum(np.maximum(up * -l, (1.0 - up) * u), 0.0)  # at l, at u and at 0
            return np.zeros(1), t * (1.0 + 2.0**-50) + _TINY * ((l < 0) & (u > 0))
        b: Any = None
        t: Any = None
        for at in (l, u, *(np.clip(k, l, u) for k in step.knots)):
            p = ar.of(at)
            f = _pieces(ar, step, p)
            below, above = f - ar.of(low) * p, f - ar.of(up) * p
            b = below if b is None else ar.least(b, below)
            t = above if t is None else ar.most(t, above)
        if not ar.exact:  # every operation of _pieces and above is off by at most 2^-53 of `size`, and there are < 32
            steepest, farthest = max(map(abs, step.slopes)), max(map(abs, step.knots))
            size = (1.0 + steepest + np.abs(low) + np.abs(up)) * (np.maximum(np.abs(l), np.abs(u)) + farthest)
            size = 2.0**-48 * (size + abs(step.first)) + _TINY
            b, t = b - size, t + size
        return b, t


def _unit(x: np.ndarray) -> bool:
    return bool(((x >= 0) & (x <= 1)).all())


def _pieces(ar: Any, step: Unary, p: Any) -> Any:
    """A piecewise linear function, in arithmetic."""
    number = lambda x: ar.of(np.array([x]))  # noqa: E731
    knots, zero = step.knots, number(0.0)
    total = number(step.first) + number(step.slopes[0]) * ar.least(p - number(knots[0]), zero)
    for i, slope in enumerate(step.slopes[1:]):
        part = ar.most(p - number(knots[i]), zero)
        if i + 1 < len(knots):
            part = ar.least(part, number(knots[i + 1]) - number(knots[i]))
        total = total + number(slope) * part
    return total


def image(ar: Any, step: Unary, l: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of f on [l, u], rounded outward to float64."""
    if is_relu(step):
        return np.maximum(l, 0.0), np.maximum(u, 0.0)
    zero = np.zeros_like(l)
    b, t = intercepts(ar, step, l, u, zero, zero)
    return (b, t) if isinstance(b, np.ndarray) else (b.floats(-1), t.floats(1))


def _exp(x: np.ndarray) -> np.ndarray:
    """exp, with a relative error below `_RELATIVE` and an absolute one of `_TINY`.

    x = k ln 2 + r, |r| < 0.36: k times the first 33 bits of ln 2 is exact, and r is off by less than 2^-51; the series
    up to r^15 leaves less than 2^-60, and Horner's rule with 15 steps, of which each is off by 2^-52 of a value below 2
    times 0.36 to the power of its depth, less than 2^-50.
    """
    x = np.clip(x, -746.0, 710.0)
    k = np.rint(x / 0.6931471805599453)
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    total = np.ones_like(r)
    for i in range(15, 0, -1):
        total = 1.0 + total * r / i
    return np.ldexp(total, k.astype(np.int64))


def _value(function: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f(x), and a bound of its error."""
    match function:
        case "exp":
            f = np.where(x > 709.0, np.inf, _exp(x))
            return f, _RELATIVE * f + _TINY
        case "sigmoid":
            f = 1.0 / (1.0 + _exp(-x))
            return f, 4.0 * _RELATIVE * f + _TINY  # where exp was clipped, f is below 2^-1000 or off by as little
        case "tanh":
            f = 2.0 / (1.0 + _exp(-2.0 * x)) - 1.0
            return f, np.full_like(f, 8.0 * _RELATIVE)
        case "square":
            return x * x, 2.0**-52 * x * x + _TINY
        case "reciprocal":
            return np.where(x > 0, 1.0 / x, np.nan), 2.0**-52 / x + _TINY
    raise NotCovered(f"the function {function}")


def _derivative(function: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f'(x), and a bound of its error."""
    f, error = _value(function, x)
    match function:
        case "exp":
            return f, error
        case "sigmoid":
            return f * (1.0 - f), 2.0 * error + 2.0**-50
        case "tanh":
            return 1.0 - f * f, 4.0 * error
        case "square":
            return 2.0 * x, np.zeros_like(x)
    return -f * f, 2.0**-49 * f * f + _TINY


def _stationary(function: str, a: np.ndarray) -> np.ndarray:
    """About where f' = a, on the convex side."""
    match function:
        case "exp":
            return np.log(a)
        case "sigmoid":
            f = 0.5 * (1.0 - np.sqrt(1.0 - 4.0 * a))
            return np.log(f / (1.0 - f))
        case "tanh":
            return -np.arctanh(np.sqrt(1.0 - a))
        case "square":
            return 0.5 * a
    return np.sqrt(-1.0 / a)


def _shifted(function: str, a: np.ndarray, x: np.ndarray, sign: float) -> np.ndarray:
    """A lower bound (sign -1) or upper bound (sign +1) of f(x) - a x."""
    f, error = _value(function, x)
    product = a * x
    return f - product + sign * (error + 2.0**-51 * (np.abs(f) + np.abs(product)) + _TINY)


def _least(function: str, a: np.ndarray, l: np.ndarray, u: np.ndarray) -> np.ndarray:
    """A lower bound of f(x) - a x on [l, u]; f is convex on it, or where x <= 0 and concave beyond."""
    l = np.where(l > 0, l, np.nan) if function == "reciprocal" else l
    m = u if function in _CONVEX else np.clip(0.0, l, u)
    p = _stationary(function, a)
    p = np.clip(np.where(np.isnan(p), m, p), l, m)
    slope, error = _derivative(function, p)
    error = error + 2.0**-52 * (np.abs(slope) + np.abs(a))
    slope = slope - a
    least = _shifted(function, a, p, -1.0)
    fall = np.maximum(np.maximum(slope + error, 0.0) * (p - l), np.maximum(error - slope, 0.0) * (m - p))
    least = least - fall * (1.0 + 2.0**-48) - 2.0**-52 * np.abs(least) - _TINY
    if function not in _CONVEX:
        least = np.minimum(least, np.minimum(_shifted(function, a, m, -1.0), _shifted(function, a, u, -1.0)))
    return least


def _greatest(function: str, a: np.ndarray, l: np.ndarray, u: np.ndarray) -> np.ndarray:
    """An upper bound of f(x) - a x on [l, u]; sigmoid and tanh are odd about (0, f(0))."""
    if function in _CONVEX:
        return np.maximum(_shifted(function, a, l, 1.0), _shifted(function, a, u, 1.0))
    most = _TWO_F0[function] - _least(function, a, -u, -l)
    return most + 2.0**-52 * np.abs(most)


__all__ = ["default_slopes", "dyadic", "image", "intercepts", "is_relu", "snapped"]
