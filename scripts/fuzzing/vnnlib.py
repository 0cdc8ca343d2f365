"""Properties written in odd ways: what the reader makes of them against an evaluator in rationals."""

from __future__ import annotations

import gzip
import random
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from scripts.fuzzing import checks, formulas
from scripts.fuzzing.checks import Complaint


def random_text(rng: random.Random) -> tuple[str, int, int]:
    """A property over a few variables, all numbers on a coarse grid, and its numbers of inputs and outputs."""
    n_in, n_out, simple = rng.randrange(1, 4), rng.randrange(1, 4), rng.random() < 0.5
    lines = formulas.declarations(n_in, n_out).splitlines()
    if rng.random() < 0.2:
        rng.shuffle(lines)
    for i in range(n_in):
        k = rng.randrange(0, 9)
        a, b = sorted((rng.randrange(-8, 9), k))
        low, high = f"{a / 8}", f"{b / 8}"
        way = rng.random()
        if way < 0.4:
            parts = [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
        elif way < 0.6:
            parts = [f"(assert (<= {low} X_{i}))", f"(assert (>= {high} X_{i}))"]
        elif way < 0.7:
            parts = [f"(assert (<= {low} X_{i} {high}))"]
        elif way < 0.8:
            parts = [f"(assert (and (<= X_{i} {high}) (>= X_{i} {low})))"]
        elif way < 0.9:
            parts = [
                f"(assert (>= (* 2 X_{i}) {a / 4}))",
                f"(assert (<= (- X_{i}) {-a / 8}))",
                f"(assert (<= X_{i} {high}))",
            ]
        else:
            strict = rng.choice(["<", "<="])
            parts = [f"(assert (>= X_{i} {low}))", f"(assert ({strict} X_{i} {high}))", f"(assert (>= X_{i} -2))"]
        lines += parts
    for _ in range(rng.randrange(1, 3)):
        lines.append(f"(assert {formulas.random_formula(rng, n_in, n_out, rng.randrange(1, 4), simple)})")
    if rng.random() < 0.2:
        rng.shuffle(lines)
        lines.sort(key=lambda line: not line.startswith("(declare"))
    text = "\n".join(lines) + "\n"
    return (formulas.respaced(rng, text) if rng.random() < 0.6 else text), n_in, n_out


def disagreement(text: str, n_in: int, n_out: int, rng: random.Random, count: int = 60) -> Complaint | None:
    """How the problem that is read differs from the text at points of the grid."""
    from verifier.core.errors import UnsupportedError, VerifierError
    from verifier.spec.vnnlib import parse_vnnlib

    with tempfile.TemporaryDirectory(dir=checks._memory()) as folder:
        path = Path(folder) / "p.vnnlib"
        data = text.encode()
        if rng.random() < 0.1:
            path, data = Path(folder) / "p.vnnlib.gz", gzip.compress(data)
        path.write_bytes(data)
        try:
            problem = parse_vnnlib(path)
        except UnsupportedError:
            return None
        except VerifierError as error:
            # Inputs without a bound are refused; everything else here is well-formed.
            if "bound" in str(error):
                return None
            return Complaint("refused", f"{error}")
        except Exception as error:
            return Complaint("crash", checks.last_words(error))
    for _ in range(count):
        x = [Fraction(rng.randrange(-9, 10), 8) for _ in range(n_in)]
        y = [Fraction(rng.randrange(-9, 10), 8) for _ in range(n_out)]
        true = formulas.satisfied(text, x, y)
        for side in ("witness", "proof"):
            said = member(problem, x, y, side)
            if (side == "witness" and said != true) or (side == "proof" and true and not said):
                words = "holds" if true else "does not hold"
                return Complaint(
                    "misread", f"at X={list(map(str, x))}, Y={list(map(str, y))} the text {words}; {side}: {said}"
                )
    return None


def member(problem: object, x: list[Fraction], y: list[Fraction], side: str) -> bool:
    """Whether a point is in the problem's set in exact arithmetic: by witness boxes and strict rows, or loosely."""
    p: object = problem
    boxes = (p.witness_lower, p.witness_upper) if side == "witness" else (p.lower, p.upper)  # type: ignore[attr-defined]
    limits = p.row_d if side == "proof" or p.row_d_inner is None else p.row_d_inner  # type: ignore[attr-defined]
    for case in range(len(p.case_box)):  # type: ignore[attr-defined]
        k = int(p.case_box[case])  # type: ignore[attr-defined]
        low, high = boxes[0][k], boxes[1][k]
        if not all(Fraction(float(a)) <= v <= Fraction(float(b)) for a, v, b in zip(low, x, high, strict=True)):
            continue
        if all(_row(p, int(r), x, y, limits, side) for r in p.case_rows[case] if r >= 0):  # type: ignore[attr-defined]
            return True
    return False


def _row(p: object, row: int, x: list[Fraction], y: list[Fraction], limits: np.ndarray, side: str) -> bool:
    total = sum((Fraction(float(c)) * v for c, v in zip(p.row_y[row], y, strict=True)), Fraction(0))  # type: ignore[attr-defined]
    if p.row_x is not None:  # type: ignore[attr-defined]
        total += sum((Fraction(float(c)) * v for c, v in zip(p.row_x[row], x, strict=True)), Fraction(0))  # type: ignore[attr-defined]
    strict = p.row_strict is not None and bool(p.row_strict[row]) and side == "witness"  # type: ignore[attr-defined]
    limit = Fraction(float(limits[row]))
    return total < limit if strict else total <= limit


def run(rng: np.random.Generator, device: str) -> Iterator[tuple[str, Complaint] | None]:
    """Several texts; a complaint comes with the text."""
    source = random.Random(int(rng.integers(0, 2**62)))
    for _ in range(10):
        text, n_in, n_out = random_text(source)
        complaint = disagreement(text, n_in, n_out, source)
        yield None if complaint is None else (text, complaint)
