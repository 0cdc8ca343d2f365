"""Exact numbers of a property file and their roundings to float32 and float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LARGEST = 3.4028234663852886e38  # largest finite float32
_TINY = np.finfo(np.float32).tiny  # smallest normal float32


@dataclass(frozen=True)
class Numbers:
    """Roundings of V exact numbers, each array of shape (V,).

    Attributes:
        floor64, ceil64: float64, the largest one not above and the smallest one not below the number.
        floor32, ceil32: float32, outward; a non-zero end never lies between zero and the smallest normal number on the
            outer side, so that a kernel which flushes subnormals to zero cannot pull it inward.
        nearest32: float32, the nearest float64 rounded to float32, the way a competition's scorer reads a bound.
        nearest64: float64.
        above64, below64: float64 on the inner side of a lower and of an upper bound: ``ceil64`` and ``floor64``, or the
            next one where the nearest float64 was not compared with the number.
    """

    floor64: np.ndarray
    ceil64: np.ndarray
    floor32: np.ndarray
    ceil32: np.ndarray
    nearest32: np.ndarray
    nearest64: np.ndarray
    above64: np.ndarray
    below64: np.ndarray


def neighbours64(nearest64: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The float64 values next below and above (or equal to) the exact numbers; arguments as in :func:`roundings`."""
    below = np.where(residual < 0, np.nextafter(nearest64, -np.inf), nearest64)
    return below, np.where(residual > 0, np.nextafter(nearest64, np.inf), nearest64)


def roundings(nearest64: np.ndarray, residual: np.ndarray, known: np.ndarray | None = None) -> Numbers:
    """Directed roundings from the nearest float64.

    A float32 g is a float64, and rounding is monotone: nearest64 > g implies exact > g and likewise below, so the
    residual decides only where nearest64 is itself a float32.

    Args:
        nearest64: float64 (V,), finite, at most ``LARGEST`` in magnitude where the float32 fields are used.
        residual: int8 (V,), sign of (exact - nearest64).
        known: bool (V,), where the residual was worked out; None: everywhere. It has to be where nearest64 is a
            float32; elsewhere ``floor64`` and ``ceil64`` are then off by one step.
    """
    near = nearest64 + 0.0  # no negative zero
    floor64, ceil64 = neighbours64(near, residual)
    above64, below64 = ceil64, floor64
    if known is not None:
        above64 = np.where(known, ceil64, np.nextafter(near, np.inf))
        below64 = np.where(known, floor64, np.nextafter(near, -np.inf))
    with np.errstate(over="ignore", under="ignore"):
        n32 = near.astype(np.float32)
    back = n32.astype(np.float64)
    side = np.where(near > back, 1, np.where(near < back, -1, residual))
    low = np.where(side < 0, np.nextafter(n32, np.float32(-np.inf)), n32)
    high = np.where(side > 0, np.nextafter(n32, np.float32(np.inf)), n32)
    low = np.where((low < 0) & (low > -_TINY), -_TINY, low)
    high = np.where((high > 0) & (high < _TINY), _TINY, high)
    zero = np.float32(0)
    low, high = low.astype(np.float32) + zero, high.astype(np.float32) + zero
    return Numbers(floor64, ceil64, low, high, n32 + zero, near, above64, below64)


def residual_sign(value: Fraction, nearest: float) -> int:
    """Sign of (value - nearest), exactly."""
    exact = Fraction(nearest)
    return (value > exact) - (value < exact)


def from_fractions(values: Iterable[Fraction]) -> Numbers:
    """Roundings of exact rationals (each within the range of float64)."""
    values = list(values)
    near = [v.numerator / v.denominator for v in values]
    signs = [residual_sign(v, f) for v, f in zip(values, near, strict=True)]
    return roundings(np.array(near, dtype=np.float64), np.array(signs, dtype=np.int8))
