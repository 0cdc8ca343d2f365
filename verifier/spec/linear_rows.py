"""Linear comparisons with exact coefficients, and the float64 rows that say the same.

A row's key has its coefficients by variable (input i is i, output j is ~j), ascending, its right-hand side, and whether
it is strict: ``coefficients . variables <= right``, or ``<``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np

from verifier.spec import numbers
from verifier.spec.assemble import Rows, guard

RowKey = tuple[tuple[tuple[int, Fraction], ...], Fraction, bool]


def exact_scale(coefficients: Collection[Fraction]) -> Fraction | None:
    """A positive factor that makes all coefficients exact in float64; 1 when they already are, None when none does."""
    if all(map(_is_double, coefficients)):
        return Fraction(1)
    scale = Fraction(math.lcm(*(c.denominator for c in coefficients)))
    scale /= math.gcd(*(int(c * scale) for c in coefficients))
    return scale if all(_is_double(c * scale) for c in coefficients) else None


def rows_of(keys: Sequence[RowKey], n_in: int, n_out: int) -> Rows:
    """The rows; coefficients are exact in float64.

    Raises:
        UnsupportedPropertyError: they take too much memory.
    """
    guard(len(keys) * n_out, "row coefficients")
    y, x = np.zeros((len(keys), n_out)), None
    if any(variable >= 0 for coefficients, _, _ in keys for variable, _ in coefficients):
        guard(len(keys) * n_in, "row coefficients")
        x = np.zeros((len(keys), n_in))
    for i, (coefficients, _, _) in enumerate(keys):
        for variable, c in coefficients:
            if variable < 0:
                y[i, ~variable] = float(c)
            else:
                assert x is not None
                x[i, variable] = float(c)
    right = numbers.from_fractions(d for _, d, _ in keys)
    strict = np.array([s for _, _, s in keys], dtype=bool)
    return Rows(y, x, right.ceil64, right.floor64, strict if strict.any() else None)


def _is_double(value: Fraction) -> bool:
    try:
        return Fraction(value.numerator / value.denominator) == value
    except OverflowError:
        return False
