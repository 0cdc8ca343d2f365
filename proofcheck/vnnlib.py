"""VNN-LIB 1.0 -> cases: a box, and rows that all hold where the property is violated.

The assertions are expanded to a disjunction of conjunctions, the first assertion's alternatives varying slowest. All
numbers are read as exact decimals. A case is to be refuted: no point of its box may satisfy all of its rows.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from proofcheck.failures import NotCovered, require
from proofcheck.network import read_limited

_TOKEN = re.compile(r"\s+|;[^\n]*|([()]|[^\s();]+)")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_NAME = re.compile(r"([XY])_(0|[1-9][0-9]{0,8})")
_MOST_CASES = 200_000
_MOST_TEXT = 1 << 29
_MOST_PARTS = 1 << 24  # of all alternatives together


@dataclass(frozen=True)
class Linear:
    """Sum of coefficient * variable, plus a constant."""

    parts: dict[str, Fraction]
    constant: Fraction

    def plus(self, other: Linear, factor: Fraction) -> Linear:
        parts = dict(self.parts)
        for name, c in other.parts.items():
            parts[name] = parts.get(name, Fraction(0)) + factor * c
        return Linear({n: c for n, c in parts.items() if c}, self.constant + factor * other.constant)


@dataclass(frozen=True)
class Atom:
    """form <= 0, or form < 0."""

    form: Linear
    strict: bool


@dataclass(frozen=True)
class Row:
    """The sum of coefficient * variable <= d, or < d where `strict`; `parts` are by (letter, index), exact."""

    parts: dict[tuple[str, int], Fraction]
    d: Fraction
    strict: bool


@dataclass
class Case:
    """A box, rounded outward to float64, and rows; `empty` where the exact box has no point."""

    lower: np.ndarray
    upper: np.ndarray
    rows: tuple[Row, ...]
    empty: bool


@dataclass
class Property:
    """The cases of a property, and the SHA-256 of its file."""

    inputs: int
    outputs: int
    hash: str
    cases: list[Case] = field(default_factory=list)


def load(path: Path) -> Property:
    """Read a property."""
    data = read_limited(path, _MOST_TEXT)
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise NotCovered(f"{path.name}: characters beyond ASCII") from None
    counts, assertions = {"X": set[int](), "Y": set[int]()}, []
    for item in _parsed(text):
        head = item[0] if isinstance(item, list) and item and isinstance(item[0], str) else None
        if head in ("declare-const", "declare-fun"):
            _declare(item, counts)
        elif head == "assert":
            require(len(item) == 2, "an assert with several formulas")
            assertions.append(_formula(item[1], counts))
        elif head not in ("set-logic", "set-info", "set-option", "check-sat", "exit", "get-model"):
            raise NotCovered(f"VNN-LIB command {head}")
    for letter, seen in counts.items():
        require(seen == set(range(len(seen))) and seen, f"the numbers of {letter}_i have gaps")
    made = Property(len(counts["X"]), len(counts["Y"]), hashlib.sha256(data).hexdigest())
    require(math.prod(len(a) for a in assertions) <= _MOST_CASES, "too many cases")
    made.cases = _cases(assertions, made.inputs)
    return made


def _parsed(text: str) -> list:
    """Nested lists of words."""
    stack: list[list] = [[]]
    for match in _TOKEN.finditer(text):
        word = match.group(1)
        if word == "(":
            stack.append([])
        elif word == ")":
            require(len(stack) > 1, "VNN-LIB: a closing parenthesis too many")
            done = stack.pop()
            stack[-1].append(done)
        elif word:
            stack[-1].append(word)
        require(len(stack) < 200, "VNN-LIB: nested too deeply")
    require(len(stack) == 1, "VNN-LIB: an open parenthesis at the end")
    return stack[0]


def _declare(item: list, counts: dict[str, set[int]]) -> None:
    name, kind = item[1], item[-1]
    require(len(item) == 3 or (len(item) == 4 and item[2] == []), f"VNN-LIB: declaration of {name}")
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if not match or kind != "Real":
        raise NotCovered(f"VNN-LIB: declaration of {name}")
    number = int(match.group(2))
    require(number not in counts[match.group(1)], f"VNN-LIB: {name} is declared twice")
    counts[match.group(1)].add(number)


def _formula(item: Any, counts: dict[str, set[int]]) -> list[tuple[Atom, ...]]:
    """The alternatives of a formula."""
    require(isinstance(item, list) and item and isinstance(item[0], str), "VNN-LIB: no formula where one must be")
    head, rest = item[0], item[1:]
    if head == "or":
        return [a for part in rest for a in _formula(part, counts)]
    if head == "and":
        parts = [_formula(part, counts) for part in rest]
        total = math.prod(len(p) for p in parts)
        require(total <= _MOST_CASES and total * len(parts) <= _MOST_PARTS, "VNN-LIB: too many alternatives")
        return [tuple(itertools.chain(*choice)) for choice in itertools.product(*parts)]
    if head not in ("<=", ">=", "<", ">", "="):
        raise NotCovered(f"VNN-LIB: {head}")
    require(len(rest) == 2, f"VNN-LIB: {head} with {len(rest)} arguments")
    a, b = (_linear(r, counts) for r in rest)
    less, more = a.plus(b, Fraction(-1)), b.plus(a, Fraction(-1))
    if head == "=":
        return [(Atom(less, False), Atom(more, False))]
    return [(Atom(less if head[0] == "<" else more, len(head) == 1),)]


def _linear(item: Any, counts: dict[str, set[int]]) -> Linear:
    """A linear term."""
    if isinstance(item, str):
        match = _NAME.fullmatch(item)
        if match:
            require(int(match.group(2)) in counts[match.group(1)], f"VNN-LIB: {item} is not declared")
            return Linear({item: Fraction(1)}, Fraction(0))
        require(_NUMBER.fullmatch(item) and len(item) < 400, f"VNN-LIB: no number: {item[:40]}")
        return Linear({}, Fraction(item))
    require(isinstance(item, list) and len(item) >= 2, "VNN-LIB: no linear term where one must be")
    head, terms = item[0], [_linear(part, counts) for part in item[1:]]
    first = terms[0]
    if head == "-" and len(terms) == 1:
        return Linear({}, Fraction(0)).plus(first, Fraction(-1))
    if head in ("+", "-"):
        for term in terms[1:]:
            first = first.plus(term, Fraction(1 if head == "+" else -1))
        return first
    if head == "*" and len(terms) == 2 and not (terms[0].parts and terms[1].parts):
        a, b = terms if not terms[0].parts else terms[::-1]
        return Linear({}, Fraction(0)).plus(b, a.constant)
    raise NotCovered(f"VNN-LIB: operation {head!r}")


class _Bounds:
    """Bounds of inputs as they are met, exact."""

    def __init__(self) -> None:
        self.lower: dict[int, tuple[Fraction, bool]] = {}
        self.upper: dict[int, tuple[Fraction, bool]] = {}

    def copy(self) -> _Bounds:
        new = _Bounds()
        new.lower, new.upper = dict(self.lower), dict(self.upper)
        return new

    def add(self, atom: Atom) -> bool:
        """Note an atom over a single input; false for any other."""
        if len(atom.form.parts) != 1 or next(iter(atom.form.parts))[0] != "X":
            return False
        ((name, c),) = atom.form.parts.items()
        index, value = int(name[2:]), -atom.form.constant / c
        if c > 0 and (index not in self.upper or (value, not atom.strict) < self.upper[index]):
            self.upper[index] = (value, not atom.strict)
        elif c < 0 and (index not in self.lower or (value, atom.strict) > self.lower[index]):
            self.lower[index] = (value, atom.strict)
        return True

    def empty(self) -> bool:
        return any(
            low > self.upper[i][0] or (low == self.upper[i][0] and (strict or not self.upper[i][1]))
            for i, (low, strict) in self.lower.items()
            if i in self.upper
        )


def _cases(assertions: list[list[tuple[Atom, ...]]], inputs: int) -> list[Case]:
    """One case for every choice of alternatives."""
    common, shared = _Bounds(), []
    for alternatives in assertions:
        if len(alternatives) == 1:
            shared += [a for a in alternatives[0] if not common.add(a)]
    base = tuple(_row(a) for a in shared)
    low, up = _rounded(common, np.full(inputs, np.nan), np.full(inputs, np.nan), range(inputs))
    cases = []
    for choice in itertools.product(*(a for a in assertions if len(a) != 1)):
        own, rows = common.copy(), list(base)
        rows += [_row(a) for part in choice for a in part if not own.add(a)]
        changed = [i for i in range(inputs) if own.lower.get(i) != common.lower.get(i) or (
            own.upper.get(i) != common.upper.get(i))] if choice else []  # fmt: skip
        lower, upper = _rounded(own, low, up, changed) if changed else (low, up)
        unbounded = np.flatnonzero(np.isnan(lower) | np.isnan(upper))
        if unbounded.size:
            raise NotCovered(f"X_{unbounded[0]} has no lower or no upper bound")
        cases.append(Case(lower, upper, tuple(rows), own.empty()))
    return cases


def _rounded(bounds: _Bounds, low: np.ndarray, up: np.ndarray, which: object) -> tuple[np.ndarray, np.ndarray]:
    low, up = low.copy(), up.copy()
    for i in which:  # type: ignore[attr-defined]
        low[i] = -rounded_up(-bounds.lower[i][0]) if i in bounds.lower else np.nan
        up[i] = rounded_up(bounds.upper[i][0]) if i in bounds.upper else np.nan
    return low, up


def rounded_up(value: Fraction) -> float:
    """The smallest float64 number that is not below a rational one."""
    try:
        near = float(value)
    except OverflowError:
        raise NotCovered("a number beyond float64") from None
    near = near if Fraction(near) >= value else math.nextafter(near, math.inf)
    require(math.isfinite(near), "a number beyond float64")
    return near


def _row(atom: Atom) -> Row:
    parts = {(name[0], int(name[2:])): c for name, c in atom.form.parts.items()}
    return Row(parts, -atom.form.constant, atom.strict)
