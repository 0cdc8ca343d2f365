"""Rounding: the only place with tolerances. Everything here follows Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., ch. 3: a sum of k products evaluated in any order has an absolute error of at most
gamma_k = k u / (1 - k u) times the sum of the absolute products, u being the unit roundoff.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verifier.core.interval import Interval

# Charges are themselves computed in floating point from non-negative terms; their relative error is far below this.
CHARGE_SAFETY = 1.0 + 1e-4

# Smallest normal numbers: covers underflow, which the relative error model leaves out.
_TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def unit_roundoff(dtype: torch.dtype) -> float:
    """u for round-to-nearest: 2^-24 for float32, 2^-53 for float64."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error bound of an inner product with ``terms`` rounded operations."""
    ku = terms * unit_roundoff(dtype)
    return ku / (1.0 - ku) * CHARGE_SAFETY if ku < 0.5 else float("inf")


def tiny(dtype: torch.dtype) -> float:
    """Smallest normal number of a dtype."""
    return _TINY[dtype]


def outward(bounds: Interval, dtype: torch.dtype = torch.float32) -> Interval:
    """Round an interval to another dtype without losing any of it. Exact when the dtype stays the same."""
    if bounds.lower.dtype == dtype:
        return bounds
    low, up = bounds.lower.to(dtype), bounds.upper.to(dtype)
    inf = torch.tensor(float("inf"), dtype=dtype, device=low.device)
    low = torch.where(low.to(bounds.lower.dtype) > bounds.lower, torch.nextafter(low, -inf), low)
    up = torch.where(up.to(bounds.upper.dtype) < bounds.upper, torch.nextafter(up, inf), up)
    return Interval(low, up)


def finite_lower(bound: Tensor) -> Tensor:
    """A lower bound with NaN replaced by -inf: what is not a number proves nothing."""
    return torch.nan_to_num(bound, nan=float("-inf"), posinf=float("-inf"), neginf=float("-inf"))


def proved(lower: Tensor, threshold: Tensor) -> Tensor:
    """True where ``lower > threshold`` with both finite: the only test that may close a row."""
    return (lower > threshold) & torch.isfinite(lower) & torch.isfinite(threshold)


def widen(lower: Tensor, upper: Tensor, slack: Tensor | float) -> Interval:
    """Move both bounds outward by ``slack`` and by one more rounding, so that the subtraction itself is covered."""
    u = torch.finfo(lower.dtype).eps
    low = lower - slack
    up = upper + slack
    t = tiny(lower.dtype)
    return Interval(low - low.abs() * u - t, up + up.abs() * u + t)
