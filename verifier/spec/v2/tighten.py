"""Bounds of inputs that follow from linear inequalities among inputs.

Interval propagation in rationals: of ``sum c_i x_i <= d`` every input gets the bound that is left when all others are
at their most favourable ends. What is found is rounded outward to float64, and holds wherever the inequalities and the
bounds that it started from hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from verifier.spec.numbers import LARGEST

_ROUNDS = 12
_MAX_WORK = 200_000  # terms looked at


@dataclass(frozen=True)
class Inequality:
    """``sum(coefficients[i] * x_i) <= right``."""

    coefficients: Mapping[int, Fraction]
    right: Fraction


@dataclass
class Ends:
    """Bounds by input; inputs without one are missing."""

    low: dict[int, Fraction] = field(default_factory=dict)
    high: dict[int, Fraction] = field(default_factory=dict)

    def copy(self) -> Ends:
        return Ends(dict(self.low), dict(self.high))

    def cut_low(self, i: int, value: Fraction) -> bool:
        """Take a lower bound if it is better; whether it was."""
        if i in self.low and self.low[i] >= value:
            return False
        self.low[i] = value
        return True

    def cut_high(self, i: int, value: Fraction) -> bool:
        if i in self.high and self.high[i] <= value:
            return False
        self.high[i] = value
        return True


def propagate(ends: Ends, rows: Sequence[Inequality]) -> Ends:
    """Tighter bounds.

    Args:
        ends: what is known; unchanged.
    """
    out, work = ends.copy(), 0
    for _ in range(_ROUNDS):
        changed = False
        for row in rows:
            work += len(row.coefficients)
            if work > _MAX_WORK:
                return out
            changed = _apply(out, row) or changed
        if not changed:
            break
    return out


def _apply(ends: Ends, row: Inequality) -> bool:
    """One inequality; whether a bound became better."""
    least: dict[int, Fraction | None] = {}
    for i, c in row.coefficients.items():
        end = ends.low.get(i) if c > 0 else ends.high.get(i)
        least[i] = None if end is None else c * end
    open_ = [i for i, value in least.items() if value is None]
    if len(open_) > 1:
        return False
    total = sum((value for value in least.values() if value is not None), Fraction(0))
    changed = False
    for i in open_ or least:
        own = least[i]
        bound = (row.right - (total - own if own is not None else total)) / row.coefficients[i]
        upper = row.coefficients[i] > 0
        rounded = _outward(bound, upper)
        if rounded is not None:
            changed = (ends.cut_high(i, rounded) if upper else ends.cut_low(i, rounded)) or changed
    return changed


def _outward(value: Fraction, up: bool) -> Fraction | None:
    """The next float64 above or below, if it is in the range of float32."""
    if abs(value) > LARGEST:
        return None
    near = value.numerator / value.denominator
    if (near < value) if up else (near > value):
        near = float(np.nextafter(near, np.inf if up else -np.inf))
    return Fraction(near)
