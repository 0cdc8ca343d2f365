"""Queries in VNN-LIB 2.0 with known truth, from their text to a verdict; witnesses are checked in rationals."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support import v2
from tests.support.v2 import VERSION, box, network
from verifier import api
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.question import Question
from verifier.core.result import Verdict, Witness
from verifier.spec.witness import format_witness

ONE = VERSION + network("f", "X[1,1]", "Y[1,1]") + box(("X[0,0]", -1.0, 1.0))
X, Y = "X[0,0]", "Y[0,0]"
PAIR = VERSION + network("f", "X[1,1]", "Y[1,1]")
EQUAL = PAIR + network("g", "U[1,1]", "V[1,1]", "(equal-to f)")
OTHER = PAIR + network("g", "U[1,1]", "V[1,1]", "(isomorphic-to f)")
U, V = "U[0,0]", "V[0,0]"
BOTH = box((X, -1.0, 1.0), (U, -1.0, 1.0))
SAME = box((X, -1.0, 1.0)) + f"(assert (== {X} {U}))\n"
MANY = VERSION + network("f", "A[1,2] B[2]", "S[1,1] P[1,2]")
MANY += box(("A[0,0]", -1.0, 1.0), ("A[0,1]", -1.0, 1.0), ("B[0]", 0.0, 1.0), ("B[1]", 0.0, 1.0))
SCALAR = VERSION + network("f", "T[]", "Y[]") + box(("T", -1.0, 1.0))
HIDDEN = VERSION + network("f", "X[1,1]", "Y[1,1]", hidden='H[1,2]="h"') + box((X, -1.0, 1.0))
ROWS = VERSION + network("f", "X[2,2]", "Y[2,2]")
ROWS += box(*((f"X[{i},{j}]", -1.0, 1.0) for i in range(2) for j in range(2)))

# name of the networks, text, asserts, truth
CASES: list[tuple[str, str, str, bool]] = [
    # one network: |x| on [-1, 1]
    ("abs", ONE, f"(>= {Y} 1.5)", False),
    ("abs", ONE, f"(>= {Y} 0.5)", True),
    ("abs", ONE, f"(< {Y} 0.0)", False),
    ("abs", ONE, f"(> {Y} 1.0)", False),
    ("abs", ONE, f"(not (>= {Y} -0.25))", False),
    ("abs", ONE, f"(not (>= {Y} 0.25))", True),
    ("abs", ONE, f"(or (>= {Y} 1.25) (<= {Y} -0.25))", False),
    ("abs", ONE, f"(or (>= {Y} 1.25) (<= {Y} 0.25))", True),
    ("abs", ONE, f"(and (>= {X} 0.5) (<= {Y} 0.25))", False),
    ("abs", ONE, f"(and (<= {X} -0.5) (>= {Y} 0.75))", True),
    ("abs", ONE, f"(not (=> (>= {X} 0.5) (>= {Y} 0.25)))", False),
    ("abs", ONE, f"(not (=> (>= {X} 0.25) (>= {Y} 0.5)))", True),
    ("abs", ONE, f"(== {Y} 2.0)", False),
    ("abs", ONE, f"(!= {Y} 2.0)", True),
    ("abs", ONE, f"(== {X} 2.0)", False),
    ("abs", ONE, f"(and (== {X} 0.5) (>= {Y} 0.75))", False),
    ("abs", ONE, f"(and (== {X} 0.5) (>= {Y} 0.5))", True),
    ("abs", ONE, "(and true (not false))", True),
    ("abs", ONE, "(< 1.0 1.0)", False),
    ("abs", ONE, f"(<= (- {Y} {X}) -0.25)", False),  # |x| >= x
    ("abs", ONE, f"(>= (- {Y} {X}) 1.5)", True),
    ("abs", ONE, f"(> (+ (* 2.0 {Y}) -2.0 (- {X} {X})) 0.5)", False),
    # polynomials
    ("abs", ONE, f"(>= (* {X} {X}) 1.5)", False),
    ("abs", ONE, f"(>= (* {X} {X}) 0.5)", True),
    ("abs", ONE, f"(<= (* {X} {X}) -0.5)", False),
    ("abs", ONE, f"(>= (* {X} {Y}) 1.25)", False),
    ("abs", ONE, f"(<= (* {X} {Y}) -0.5)", True),
    ("abs", ONE, f"(>= (- (* {Y} {Y}) (* {X} {X})) 0.25)", False),
    ("abs", ONE, f"(>= (* {X} {X} {X}) 1.25)", False),
    ("abs", ONE, f"(>= (* {X} {Y} {X}) 0.75)", True),
    ("abs", ONE, f"(and (<= (* {X} {X}) 0.25) (>= {Y} 0.75))", False),
    ("abs", ONE, f"(>= (* (+ {X} 1.0) (- {Y} 2.0)) 0.5)", False),
    # two networks with one file
    ("abs", EQUAL + SAME, f"(> {V} (+ {Y} 0.0625))", False),
    ("abs", EQUAL + SAME, f"(or (> {V} {Y}) (< {V} {Y}))", False),
    ("abs", EQUAL + BOTH, f"(> {V} (+ {Y} 0.5))", True),
    ("abs", EQUAL + BOTH, f"(and (<= {U} {X}) (>= {U} 0.0) (> {V} (+ {Y} 0.125)))", False),
    ("abs", EQUAL + BOTH, f"(and (<= {U} {X}) (<= {X} 0.0) (> {V} (+ {Y} 0.125)))", True),
    ("abs", EQUAL + BOTH, f"(and (<= (- {U} {X}) 0.125) (<= (- {X} {U}) 0.125) (>= (- {V} {Y}) 0.5))", False),
    ("abs", EQUAL + BOTH, f"(and (== {U} (+ {X} 0.5)) (>= {X} 0.75))", False),
    ("abs", EQUAL + box((X, -1.0, 1.0)), f"(and (<= {U} {X}) (>= {U} (- {X} 1.0)) (>= {V} 2.5))", False),
    ("abs", EQUAL + box((X, -1.0, 1.0)), f"(and (<= {U} {X}) (>= {U} (- {X} 1.0)) (>= {V} 1.5))", True),
    ("abs", EQUAL + BOTH, f"(>= (* {Y} {V}) 1.25)", False),
    ("abs", EQUAL + BOTH, f"(<= (* {X} {U}) -0.5)", True),
    # two networks with two files: |x| and 2 |x|
    ("pair", OTHER + SAME, f"(> {Y} (+ {V} 0.125))", False),
    ("pair", OTHER + SAME, f"(> {V} (+ {Y} 0.75))", True),
    ("pair", OTHER + SAME, f"(> {V} (+ {Y} 1.25))", False),
    ("pair", OTHER + BOTH, f"(and (>= {Y} 0.75) (<= {V} 0.5))", True),
    ("pair", OTHER + SAME, f"(and (>= {Y} 0.75) (<= {V} 0.5))", False),
    # several inputs and outputs: s = a0 + a1 + b0 - b1, p = relu(a)
    ("many", MANY, "(>= S[0,0] 3.5)", False),
    ("many", MANY, "(>= S[0,0] 2.5)", True),
    ("many", MANY, "(and (<= P[0,0] 0.25) (>= A[0,0] 0.5))", False),
    ("many", MANY, "(and (<= P[0,1] 0.25) (>= S[0,0] 2.5))", False),
    ("many", MANY, "(and (<= P[0,1] 0.25) (>= S[0,0] 1.5))", True),
    ("many", MANY, "(and (<= (+ A[0,0] A[0,1] B[0] B[1]) -1.0) (>= S[0,0] 0.25))", False),
    ("many", MANY, "(and (== A[0,0] A[0,1]) (>= (- P[0,0] P[0,1]) 0.125))", False),
    # scalars, hidden values, dims that the file leaves open
    ("scalar", SCALAR, "(>= Y 3.5)", False),
    ("scalar", SCALAR, "(>= Y 2.5)", True),
    ("scalar", SCALAR, "(> (- Y (* 2.0 T)) 1.5)", False),
    ("abs", HIDDEN, "(and (>= H[0,0] 0.5) (>= H[0,1] 0.25))", False),
    ("abs", HIDDEN, "(and (>= H[0,0] 0.5) (<= H[0,1] 0.25))", True),
    ("abs", HIDDEN, f"(>= (- {Y} H[0,0] H[0,1]) 0.125)", False),
    ("rows", ROWS, "(>= (+ Y[0,0] Y[1,1]) 2.5)", False),
    ("rows", ROWS, "(>= (- Y[1,0] X[1,0]) 0.5)", True),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("networks")
    first = v2.absolute(folder / "abs.onnx")
    return {
        "abs": {"f": first},
        "pair": {"f": first, "g": v2.absolute(folder / "double.onnx", 2.0)},
        "many": {"f": v2.two_in_two_out(folder / "many.onnx")},
        "scalar": {"f": v2.scalar(folder / "scalar.onnx")},
        "rows": {"f": v2.rows(folder / "rows.onnx")},
    }


@pytest.mark.parametrize("case", range(len(CASES)))
def test_truth(case: int, files: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    names, head, formula, sat = CASES[case]
    path = tmp_path / "q.vnnlib"
    path.write_text(f"{head}(assert {formula})\n")
    found = api.verify(files[names], path, {"device": "cpu"}, timeout=30)
    wanted = Verdict.SAT if sat else Verdict.UNSAT
    assert found.verdict is wanted, found.reason
    if found.witness is not None:
        assert_holds(found.witness, f"{head}(assert {formula})")


def assert_holds(witness: Witness, text: str) -> None:
    """Evaluate the text in rationals at the printed numbers, by a reader of its own."""
    values: dict[str, Fraction] = {}
    lines, name, shape = format_witness(witness).splitlines(), "", ()
    count = 0
    for line in lines:
        if "[" in line:
            name, _, dims = line.split()
            shape, count = tuple(int(d) for d in dims[1:-1].split(",") if d), 0
            continue
        at = ",".join(map(str, np.unravel_index(count, shape))) if shape else ""
        values[f"{name}[{at}]" if shape else name] = Fraction(line)
        count += 1
    words = text.replace("(", " ( ").replace(")", " ) ").split()

    def tree(position: int) -> tuple[object, int]:
        if words[position] != "(":
            return words[position], position + 1
        items: list[object] = []
        position += 1
        while words[position] != ")":
            item, position = tree(position)
            items.append(item)
        return items, position + 1

    position = 0
    while position < len(words):
        item, position = tree(position)
        assert isinstance(item, list)
        if item[0] == "assert":
            assert value(item[1], values), item


def value(item: object, values: dict[str, Fraction]) -> Fraction | bool:
    if isinstance(item, str):
        return {"true": True, "false": False}[item] if item in ("true", "false") else values.get(item) or number(item)
    assert isinstance(item, list)
    head, args = item[0], [value(part, values) for part in item[1:]]
    match head:
        case "and":
            return all(args)
        case "or":
            return any(args)
        case "not":
            return not args[0]
        case "=>":
            return not args[0] or bool(args[1])
        case "+":
            return sum(args, Fraction(0))
        case "-":
            return -args[0] if len(args) == 1 else args[0] - sum(args[1:], Fraction(0))
        case "*":
            total = Fraction(1)
            for part in args:
                total *= part
            return total
    a, b = args
    table = {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}
    return table[str(head)]


def number(text: str) -> Fraction:
    return Fraction(0) if text[0].isalpha() else Fraction(text)  # what is not in the table is zero


def test_there_are_enough_queries() -> None:
    assert len(CASES) >= 60


MISFITS = [
    ("abs", VERSION + network("f", "X[1,2]", "Y[1,1]"), "has the shape"),
    ("abs", VERSION + network("f", "X[1,1]", "Y[1,2]"), "has the shape"),
    ("many", VERSION + network("f", "A[1,2]", "S[1,1] P[1,2]"), "has 2 inputs"),
    ("many", VERSION + network("f", "A[1,2] B[2]", "S[1,1]"), "has 2 outputs"),
    ("abs", (VERSION + network("f", "X[1,1]", "Y[1,1]")).replace("float32", "float64"), "element type float32"),
    ("abs", VERSION + network("f", "X[1,1]", "Y[1,1]", hidden='H[1,2]="none"'), "no node gives 'none'"),
    ("pair", VERSION + network("f", "X[1,1]", "Y[1,1]"), "declares no network 'g'"),
    ("abs", OTHER, "'g', which has no file"),
    ("pair", EQUAL, "'g' equals 'f'"),
]


@pytest.mark.parametrize("case", range(len(MISFITS)))
def test_networks_that_are_not_as_declared(case: int, files: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    names, head, message = MISFITS[case]
    path = tmp_path / "q.vnnlib"
    first = "A[0,0]" if "A float" in head else "X[0,0]"
    path.write_text(f"{head}(assert (<= {first} 1.0))\n(assert (>= {first} 1.5))\n")
    with pytest.raises((InputError, UnsupportedError), match=message.replace("[", r"\[")):
        api.verify(files[names], path, {"device": "cpu"}, timeout=30)


def test_products_are_replayed_exactly(files: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """In float64 the square of this input rounds to the bound; exactly, it is below."""
    from verifier.spec.replay import row_holds

    path = tmp_path / "q.vnnlib"
    x = 1.0 - 2.0**-30
    assert Fraction(x) ** 2 > Fraction(x * x)  # the last bit is lost
    path.write_text(ONE.replace("float32", "real") + f"(assert (> (* {X} {X}) {Decimal(x * x)}))\n")
    asked = api.load_question(path)
    assert isinstance(asked, Question)
    problem = asked.problem
    assert row_holds(problem, 0, np.array([x]), np.array([x, x * x]))
    assert not row_holds(problem, 0, np.array([0.5]), np.array([0.5, 5.0]))  # whatever the product's column says
