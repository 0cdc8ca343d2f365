"""Properties built in Python: boxes, linear output constraints, local robustness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from verifier.core.errors import InputError
from verifier.core.problem import Problem
from verifier.spec.assemble import guard
from verifier.spec.numbers import LARGEST, roundings

Row = tuple[ArrayLike, float]


def from_box(lower: ArrayLike, upper: ArrayLike, unsafe: Sequence[Sequence[Row]], n_out: int) -> Problem:
    """One input box and an unsafe set in disjunctive form.

    Args:
        lower: lower bounds, shaped like an input of the network (or flat), float64 or float32; proofs round outward to
            float32.
        upper: upper bounds, likewise.
        unsafe: an OR over cases, each an AND over rows ``(c, d)`` with c of shape (n_out,), meaning ``c.y <= d``.
        n_out: number of outputs, flattened.

    Raises:
        InputError: shapes differ, a bound or coefficient is not finite, or a lower bound is above its upper bound.
    """
    low, high = _flat(lower, "lower bounds"), _flat(upper, "upper bounds")
    zeros = np.zeros(low.shape, dtype=np.int8)
    found = _problem(low, zeros, high, np.zeros(high.shape, dtype=np.int8), unsafe, n_out)
    return replace(found, input_shape=np.shape(lower))


def robustness(
    x: ArrayLike,
    epsilon: float | ArrayLike,
    label: int,
    n_classes: int,
    clip: tuple[float, float] | None = None,
    targets: Sequence[int] | None = None,
) -> Problem:
    """Local robustness: is the class constant on a box around an input? Unsafe: a target's output is >= the label's.

    Args:
        x: the input, in the shape that a torch module takes, with or without a leading 1; any shape for an ONNX file.
        epsilon: radius, one number or one per input; the box is exact, the rounding of x +- epsilon is accounted for.
        label: the correct class.
        n_classes: number of outputs.
        clip: range of valid inputs; the box is intersected with it.
        targets: classes that must not win; all others by default.

    Raises:
        InputError: label or target out of range, negative epsilon, or an x outside of ``clip`` by more than epsilon.
    """
    centre = _flat(x, "the input")
    radius = np.broadcast_to(_flat(epsilon, "epsilon"), centre.shape) if np.ndim(epsilon) == 0 else _flat(epsilon, "")
    if radius.shape != centre.shape:
        raise InputError(f"epsilon has {radius.size} values, the input {centre.size}; give one or as many")
    if (radius < 0).any():
        raise InputError(f"epsilon is negative ({float(radius.min()):g}); give a radius of at least 0")
    classes = [j for j in range(n_classes) if j != label] if targets is None else list(targets)
    for j in (label, *classes):
        if not 0 <= j < n_classes:
            raise InputError(f"class {j} is outside 0 to {n_classes - 1}; check label, targets and n_classes")
    if label in classes:
        raise InputError(f"class {label} is both the label and a target; remove it from the targets")
    low, low_residual = _exact_sum(centre, -radius)
    high, high_residual = _exact_sum(centre, radius)
    if clip is not None:
        floor, ceiling = float(clip[0]), float(clip[1])
        if not floor <= ceiling:
            raise InputError(f"clip ({floor:g}, {ceiling:g}) is not a range; give (smallest, largest)")
        cut = (low < floor) | ((low == floor) & (low_residual < 0))
        low, low_residual = np.where(cut, floor, low), np.where(cut, 0, low_residual)
        cut = (high > ceiling) | ((high == ceiling) & (high_residual > 0))
        high, high_residual = np.where(cut, ceiling, high), np.where(cut, 0, high_residual)
    unsafe: list[list[Row]] = []
    for j in classes:
        c = np.zeros(n_classes)
        c[label], c[j] = 1.0, -1.0
        unsafe.append([(c, 0.0)])
    return replace(_problem(low, low_residual, high, high_residual, unsafe, n_classes), input_shape=np.shape(x))


def _flat(values: ArrayLike, what: str) -> np.ndarray:
    """Finite float64 (n,)."""
    out = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(out).all():
        raise InputError(f"{what or 'epsilon'}: a value is not finite; bounds must be numbers")
    return out


def _exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest float64 of a + b and the sign of what it lacks (Knuth's two-sum, exact barring overflow)."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    return s, np.sign(error).astype(np.int8)


def _problem(
    low: np.ndarray,
    low_residual: np.ndarray,
    high: np.ndarray,
    high_residual: np.ndarray,
    unsafe: Sequence[Sequence[Row]],
    n_out: int,
) -> Problem:
    if low.shape != high.shape or not low.size:
        raise InputError(f"the box has {low.size} lower and {high.size} upper bounds; give equally many, at least one")
    inverted = np.flatnonzero((low > high) | ((low == high) & (low_residual > high_residual)))
    if len(inverted):
        i = int(inverted[0])
        raise InputError(f"input {i}: the lower bound {low[i]:.9g} is above the upper bound {high[i]:.9g}")
    if max(np.abs(low).max(), np.abs(high).max()) > LARGEST:
        raise InputError("a bound is outside the range of float32; scale the input")
    guard(sum(map(len, unsafe)) * n_out, "row coefficients")
    table: dict[tuple[bytes, float], int] = {}
    coefficients: list[np.ndarray] = []
    cases = []
    for case in unsafe:
        indices = []
        for c, d in case:
            vector = _flat(c, "row coefficients") + 0.0
            if vector.shape != (n_out,):
                raise InputError(f"a row has {vector.size} coefficients, the network {n_out} outputs")
            if not np.isfinite(d):
                raise InputError(f"a row's right-hand side is {d}; it must be finite")
            key = (vector.tobytes(), float(d))
            if key not in table:
                table[key] = len(table)
                coefficients.append(vector)
            indices.append(table[key])
        cases.append(list(dict.fromkeys(indices)))
    width = max(map(len, cases), default=0)
    lower, upper = roundings(low, low_residual), roundings(high, high_residual)
    return Problem(
        lower=lower.floor32[None],
        upper=upper.ceil32[None],
        witness_lower=lower.nearest32[None],
        witness_upper=upper.nearest32[None],
        row_y=np.array(coefficients, dtype=np.float64).reshape(len(table), n_out),
        row_x=None,
        row_d=np.array([d for _, d in table], dtype=np.float64),
        case_box=np.zeros(len(cases), dtype=np.int64),
        case_rows=np.array([c + [-1] * (width - len(c)) for c in cases], dtype=np.int64).reshape(len(cases), width),
        inner_lower=lower.above64[None],
        inner_upper=upper.below64[None],
        nearest_lower=lower.nearest64[None],
        nearest_upper=upper.nearest64[None],
    )
