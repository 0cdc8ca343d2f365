"""Rounding: the only place with tolerances. Everything here follows Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., ch. 3: a sum of k products evaluated in any order has an absolute error of at most
gamma_k = k u / (1 - k u) times the sum of the absolute products, u being the unit roundoff.

That holds without underflow. An operation whose result lies below the smallest normal number t can lose up to t, and
so can an operand that lies there: kernels may flush it to zero. A product (a + e)(w + f) of operands that lost at most
t each is off by at most t (|a| + |w| + 1 + t), a sum by t. :func:`underflow` is so much larger than t that adding it
once to a magnitude covers all operations of a sum (``docs/numerics.md``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verifier.core.interval import Interval

# Magnitudes are themselves computed in floating point from non-negative terms; their relative error is far below this.
ROUNDING_SAFETY = 1.0 + 1e-4

# Smallest normal numbers: covers underflow, which the relative error model leaves out.
_TINY = {torch.float32: 2.0**-126, torch.float64: 2.0**-1022}


def unit_roundoff(dtype: torch.dtype) -> float:
    """u for round-to-nearest: 2^-24 for float32, 2^-53 for float64."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """Relative error bound of an inner product with ``terms`` rounded operations."""
    ku = terms * unit_roundoff(dtype)
    return ku / (1.0 - ku) * ROUNDING_SAFETY if ku < 0.5 else float("inf")


def tiny(dtype: torch.dtype) -> float:
    """Smallest normal number of a dtype."""
    return _TINY[dtype]


def underflow(dtype: torch.dtype) -> float:
    """What is added to every magnitude m, so that error terms of the form gamma_k |A| m also cover underflow.

    It is 64 t / u, t the smallest normal number: gamma_k of it is at least 64 k t, and it is itself more than 64 times
    what all operations of a sum with k u < 1/2 can lose. About 1e-29 for float32 and 1e-290 for float64.
    """
    return 64.0 * tiny(dtype) / unit_roundoff(dtype)


# Tests set this to False to have every proof in float64.
_FLOAT32_PROOFS = True


def float32_proofs() -> bool:
    """Whether proofs may rest on float32 with rounding errors accounted for, where that suffices."""
    return _FLOAT32_PROOFS


def outward(bounds: Interval, dtype: torch.dtype = torch.float32) -> Interval:
    """Round an interval to another dtype without losing any of it. Exact when the dtype stays the same."""
    if bounds.lower.dtype == dtype:
        return bounds
    low, up = bounds.lower.to(dtype), bounds.upper.to(dtype)
    inf = torch.full((), float("inf"), dtype=dtype, device=low.device)  # made there: nothing waits for a copy
    low = torch.where(low.to(bounds.lower.dtype) > bounds.lower, torch.nextafter(low, -inf), low)
    up = torch.where(up.to(bounds.upper.dtype) < bounds.upper, torch.nextafter(up, inf), up)
    return Interval(low, up)


def finite_lower(bound: Tensor) -> Tensor:
    """A lower bound with NaN replaced by -inf: NaN proves nothing."""
    return torch.nan_to_num(bound, nan=float("-inf"), posinf=float("-inf"), neginf=float("-inf"))


def proved(lower: Tensor, threshold: Tensor, strict: Tensor | None = None) -> Tensor:
    """True where a row is certified to be violated everywhere: the only test that may close anything.

    A row is ``value <= threshold``, or ``value < threshold`` where it is strict. With ``value >= lower`` it is refuted
    when lower > threshold, a strict one also when lower = threshold. Both numbers must be finite.

    Args:
        lower: certified lower bounds.
        threshold: at least the exact right-hand sides: rounded up wherever they are rounded. Then equality needs no
            more care than being above: lower = threshold >= exact.
        strict: bool, broadcast like the bounds: which rows are strict; None: none is. A combination of rows counts as
            strict when a strict one has a positive weight (:func:`combined_strict`).
    """
    above = lower > threshold
    if strict is not None:
        above = above | (strict & (lower == threshold))
    return above & torch.isfinite(lower) & torch.isfinite(threshold)


def combined_strict(weights: Tensor, strict: Tensor) -> Tensor:
    """(...) bool: whether sum_s w_s (row_s - d_s) < 0 holds strictly where all rows hold, for weights (..., S) >= 0.

    A non-strict row only gives ``<= 0``; one strict row with a positive weight makes the sum strict.
    """
    return ((weights > 0) & strict).any(-1)


def rounded_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A threshold in another dtype, rounded up: the unsafe set may only grow."""
    near = value.to(dtype)
    inf = torch.full((), float("inf"), dtype=dtype, device=near.device)
    return torch.where(near.to(value.dtype) < value, torch.nextafter(near, inf), near)


# Sums of multiples of 2^g whose absolute values add up to less than 2^(g + 53) are exact in float64, in any order and
# with or without fused operations: every partial sum is such a multiple and has at most 53 bits.
_EXACT_BITS = 52  # one less than float64 has: the sum of absolute values is itself rounded
_COARSEST, _FINEST = 4096, -1000


def grain(x: Tensor) -> Tensor:
    """(N,) int64: the largest g such that all numbers of float64 (N, ...) are multiples of 2^g; zero is one of any."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    mantissa, exponent = torch.frexp(flat)
    whole = (mantissa * 2.0**53).to(torch.int64)
    lowest = torch.frexp((whole & -whole).double()).exponent.to(torch.int64) - 1
    g = torch.where(flat == 0, _COARSEST, exponent.to(torch.int64) - 53 + lowest)
    return g.amin(1) if g.shape[1] else g.new_full((x.shape[0],), _COARSEST)


def sums_exactly(size: Tensor, multiples: Tensor) -> Tensor:
    """bool: whether float64 kernels add multiples of 2^``multiples`` exactly when their absolute values add up to
    ``size`` >= 0, itself rounded. Subnormal numbers cannot occur, so that nothing is flushed.
    """
    fits = torch.frexp(size).exponent <= multiples + _EXACT_BITS
    return torch.isfinite(size) & ((fits & (multiples >= _FINEST)) | (size == 0))


def widen(lower: Tensor, upper: Tensor, slack: Tensor | float) -> Interval:
    """Move both bounds outward by ``slack`` and by one more rounding, which covers the subtraction itself."""
    u = torch.finfo(lower.dtype).eps
    low = lower - slack
    up = upper + slack
    t = tiny(lower.dtype)
    return Interval(low - low.abs() * u - t, up + up.abs() * u + t)
