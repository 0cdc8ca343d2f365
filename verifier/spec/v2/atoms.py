"""Comparisons as atoms: bounds of single inputs, and rows over inputs, outputs and products of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from verifier.spec import numbers
from verifier.spec.assemble import LOWER, MAX_CASES, ROW, UPPER, Atoms, Rows, guard
from verifier.spec.linear_rows import RowKey, exact_scale, rows_of
from verifier.spec.v2.polynomial import Polynomial
from verifier.spec.v2.syntax import Comparison, Formula
from verifier.spec.v2.tighten import Inequality
from verifier.spec.v2.tokens import Text

_FLOAT_MAX = Fraction(numbers.LARGEST)
_DOUBLE_MAX = Fraction(np.finfo(np.float64).max.item())

Alternatives = list[tuple[int, ...]]


@dataclass(frozen=True)
class Bound:
    """``x >= value`` (LOWER) or ``x <= value`` (UPPER)."""

    kind: int
    variable: int
    value: Fraction
    strict: bool


class AtomTable:
    """Distinct atoms. In polynomials variable i >= 0 is input i and ~j output j; products are outputs after these.

    Args:
        n_values: number of outputs that are no products.
    """

    def __init__(self, text: Text, n_values: int) -> None:
        self.text, self.n_values = text, n_values
        self.atoms: list[Bound | int] = []  # an int is the index of a row
        self.rows: dict[RowKey, int] = {}
        self._keys: list[RowKey] = []
        self.products: dict[tuple[int, ...], int] = {}
        self._place: dict[Bound | int, int] = {}

    def alternatives(self, formula: Formula) -> Alternatives:
        """Disjunctive normal form: an OR over tuples of atoms, all of which hold.

        Raises:
            UnsupportedPropertyError: it has too many cases.
        """
        if isinstance(formula, Comparison):
            return self._compared(formula)
        parts = [self.alternatives(part) for part in formula.parts]
        if not formula.conjunction:
            return list(dict.fromkeys(itertools.chain.from_iterable(parts)))
        count = math.prod(map(len, parts))
        if count > MAX_CASES:
            raise self.text.unsupported(
                formula.position,
                f"this 'and' expands to {count:,} cases, more than the {MAX_CASES:,} that are supported; "
                "split the property",
            )
        if count > 1:
            guard(count * sum(max(map(len, part), default=0) for part in parts), "constraints in one disjunction")
        chain = itertools.chain.from_iterable
        return [tuple(dict.fromkeys(chain(pick))) for pick in itertools.product(*parts)]

    def _compared(self, comparison: Comparison) -> Alternatives:
        p, position = comparison.polynomial, comparison.position
        minus = {m: -c for m, c in p.items()}
        match comparison.operator:
            case "<=" | "<":
                return self._all(self._atom(p, comparison.operator == "<", position))
            case "==":
                both = self._atom(p, False, position), self._atom(minus, False, position)
                return self._all(*both)
            case _:
                return self._all(self._atom(p, True, position)) + self._all(self._atom(minus, True, position))

    @staticmethod
    def _all(*atoms: int | bool) -> Alternatives:
        return [] if any(atom is False for atom in atoms) else [tuple(a for a in atoms if a is not True)]

    def add(self, atom: Bound | int) -> int:
        """An atom's index; equal atoms are one."""
        if atom not in self._place:
            self._place[atom] = len(self.atoms)
            self.atoms.append(atom)
        return self._place[atom]

    def _atom(self, p: Polynomial, strict: bool, position: int) -> int | bool:
        """``p <= 0`` (``<`` when strict) as an atom, or its truth when it has no variable."""
        right = -p.get((), Fraction(0))
        terms = {m: c for m, c in p.items() if m}
        if not terms:
            return right > 0 or (right == 0 and not strict)
        if len(terms) == 1:
            ((monomial, c),) = terms.items()
            if len(monomial) == 1 and monomial[0] >= 0:
                value = right / c
                if abs(value) > _FLOAT_MAX:
                    raise self.text.unsupported(position, "this bound of an input is outside the range of float32")
                return self.add(Bound(UPPER if c > 0 else LOWER, monomial[0], value, strict))
            terms, right = {monomial: Fraction(1 if c > 0 else -1)}, right / abs(c)
        scale = self._scale(list(terms.values()), position)
        right = right * scale
        if abs(right) > _DOUBLE_MAX:
            raise self.text.unsupported(position, "the constant of this comparison is outside the range of floats")
        columns = sorted((self._column(m), c * scale) for m, c in terms.items())
        key = (tuple(columns), right, strict)
        if key not in self.rows:
            self.rows[key] = len(self.rows)
            self._keys.append(key)
        return self.add(self.rows[key])

    def _column(self, monomial: tuple[int, ...]) -> int:
        """What stands for a monomial: the variable itself, or the output that is the product."""
        if len(monomial) == 1:
            return monomial[0]
        return ~(self.n_values + self.products.setdefault(monomial, len(self.products)))

    def _scale(self, coefficients: Sequence[Fraction], position: int) -> Fraction:
        """A positive factor that makes all coefficients exact in float64; 1 when they already are."""
        scale = exact_scale(coefficients)
        if scale is None:
            raise self.text.unsupported(
                position, "the coefficients of this comparison have no exact common scale in float64; use fewer digits"
            )
        return scale

    def inequality(self, atom: int) -> Inequality | None:
        """A row among inputs alone."""
        found = self.atoms[atom]
        if isinstance(found, Bound):
            return None
        columns, right, _ = self._keys[found]
        return None if any(v < 0 for v, _ in columns) else Inequality(dict(columns), right)

    def arrays(self, values: Sequence[Fraction]) -> Atoms:
        """The atoms as :func:`verifier.spec.assemble.assemble` takes them.

        Args:
            values: all distinct numbers of bounds, ascending.
        """
        rank = {value: i for i, value in enumerate(values)}
        kind = np.full(len(self.atoms), ROW, dtype=np.int8)
        target, key = (np.zeros(len(self.atoms), dtype=np.int64) for _ in range(2))
        for i, atom in enumerate(self.atoms):
            if isinstance(atom, Bound):
                shift = (1 if atom.kind == LOWER else -1) if atom.strict else 0
                kind[i], target[i], key[i] = atom.kind, atom.variable, 2 * rank[atom.value] + shift
            else:
                target[i] = atom
        return Atoms(kind, target, key)

    def row_arrays(self, n_in: int) -> Rows:
        """The rows, likewise."""
        return rows_of(list(self.rows), n_in, self.n_values + len(self.products))
