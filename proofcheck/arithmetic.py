"""Two kinds of arithmetic for bounds: float64 with running error bounds, and exact dyadic rationals.

A *row* is a linear function of the network's tensors; `Float` and `Exact` move rows backward through the network, and
a `total` collects their constants. Rows are arrays (B, r, n): r rows on each of B parts of the input box.

**Float.** u = 2^-53. A sum of k products, in any order and with or without fused operations, is off by at most
gamma_k times the sum of the absolute products, gamma_k = k u / (1 - k u) (Higham, ch. 3); for k < 2^45 this is below
1.01 k u. A row a on y = M x that becomes fl(a M) on x is thereby off by at most gamma_k |a| |M| m, if m bounds |x| on
the box; the same holds for a product with a slope (k = 1) and for a sum of two rows. Each such term is added to the
total's `error` where it arises, and the computed row counts as exact from there on, so that errors add up. Error
terms are sums of non-negative numbers; the factor 1.05 in `_U` covers their own rounding, which is relative and
below 2^-7 even for sums of 2^45 terms. Underflow adds at most 2^-1074 to a product: 2^60 of them, each on a tensor
of magnitude m, stay below `_TINY` (1 + max m). Overflow makes infinities or NaN, which no comparison accepts.

**Exact.** Numbers are integers times a common power of two; nothing is rounded or divided.
"""

from __future__ import annotations

import math

import numpy as np

from proofcheck.failures import require
from proofcheck.maps import LinearMap

_U = 1.05 * 2.0**-53
_TINY = 2.0**-1000
_MOST_BITS = 2200  # that exponents of the numbers in one array may differ


class Float:
    """Rows are float64 arrays."""

    exact = False

    @staticmethod
    def of(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, dtype=np.float64)

    @staticmethod
    def apply(m: LinearMap, x: np.ndarray, absolute: bool) -> np.ndarray:
        """M x, or |M| x, for x (..., n)."""
        w = np.abs(m.weight) if absolute and m.weight is not None else m.weight
        return m.apply(w, x.reshape(-1, m.n_in)).reshape(*x.shape[:-1], m.n_out)

    @staticmethod
    def back(m: LinearMap, a: np.ndarray) -> np.ndarray:
        return m.back(m.weight, a.reshape(-1, m.n_out)).reshape(*a.shape[:2], m.n_in)

    least, most = staticmethod(np.minimum), staticmethod(np.maximum)

    @staticmethod
    def product(w: np.ndarray, c: np.ndarray) -> np.ndarray:
        """w (b, 1, s) times c (s, n)."""
        return w @ c

    @staticmethod
    def summed(x: np.ndarray, at: tuple, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros with numbers added at some places."""
        made = np.zeros(shape)
        np.add.at(made, at, x)
        return made

    @staticmethod
    def mix(a: np.ndarray, low: np.ndarray, up: np.ndarray) -> np.ndarray:
        """a times `low` where a is positive, times `up` elsewhere."""
        return a * np.where(a > 0, low, up)


class FloatTotal:
    """Constants of rows (B, r), and what their errors add up to."""

    def __init__(self, shape: tuple[int, ...], magnitude: float) -> None:
        self.value, self.error = np.zeros(shape), np.full(shape, _TINY * (1.0 + magnitude))

    def add(self, x: np.ndarray) -> None:
        """Add float64 numbers (B, r)."""
        self.value = self.value + x
        self.error = self.error + _U * np.abs(self.value)

    def dot(self, a: np.ndarray, low: np.ndarray, up: np.ndarray) -> None:
        """Add the sum of a times `low` where a is positive, and times `up` elsewhere."""
        if low is up and low.ndim == 1:
            self.add(a @ low)
            self.error = self.error + _U * (a.shape[-1] + 2) * (np.abs(a) @ np.abs(low))
        else:
            products = a * np.where(a > 0, low, up)
            self.add(products.sum(-1))
            self.error = self.error + _U * (a.shape[-1] + 2) * np.abs(products).sum(-1)

    def lose(self, a: np.ndarray, slack: np.ndarray) -> None:
        """Subtract the sum of |a| times `slack` >= 0."""
        self.error = self.error + 1.05 * (np.abs(a) @ slack)

    def rounded(self, a: np.ndarray, reach: np.ndarray) -> None:
        """Account for errors of at most u |a| `reach`."""
        self.error = self.error + _U * (np.abs(a) @ reach)

    def lower(self) -> np.ndarray:
        """What the rows' constants are at least; minus infinity where that is not finite."""
        low = self.value - 1.01 * self.error
        return np.where(np.isfinite(low), np.nextafter(low, -np.inf), -np.inf)

    def at_least(self, claimed: np.ndarray) -> np.ndarray:
        """bool (B, r); false for anything that is not finite."""
        low = self.lower()
        return np.isfinite(low) & np.isfinite(claimed) & (low >= claimed)

    def above(self, claimed: np.ndarray) -> np.ndarray:
        """Like :meth:`at_least`, with > for >=."""
        low = self.lower()
        return np.isfinite(low) & np.isfinite(claimed) & (low > claimed)


class Dyadic:
    """Integers n (an array of objects) times 2^e."""

    __slots__ = ("e", "n")

    def __init__(self, n: np.ndarray, e: int) -> None:
        self.n, self.e = n, e

    @property
    def shape(self) -> tuple[int, ...]:
        return self.n.shape

    def at(self, e: int) -> np.ndarray:
        """The integers for another, smaller exponent."""
        return self.n << (self.e - e) if self.e != e else self.n

    def _with(self, other: Dyadic) -> tuple[np.ndarray, np.ndarray, int]:
        e = min(self.e, other.e)
        return self.at(e), other.at(e), e

    def __add__(self, other: Dyadic) -> Dyadic:
        a, b, e = self._with(other)
        return Dyadic(a + b, e)

    def __sub__(self, other: Dyadic) -> Dyadic:
        a, b, e = self._with(other)
        return Dyadic(a - b, e)

    def __mul__(self, other: Dyadic) -> Dyadic:
        return Dyadic(self.n * other.n, self.e + other.e)

    def __abs__(self) -> Dyadic:
        return Dyadic(np.abs(self.n), self.e)

    def __getitem__(self, index: object) -> Dyadic:
        return Dyadic(self.n[index], self.e)  # type: ignore[index]

    def reshape(self, *shape: int) -> Dyadic:
        return Dyadic(self.n.reshape(*shape), self.e)

    def least(self, other: Dyadic) -> Dyadic:
        a, b, e = self._with(other)
        return Dyadic(np.minimum(a, b), e)

    def most(self, other: Dyadic) -> Dyadic:
        a, b, e = self._with(other)
        return Dyadic(np.maximum(a, b), e)

    def floats(self, sign: int) -> np.ndarray:
        """float64 numbers that are not above (sign -1) or not below (sign +1)."""
        return np.asarray(np.frompyfunc(lambda n: _rounded(n, self.e, sign), 1, 1)(self.n), dtype=np.float64)


def _rounded(n: int, e: int, sign: int) -> float:
    shift = max(0, abs(n).bit_length() - 53)
    if sign > 0:
        return -_rounded(-n, e, -1)
    try:
        value = math.ldexp(n >> shift, e + shift)  # the shift rounds down; of subnormal numbers, ldexp may not
    except OverflowError:
        return -math.inf if n < 0 else 1.7976931348623157e308
    return math.nextafter(value, -math.inf) if abs(value) < 2.3e-308 and n else value


def dyadic(x: np.ndarray) -> Dyadic:
    """Finite float64 numbers as integers times a power of two."""
    x = np.asarray(x, dtype=np.float64)
    require(np.isfinite(x).all(), "a number that is not finite in exact arithmetic")
    fraction, exponent = np.frexp(x)
    n = np.ldexp(fraction, 53).astype(np.int64)
    low = np.where(n == 0, 1, n & -n)
    zeros = np.frexp(low.astype(np.float64))[1] - 1  # trailing zero bits
    n, exponent = n >> zeros, np.where(n == 0, 1 << 20, exponent - 53 + zeros)
    e = int(exponent.min()) if n.size else 0
    if e == 1 << 20:
        return Dyadic(n.astype(object), 0)
    shift = np.where(n == 0, 0, exponent - e)
    require(shift.max() <= _MOST_BITS, "exponents too far apart")
    return Dyadic(np.asarray(n.astype(object) << shift.astype(object), dtype=object), e)


class Exact:
    """Rows are :class:`Dyadic`."""

    exact = True
    _weights: dict[int, tuple[LinearMap, Dyadic | None]]

    def __init__(self) -> None:
        self._weights = {}

    of, least, most = staticmethod(dyadic), staticmethod(Dyadic.least), staticmethod(Dyadic.most)

    def weight(self, m: LinearMap) -> Dyadic | None:
        """A map's weights as integers, computed once."""
        if id(m) not in self._weights:
            self._weights[id(m)] = (m, None if m.weight is None else dyadic(m.weight))
        return self._weights[id(m)][1]

    def apply(self, m: LinearMap, x: Dyadic, absolute: bool) -> Dyadic:
        """M x, or |M| x, for x (..., n)."""
        w = self.weight(m)
        n = None if w is None else np.abs(w.n) if absolute else w.n
        return Dyadic(m.apply(n, x.n.reshape(-1, m.n_in)).reshape(*x.shape[:-1], m.n_out), x.e + (w.e if w else 0))

    def back(self, m: LinearMap, a: Dyadic) -> Dyadic:
        w = self.weight(m)
        n = m.back(None if w is None else w.n, a.n.reshape(-1, m.n_out)).reshape(*a.shape[:2], m.n_in)
        return Dyadic(n, a.e + (0 if w is None else w.e))

    @staticmethod
    def product(w: Dyadic, c: Dyadic) -> Dyadic:
        return Dyadic(w.n @ c.n, w.e + c.e)

    @staticmethod
    def summed(x: np.ndarray, at: tuple, shape: tuple[int, ...]) -> Dyadic:
        numbers, made = dyadic(x), np.zeros(shape, dtype=object)
        np.add.at(made, at, numbers.n)
        return Dyadic(made, numbers.e)

    @staticmethod
    def mix(a: Dyadic, low: Dyadic, up: Dyadic) -> Dyadic:
        low_n, up_n, e = low._with(up)
        return Dyadic(a.n * np.where(a.n > 0, low_n, up_n), a.e + e)


class ExactTotal:
    """Like :class:`FloatTotal`, without errors."""

    def __init__(self, shape: tuple[int, ...], magnitude: float) -> None:
        self.value = Dyadic(np.zeros(shape, dtype=object), 0)

    def add(self, x: Dyadic) -> None:
        self.value = self.value + x

    def dot(self, a: Dyadic, low: Dyadic, up: Dyadic) -> None:
        products = Exact.mix(a, low, up)
        self.add(Dyadic(products.n.sum(-1), products.e))

    def lose(self, a: Dyadic, slack: np.ndarray) -> None:
        products = abs(a) * dyadic(slack)
        self.value = self.value - Dyadic(products.n.sum(-1), products.e)

    def rounded(self, a: Dyadic, reach: np.ndarray) -> None:
        """Nothing is rounded."""

    def lower(self) -> np.ndarray:
        return self.value.floats(-1)

    def _difference(self, claimed: np.ndarray) -> np.ndarray:
        return (self.value - dyadic(claimed)).n

    def at_least(self, claimed: np.ndarray) -> np.ndarray:
        return np.asarray(self._difference(claimed) >= 0, dtype=bool)

    def above(self, claimed: np.ndarray) -> np.ndarray:
        return np.asarray(self._difference(claimed) > 0, dtype=bool)
