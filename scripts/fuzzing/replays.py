"""The judge of counterexamples by itself: properties and points at the edge, a network that is a table.

The reference is a function of ours, whose optimised and plain runs differ sometimes; an accepted point has to satisfy
the text in rationals under both, and one that lies in the box as written and does so has to be accepted.
"""

from __future__ import annotations

import random
import re
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from scripts.fuzzing import checks, formulas

_TYPES = (np.float32, np.float32, np.float64)


class Table:
    """Outputs W x + b, in the type of the input; the plain run may differ in its last digits, or be no number."""

    def __init__(self, rng: np.random.Generator, n_in: int, n_out: int, dtype: Any) -> None:
        self.weights, self.offset = rng.integers(-2, 3, (n_out, n_in)) / 2, rng.integers(-4, 5, n_out) / 8
        self.dtype, self.bad = dtype, bool(rng.random() < 0.1)
        self.noise = float(rng.choice([0.0, 0.0, 1e-7, 1e-3]))

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        given = np.asarray(x).astype(self.dtype)
        y = given.astype(np.float64) @ self.weights.T + self.offset
        if not optimised:
            y = np.full_like(y, np.nan) if self.bad else y - self.noise * np.sign(self.offset)
        return y.astype(self.dtype)


def replays(rng: np.random.Generator) -> str | None:
    """Single points and batches of them, and the check of a results file."""
    from verifier.core.errors import VerifierError
    from verifier.spec.replay import check_results, replay, replay_batch
    from verifier.spec.vnnlib import parse_vnnlib
    from verifier.spec.witness import format_witness

    source = random.Random(int(rng.integers(0, 2**60)))
    n_in, n_out = source.randrange(1, 4), source.randrange(1, 3)
    dtype = _TYPES[int(rng.integers(0, len(_TYPES)))]
    table = Table(rng, n_in, n_out, dtype)
    lines, low, high = _box(source, n_in, n_out)
    candidates = np.array([_point(rng, low, high, dtype) for _ in range(4)])
    text = f"{lines}(assert {_formula(source, candidates[0], table.evaluate(candidates[:1])[0])})\n"
    with tempfile.TemporaryDirectory(dir=checks._memory()) as folder:
        path = Path(folder) / "p.vnnlib"
        path.write_text(text)
        try:
            problem = parse_vnnlib(path)
        except VerifierError as error:
            return f"refused: {error}\n{text}"
        found = [replay(table, problem, x, dtype) for x in candidates]
        found.append(replay_batch(table, problem, candidates, dtype=dtype))
        good = [_right(text, table, x, dtype, "as written") for x in candidates]
        for witness, known in zip(found, [*good, any(good)], strict=True):
            if witness is None:
                if known:
                    return f"a counterexample among {candidates.tolist()} was not accepted:\n{text}"
                continue
            printed = format_witness(witness)
            read = [float(v) for v in re.findall(r"\(X_\d+\s+([^\s()]+)\)", printed)]
            if not _right(text, table, np.array(read), dtype, "rounded"):
                return f"{read} was accepted ({np.dtype(dtype).name}, {table.__dict__}):\n{text}"
        results = Path(folder) / "results.txt"
        for x in candidates:
            pairs = [f"(X_{i} {float(v)!r})" for i, v in enumerate(x)] + [f"(Y_{j} 0.0)" for j in range(n_out)]
            results.write_text("sat\n(" + "\n".join(pairs) + ")\n")
            said = check_results(table, problem, results, dtype).text
            y = table.evaluate(x[None])[0]
            inside = _inside(text, x, dtype)
            true = inside and _rows_hold(text, x, y)
            if (said == "valid") != true:
                return (
                    f"the check says {said!r} of {x.tolist()} ({np.dtype(dtype).name}), outputs {y.tolist()}:\n{text}"
                )
    return None


def _box(source: random.Random, n_in: int, n_out: int) -> tuple[str, list[Fraction], list[Fraction]]:
    """Declarations and one box whose bounds are short decimals or eighths."""
    low, high, lines = [], [], [formulas.declarations(n_in, n_out)]
    for i in range(n_in):
        unit = source.choice([Fraction(1, 8), Fraction(1, 8), Fraction(1, 10), Fraction(1, 1000)])
        a, b = sorted(source.randrange(-9, 10) for _ in range(2))
        low.append(a * unit)
        high.append((b + 1) * unit)
        lines += [f"(assert (>= X_{i} {float(low[-1])!r}))", f"(assert (<= X_{i} {float(high[-1])!r}))"]
    return "\n".join(lines) + "\n", low, high


def _formula(source: random.Random, x: np.ndarray, y: np.ndarray) -> str:
    """Some rows; the thresholds of many are just what a point gives."""
    at = {f"X_{i}": Fraction(float(v)) for i, v in enumerate(x)} | {
        f"Y_{j}": Fraction(float(v)) for j, v in enumerate(y)
    }
    rows = []
    for _ in range(source.randrange(1, 4)):
        # A row of inputs alone would be a bound of the box.
        first = source.choice([name for name in at if name[0] == "Y"])
        names = [first, *source.sample([name for name in at if name != first], source.randrange(0, 2))]
        factors = [source.choice([Fraction(-2), Fraction(-1), Fraction(1), Fraction(1, 2)]) for _ in names]
        terms = [f"(* {formulas.decimal(c)} {name})" for c, name in zip(factors, names, strict=True)]
        left = terms[0] if len(terms) == 1 else f"(+ {' '.join(terms)})"
        value = sum((c * at[name] for c, name in zip(factors, names, strict=True)), Fraction(0))
        double = Fraction(float(value)) == value  # the reader moves other numbers, so that fewer points hold
        limit = value if double and source.random() < 0.6 else Fraction(source.randrange(-9, 10), 8)
        rows.append(f"({source.choice(['<=', '>=', '<', '>'])} {left} {formulas.decimal(limit)})")
    if len(rows) == 1:
        return rows[0]
    return f"({source.choice(['and', 'or'])} {' '.join(rows)})"


def _point(rng: np.random.Generator, low: list[Fraction], high: list[Fraction], dtype: Any) -> np.ndarray:
    """On an end of the box, the number next to it, inside, or a little outside; of the input's type."""
    out = []
    for a, b in zip(low, high, strict=True):
        kind = int(rng.integers(0, 5))
        x = float(a) if rng.random() < 0.5 else float(b)
        if kind == 0:
            x = float(a) + float(rng.integers(0, 9)) / 8 * float(b - a)
        elif kind == 1:
            x += float(rng.choice([-1, 1])) * float(rng.choice([1e-6, 5e-5, 2e-4, 0.3]))
        x = dtype(x)
        if kind == 2:
            x = np.nextafter(x, dtype(rng.choice([-np.inf, np.inf])))
        out.append(float(x))
    return np.array(out)


def _inside(text: str, x: np.ndarray, dtype: Any) -> bool:
    """Whether a point lies in the box with bounds rounded to float32, and to the input's type."""
    for name, op, bound in _sides(text):
        v = float(x[int(name[2:])])
        for kind in {np.float32, dtype}:
            limit = float(kind(float(bound)))
            if not (v >= limit if op == ">=" else v <= limit):
                return False
    return True


def _sides(text: str) -> list[tuple[str, str, str]]:
    found = re.findall(r"\(assert \((<=|>=) (X_\d+) ([-+0-9.e]+)\)\)", text)
    return [(name, op, bound) for op, name, bound in found]


def _rows_hold(text: str, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the last formula holds exactly; comparisons of what is no number do not."""
    return _holds(formulas.asserted(text)[-1], _named(x, y))


def _named(x: np.ndarray, y: np.ndarray) -> dict[str, Fraction]:
    pairs = [*((f"X_{i}", v) for i, v in enumerate(x)), *((f"Y_{j}", v) for j, v in enumerate(y))]
    return {name: Fraction(float(v)) for name, v in pairs if np.isfinite(float(v))}


def _holds(formula: Any, point: dict[str, Fraction]) -> bool:
    if formula[0] in ("and", "or"):
        return (all if formula[0] == "and" else any)(_holds(part, point) for part in formula[1:])
    try:
        return formulas.holds(formula, point)
    except ValueError:  # a variable without a value
        return False


def _right(text: str, table: Table, x: np.ndarray, dtype: Any, box: str) -> bool:
    """Whether a point is a counterexample under both runs, in the box as written or in one of its roundings."""
    if any(float(dtype(v)) != float(v) for v in x):
        return False
    sides = _sides(text)
    written = all(
        Fraction(float(x[int(n[2:])])) >= Fraction(b) if op == ">=" else Fraction(float(x[int(n[2:])])) <= Fraction(b)
        for n, op, b in sides
    )
    rounded = all(
        float(x[int(n[2:])]) >= float(dtype(float(b))) if op == ">=" else float(x[int(n[2:])]) <= float(dtype(float(b)))
        for n, op, b in sides
    )
    if not (written if box == "as written" else written or rounded):
        return False
    runs = [table.evaluate(x[None], optimised)[0] for optimised in (True, False)]
    formula = formulas.asserted(text)[-1]
    if box == "as written" and formula[0] == "or":  # the same case in both runs is what is asked for
        return any(all(_holds(arm, _named(x, y)) for y in runs) for arm in formula[1:])
    return all(_rows_hold(text, x, y) for y in runs)
