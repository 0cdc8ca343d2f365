"""Polynomials with rational coefficients over the variables of a query."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

Monomial = tuple[int, ...]  # sorted variables, one entry per power; () is the constant
Polynomial = dict[Monomial, Fraction]  # no coefficient is zero

MAX_DEGREE = 16
MAX_TERMS = 1_000_000
MAX_BITS = 16_384  # of an exact coefficient


class TooLarge(ValueError):
    """A polynomial is outside the limits; the text says which."""


def constant(value: Fraction) -> Polynomial:
    return {(): value} if value else {}


def variable(index: int) -> Polynomial:
    return {(index,): Fraction(1)}


def scaled(p: Mapping[Monomial, Fraction], factor: Fraction) -> Polynomial:
    return {m: c * factor for m, c in p.items()} if factor else {}


def add_to(total: Polynomial, p: Mapping[Monomial, Fraction], factor: int = 1) -> None:
    """Add ``factor * p`` in place; coefficients that cancel disappear."""
    for m, c in p.items():
        value = total.get(m, 0) + factor * c
        if value:
            total[m] = Fraction(value)
        else:
            total.pop(m, None)


def product(p: Mapping[Monomial, Fraction], q: Mapping[Monomial, Fraction]) -> Polynomial:
    """The product of two polynomials.

    Raises:
        TooLarge: its degree or number of terms is above the limits.
    """
    if len(p) * len(q) > MAX_TERMS:
        raise TooLarge(f"a product of {len(p):,} and {len(q):,} terms is too large")
    out: Polynomial = {}
    for m, c in p.items():
        for n, d in q.items():
            if len(m) + len(n) > MAX_DEGREE:
                raise TooLarge(f"the degree of the product is above {MAX_DEGREE}")
            add_to(out, {tuple(sorted((*m, *n))): c * d})
    return out


def check_size(p: Mapping[Monomial, Fraction]) -> None:
    """
    Raises:
        TooLarge: a coefficient has too many digits.
    """
    for c in p.values():
        if c.numerator.bit_length() > MAX_BITS or c.denominator.bit_length() > MAX_BITS:
            raise TooLarge("the result has too many digits")
