"""Rounding: the only place with tolerances. Everything here follows Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., ch. 3: a sum of k products evaluated in any order has an absolute error of at most
gamma_k = k u / (1 - k u) times the sum of the absolute products, u being the unit roundoff.

That holds without underflow. An operation whose result lies below the smallest normal number t can lose up to t, and
so can an operand that lies there: kernels may flush it to zero. A product (a + e)(w + f) of operands that lost at most
t each is off by at most t (|a| + |w| + 1 + t), a sum by t. :func:`underflow` is so much larger than t that one unit of
it in a magnitude pays for all operations of a sum (``docs/numerics.md``).
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


def underflow(dtype: torch.dtype) -> float:
    """What is added to every magnitude m, so that charges of the form gamma_k |A| m also pay for underflow.

    It is 64 t / u, t the smallest normal number: gamma_k of it is at least 64 k t, and it is itself more than 64 times
    what all operations of a sum with k u < 1/2 can lose. About 1e-29 for float32 and 1e-290 for float64.
    """
    return 64.0 * tiny(dtype) / unit_roundoff(dtype)


# Tests set this to False to have every proof in float64.
_FLOAT32_PROOFS = True


def float32_proofs() -> bool:
    """Whether proofs may rest on charged float32 where that suffices."""
    return _FLOAT32_PROOFS


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
