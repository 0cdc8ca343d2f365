"""A tiny independent evaluator of VNN-LIB formulas at a point, and random formulas as text."""

from __future__ import annotations

import operator
import random
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq}


def parse(text: str) -> list[Any]:
    """All top-level S-expressions as nested lists of words."""
    text = re.sub(r";.*", "", text)
    stack: list[list[Any]] = [[]]
    for word in re.findall(r"[()]|[^\s()]+", text):
        if word == "(":
            stack.append([])
        elif word == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(word)
    return stack[0]


def value(term: Any, point: dict[str, Fraction]) -> Fraction:
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


def holds(formula: Any, point: dict[str, Fraction]) -> bool:
    head, *rest = formula
    if head == "and":
        return all(holds(part, point) for part in rest)
    if head == "or":
        return any(holds(part, point) for part in rest)
    parts = [value(part, point) for part in rest]
    return all(_COMPARE[head](a, b) for a, b in pairwise(parts))


def satisfied(text: str, x: list[Fraction], y: list[Fraction]) -> bool:
    """Whether all asserts of a file hold at a point."""
    point = {f"X_{i}": v for i, v in enumerate(x)} | {f"Y_{j}": v for j, v in enumerate(y)}
    return all(holds(command[1], point) for command in parse(text) if command[0] == "assert")


def declarations(n_in: int, n_out: int) -> str:
    names = [f"X_{i}" for i in range(n_in)] + [f"Y_{j}" for j in range(n_out)]
    return "".join(f"(declare-const {name} Real)\n" for name in names)


def random_number(rng: random.Random) -> str:
    """Values on a coarse grid (so that points sit on boundaries) in many spellings."""
    k = rng.randrange(-8, 9)
    return rng.choice([f"{k / 8}", f"{k / 8:.6f}", f"{k * 125}e-3", f"{k * 0.0125:.5f}E1", f"{k // 8}"])


def random_term(rng: random.Random, names: list[str], depth: int) -> str:
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(names) if rng.random() < 0.7 else random_number(rng)
    a, b = random_term(rng, names, depth - 1), random_term(rng, names, depth - 1)
    return rng.choice(
        [f"(+ {a} {b})", f"(- {a} {b})", f"(- {a})", f"(* {random_number(rng)} {a})", f"(+ {a} {b} {a})", f"(/ {a} 4)"]
    )


def random_formula(rng: random.Random, n_in: int, n_out: int, depth: int, simple: bool) -> str:
    """Random nests; ``simple`` keeps to the atoms that the fast reader knows."""
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
        return f"({op} {random_term(rng, names, 2)} {random_term(rng, names, 2)})"
    parts = [random_formula(rng, n_in, n_out, depth - 1, simple) for _ in range(rng.randrange(1, 4))]
    return f"({rng.choice(['and', 'or'])} {' '.join(parts)})"
