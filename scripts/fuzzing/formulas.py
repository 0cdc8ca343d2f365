"""VNN-LIB formulas: an evaluator in rationals that knows nothing of the verifier's readers, and writers of odd text."""

from __future__ import annotations

import functools
import operator
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}


@functools.lru_cache(maxsize=64)
def parse(text: str) -> tuple[Any, ...]:
    """All top-level S-expressions as nested tuples of words."""
    text = re.sub(r";[^\n]*", "", text)
    stack: list[list[Any]] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", text):
        if word == "(":
            stack.append([])
        elif word == ")":
            done = tuple(stack.pop())
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    return tuple(stack[0])


def value(term: Any, point: Mapping[str, Fraction]) -> Fraction:
    if isinstance(term, str):
        return point[term] if term in point else Fraction(term)
    head, *rest = term
    parts = [value(part, point) for part in rest]
    if head == "-" and len(parts) == 1:
        return -parts[0]
    out = parts[0]
    for part in parts[1:]:
        out = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[head](out, part)
    return out


def holds(formula: Any, point: Mapping[str, Fraction]) -> bool:
    head, *rest = formula
    if head == "and":
        return all(holds(part, point) for part in rest)
    if head == "or":
        return any(holds(part, point) for part in rest)
    parts = [value(part, point) for part in rest]
    return all(_COMPARE[head](a, b) for a, b in pairwise(parts))


def asserted(text: str) -> list[Any]:
    return [command[1] for command in parse(text) if command[0] == "assert"]


def named(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Fraction]:
    return {f"X_{i}": Fraction(v) for i, v in enumerate(x)} | {f"Y_{j}": Fraction(v) for j, v in enumerate(y)}


def satisfied(text: str, x: Sequence[Any], y: Sequence[Any]) -> bool:
    """Whether all asserts of a file hold at a point of exact numbers."""
    point = named(x, y)
    return all(holds(formula, point) for formula in asserted(text))


def declarations(n_in: int, n_out: int) -> str:
    names = [f"X_{i}" for i in range(n_in)] + [f"Y_{j}" for j in range(n_out)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


def decimal(v: Fraction | float) -> str:
    """Exact decimal digits of a dyadic or decimal fraction."""
    f = Fraction(v)
    k, rest = 0, f.denominator
    while rest % 10 == 0:
        rest //= 10
        k += 1
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
            k += 1
    if rest != 1:
        raise ValueError(f"{v} has no finite decimal expansion")
    digits = f * 10**k
    assert digits.denominator == 1
    text = str(abs(digits.numerator)).rjust(k + 1, "0")
    text = f"{text[:-k]}.{text[-k:]}" if k else f"{text}.0"
    return f"-{text}" if f < 0 else text


def shortest(v: float) -> str:
    """The shortest decimal text that reads back as the same double."""
    return repr(float(v))


# ------------------------------------------------------------------------------------------------------ random formulas


def random_number(rng: random.Random) -> str:
    """Values on a coarse grid (so that points sit on boundaries) in many spellings."""
    k = rng.randrange(-8, 9)
    spellings = [f"{k / 8}", f"{k / 8:.6f}", f"{k * 125}e-3", f"{k * 0.0125:.5f}E1", f"{k // 8}", f"{k * 1250}E-4"]
    return rng.choice([*spellings, f"{k // 8}.", re.sub(r"^(-?)0\.", r"\1.", f"{k / 8:.3f}")])


def random_term(rng: random.Random, names: list[str], depth: int) -> str:
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(names) if rng.random() < 0.7 else random_number(rng)
    a, b = random_term(rng, names, depth - 1), random_term(rng, names, depth - 1)
    forms = [f"(+ {a} {b})", f"(- {a} {b})", f"(- {a})", f"(* {random_number(rng)} {a})", f"(+ {a} {b} {a})"]
    return rng.choice([*forms, f"(/ {a} 4)", f"(* {a} {random_number(rng)})", f"(- {a} {b} {b})", f"(+ {a})"])


def random_formula(rng: random.Random, n_in: int, n_out: int, depth: int, simple: bool) -> str:
    """Random nests; ``simple`` keeps to plain comparisons of variables."""
    if depth == 0 or rng.random() < 0.3:
        if simple:
            op = rng.choice(["<=", ">="])
            if rng.random() < 0.3 and n_out > 1:
                i, j = rng.sample(range(n_out), 2)
                return f"({op} Y_{i} Y_{j})"
            name = f"X_{rng.randrange(n_in)}" if rng.random() < 0.5 else f"Y_{rng.randrange(n_out)}"
            sides = [name, random_number(rng)]
            rng.shuffle(sides)
            return f"({op} {sides[0]} {sides[1]})"
        names = [f"X_{i}" for i in range(n_in)] + [f"Y_{j}" for j in range(n_out)]
        op = rng.choice(["<=", ">=", "<=", ">=", "<", ">", "="])
        terms = [random_term(rng, names, 2) for _ in range(3 if rng.random() < 0.1 else 2)]
        return f"({op} {' '.join(terms)})"
    parts = [random_formula(rng, n_in, n_out, depth - 1, simple) for _ in range(rng.randrange(1, 4))]
    return f"({rng.choice(['and', 'or'])} {' '.join(parts)})"


def respaced(rng: random.Random, text: str) -> str:
    """The same formula with other white space and comments."""
    gaps = [" ", "  ", "\n", "\r\n", "\t", " ; note (and\n", "\n;\n"]
    out = []
    for word in re.findall(r"[()]|[^\s()]+", text):
        if out and not (word == ")" or out[-1] == "("):
            out.append(rng.choice(gaps) if rng.random() < 0.3 else " ")
        elif rng.random() < 0.1:
            out.append(rng.choice(gaps))
        out.append(word)
    return "".join(out) + rng.choice(["", "\n", "\r\n", " ;end"])
