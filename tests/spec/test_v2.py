"""Reading VNN-LIB 2.0: what is wrong is named with line and column, what is right means what it says."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from verifier.core.errors import InputError, UnsupportedPropertyError
from verifier.core.problem import Problem
from verifier.core.question import Question
from verifier.core.result import Witness
from verifier.spec.replay import case_holds
from verifier.spec.v2 import reader
from verifier.spec.v2.question import question
from verifier.spec.witness import format_tensors, parse_tensors

NET = "(declare-network f (declare-input X float32 [2]) (declare-input s real []) (declare-output Y float32 [2]))\n"
HEAD = "(vnnlib-version <2.0>)\n" + NET
TYPED = "(vnnlib-version <2.0>)\n(declare-network f (declare-input X float32 [1]) (declare-output Y uint8 [1]))\n"
PAIR = HEAD.replace("(declare-input s real [])", "")


def ask(text: str) -> Question:
    return question(reader.read("q.vnnlib", text.encode()))


# text, line, column, a part of the message
WRONG = [
    ("", 1, 1, "empty"),
    ("(declare-network f)", 1, 2, "vnnlib-version"),
    ("(vnnlib-version 2.0)", 1, 17, "no version"),
    ("(vnnlib-version <2.0>", 1, 22, "end of the file"),
    ("(vnnlib-version <2.0>)\n", 2, 1, "no network"),
    ("(vnnlib-version <2.0>)\n(assert (<= 1.0 2.0))", 2, 2, "before the first"),
    ("(vnnlib-version <2.0>)\n(declare-network 1f)", 2, 18, "no name"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-output Y real [1]))", 2, 18, "declares no input"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [1]))", 2, 18, "declares no output"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-inputs X real [1]))", 2, 21, "'declare-inputs'"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X float [1]))", 2, 37, "no element type"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [1 2]))", 2, 45, "','"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [0]))", 2, 42, "size of zero"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [-1]))", 2, 43, "not a size"),
    ("(vnnlib-version <2.0>)\n(declare-network f (declare-input f real [1]))", 2, 1, ""),
    (
        "(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [1]) (declare-input X real [1]))",
        2,
        62,
        "twice",
    ),
    (
        "(vnnlib-version <2.0>)\n(declare-network f (declare-output Y real [1]) (declare-input X real [1]))",
        2,
        49,
        "inputs first",
    ),
    (
        "(vnnlib-version <2.0>)\n(declare-network f (declare-input X real [1]) (declare-hidden H real [1]))",
        2,
        73,
        "name of an ONNX node",
    ),
    (
        PAIR + "(declare-network g (equal-to h) (declare-input U float32 [2]) (declare-output V float32 [2]))",
        3,
        30,
        "h",
    ),
    (
        PAIR + "(declare-network g (equal-to g) (declare-input U float32 [2]) (declare-output V float32 [2]))",
        3,
        30,
        "itself",
    ),
    (
        PAIR + "(declare-network g (equal-to f) (declare-input U float32 [3]) (declare-output V float32 [2]))",
        3,
        48,
        "shape",
    ),
    (
        PAIR + "(declare-network g (equal-to f) (declare-input U float64 [2]) (declare-output V float32 [2]))",
        3,
        48,
        "type",
    ),
    (
        PAIR + "(declare-network g (declare-input U real [2]) (equal-to f) (declare-output V real [2]))",
        3,
        47,
        "directly",
    ),
    (HEAD + "(assert (<= X[0] 1.0)", 4, 1, ""),
    (HEAD + "(assert (<= X[0] 1.0) 3)", 3, 23, "')'"),
    (HEAD + "(assert (<= X[2] 1.0))", 3, 14, "outside 0 to 1"),
    (HEAD + "(assert (<= X 1.0))", 3, 13, "has 0 indices"),
    (HEAD + "(assert (<= X[0,0] 1.0))", 3, 13, "has 2 indices"),
    (HEAD + "(assert (<= s[0] 1.0))", 3, 13, "without indices"),
    (HEAD + "(assert (<= Z[0] 1.0))", 3, 13, "not declared"),
    (HEAD + "(assert (<= f 1.0))", 3, 13, "a network"),
    (HEAD + "(assert (<= X[0] 1.0 2.0))", 3, 10, "two expressions"),
    (HEAD + "(assert\n  (and (<= X[0] 1.0)\n (foo X[0])))", 5, 3, "no operator"),
    (HEAD + "(assert (and (<= X[0] 1.0) X[0]))", 3, 28, "needs formulas"),
    (HEAD + "(assert (+ 1 2))", 3, 10, "needs a formula"),
    (HEAD + "(assert (<= (and (<= X[0] 1.0)) 1.0))", 3, 14, "not a formula"),
    (HEAD + "(assert (<= X[0] 1.0.0))", 3, 18, "neither a number"),
    (HEAD + "(assert (<= X[0] s))", 3, 18, "types of one comparison"),
    (TYPED + "(assert (<= Y[0] 1.5))", 3, 18, "no number of the type uint8"),
    (TYPED + "(assert (<= Y[0] -1))", 3, 18, "no number of the type uint8"),
    (TYPED + "(assert (<= (+ X[0] Y[0]) 1))", 3, 21, "types of one comparison"),
    (HEAD + "(assert (<= X[0] 1e9999))", 3, 18, "out of range"),
    (HEAD + "; a comment (\n(assert (not (<= X[0] 1.0) (<= X[1] 1.0)))", 4, 10, "takes one"),
    (HEAD + "(assert (and))", 3, 10, "no arguments"),
    (HEAD + "(check-sat)", 3, 2, "'check-sat'"),
    (HEAD + '(assert "', 3, 9, "never closed"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_what_is_wrong_is_named_with_line_and_column(case: int) -> None:
    text, line, column, part = WRONG[case]
    with pytest.raises(InputError) as caught:
        ask(text)
    if part:
        assert str(caught.value).startswith(f"q.vnnlib, line {line}, column {column}: ")
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("(vnnlib-version <3.0>)", "version 3.0"),
        (HEAD + "(assert (<= X[0] 1.0))", "X[0] has no lower bound"),
        (HEAD + f"(assert (<= (* {'X[0] ' * 20}) 1.0))", "degree"),
        (HEAD + "(assert (<= (+ (* 1e200 X[0]) (* 0.3e-200 Y[0])) 0.0))", "no exact common scale"),
    ],
)
def test_what_is_not_supported_is_refused(text: str, part: str) -> None:
    with pytest.raises(UnsupportedPropertyError) as caught:
        ask(text)
    assert part in str(caught.value) and "column" in str(caught.value)


def random_query(rng: random.Random) -> tuple[str, list[object]]:
    """Asserts over two inputs and two outputs on a coarse grid, as text and as trees."""

    def term(depth: int) -> object:
        if depth == 0 or rng.random() < 0.4:
            names = ("X[0]", "X[1]", "Y[0]", "Y[1]")
            return rng.choice(names) if rng.random() < 0.7 else f"{rng.randrange(-8, 9) / 4}"
        return [rng.choice("+-*"), *(term(depth - 1) for _ in range(rng.randrange(1, 4)))]

    def formula(depth: int) -> object:
        if depth == 0 or rng.random() < 0.3:
            return [rng.choice(["<", "<=", ">", ">=", "==", "!="]), term(2), term(2)]
        head = rng.choice(["and", "or", "not", "=>"])
        count = {"not": 1, "=>": 2}.get(head, rng.randrange(1, 4))
        return [head, *(formula(depth - 1) for _ in range(count))]

    def shown(item: object) -> str:
        if not isinstance(item, list):
            return str(item)
        parts = list(map(shown, item))
        return "(" + "".join(part + rng.choice([" ", "  ", "\n", " ; (\n"]) for part in parts) + ")"

    bounds = [["and", [">=", f"X[{i}]", "-1.0"], ["<=", f"X[{i}]", "1.0"]] for i in range(2)]
    trees = [*bounds, *(formula(2) for _ in range(rng.randrange(1, 3)))]
    return PAIR + "\n".join(f"(assert {shown(tree)})" for tree in trees), trees


def true_at(item: object, values: dict[str, Fraction]) -> object:
    if not isinstance(item, list):
        return values[item] if item in values else Fraction(str(item))
    head, args = item[0], [true_at(part, values) for part in item[1:]]
    if head in ("and", "or", "not", "=>"):
        return {
            "and": all(args),
            "or": any(args),
            "not": not args[0],
            "=>": not args[0] or bool(args[-1]),
        }[head]
    total = args[0]
    if head in ("+", "-", "*"):
        for part in args[1:]:
            total = total + part if head == "+" else total - part if head == "-" else total * part
        return -total if head == "-" and len(args) == 1 else total
    a, b = args
    return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b, "==": a == b, "!=": a != b}[head]


def holds(problem: Problem, index: np.ndarray, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether some case holds at inputs x and outputs y of the text; equal inputs are one in the problem."""
    own = np.zeros(problem.n_in)
    own[index] = x
    if not np.array_equal(own[index], x):
        return False
    values = np.concatenate([y, np.zeros(len(problem.products))])
    return any(
        bool((problem.lower[box] <= own).all() and (own <= problem.upper[box]).all())
        and _strictly_inside(problem, box, own)
        and case_holds(problem, case, own, values)
        for case, box in enumerate(problem.case_box)
    )


def _strictly_inside(problem: Problem, box: int, x: np.ndarray) -> bool:
    """On the coarse grid, bounds rounded inward decide about strictness."""
    assert problem.inner_lower is not None and problem.inner_upper is not None
    return bool((problem.inner_lower[box] <= x).all() and (x <= problem.inner_upper[box]).all())


@pytest.mark.parametrize("seed", range(60))
def test_random_queries_mean_what_they_say(seed: int) -> None:
    rng = random.Random(seed)
    compared = 0
    for _ in range(8):
        text, trees = random_query(rng)
        try:
            asked = ask(text)
        except UnsupportedPropertyError:
            continue
        for _ in range(60):
            point = [Fraction(rng.randrange(-9, 10), 8) for _ in range(4)]
            values = dict(zip(("X[0]", "X[1]", "Y[0]", "Y[1]"), point, strict=True))
            x, y = (np.array([float(v) for v in part]) for part in (point[:2], point[2:]))
            wanted = all(true_at(tree, values) for tree in trees)
            assert holds(asked.problem, asked.parts[0].index, x, y) == wanted, (text, point)
            compared += 1
    assert compared


@pytest.mark.parametrize("seed", range(40))
def test_damaged_texts_are_refused_or_read(seed: int) -> None:
    """Whatever is cut out, doubled or swapped: a question or an error with a place, never another exception."""
    rng = random.Random(seed)
    for _ in range(10):
        text = list(random_query(rng)[0])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(0, 5)] = rng.choice(["", "(", ")", "[", '"', ";", "\x00", "X[0]", "<", "é"])
        try:
            ask("".join(text))
        except (InputError, UnsupportedPropertyError) as error:
            assert "q.vnnlib, line" in str(error) or "cases" in str(error) or "supported" in str(error)


def test_deep_nesting_costs_no_recursion() -> None:
    deep = "(- " * 20_000 + "X[0]" + ")" * 20_000
    bounds = "".join(f"(assert (and (>= X[{i}] 0.0) (<= X[{i}] 1.0)))" for i in range(2))
    assert ask(PAIR + bounds + f"(assert (<= {deep} 0.5))").problem.upper[0, 0] == 0.5
    assert ask(PAIR + bounds + "(assert " + "(and " * 9000 + "(<= X[0] 0.5)" + ")" * 9001).problem.n_cases == 1
    with pytest.raises(UnsupportedPropertyError, match="nested"):
        ask(PAIR + "(assert " + "(and (<= X[0] 1.0) (or (<= X[1] 0.5) " * 500 + "(<= X[0] 0.5)" + "))" * 500 + ")")


def test_linear_constraints_tighten_boxes() -> None:
    bounds = "(assert (and (>= X[0] 0.0) (<= X[0] 1.0)))(assert (>= X[1] (- X[0] 0.5)))"
    problem = ask(PAIR + bounds + "(assert (<= (+ X[0] X[1]) 1.0))").problem
    assert problem.lower[0].tolist() == [0.0, -0.5] and problem.upper[0].tolist() == [1.0, 1.0]
    assert ask(PAIR + bounds + "(assert (<= (+ X[0] X[1]) -1.0))").problem.n_cases == 0


def test_equal_inputs_are_one() -> None:
    other = "(declare-network g (equal-to f) (declare-input U float32 [2]) (declare-output V float32 [2]))\n"
    bounds = "(assert (and (>= X[0] 0.0) (<= X[0] 1.0) (>= U[1] 0.0) (<= X[1] 1.0)))"
    asked = ask(PAIR + other + bounds + "(assert (== X[0] U[0]))(assert (== U[1] X[1]))")
    assert asked.problem.n_in == 2
    assert [part.index.tolist() for part in asked.parts] == [[0, 1], [0, 1]]
    assert asked.problem.upper[0].tolist() == [1.0, 1.0]


def test_witnesses_are_read_back() -> None:
    bounds = "(assert (and (>= X[0] 0.0) (<= X[0] 1.0) (== X[1] X[0]) (== s 0.5)))"
    problem = ask(HEAD + bounds).problem
    witness = Witness(np.array([0.1, 0.5]), np.array([1.0, -2.0]), variables=problem.variables)
    text = format_tensors(witness)
    assert text.splitlines()[0] == "X float32 [2]" and text.splitlines()[3] == "s real []"
    x, y = parse_tensors(text, problem.variables)
    assert np.array_equal(x, witness.inputs) and np.array_equal(y, witness.outputs)
    for damaged in (
        text.replace("s real", "t real"),
        text + "1.0\n",
        text.rsplit("\n", 2)[0],
        text.replace("0.1", "0.2", 1),
    ):
        with pytest.raises(InputError):
            parse_tensors(damaged, problem.variables)


def test_the_reference_parser_accepts_what_the_grammar_allows() -> None:
    """Of what the reference accepts, nothing is refused."""
    reference = pytest.importorskip("vnnlib")
    rng, accepted = random.Random(1), 0
    for _ in range(200):
        text = random_query(rng)[0]
        try:
            reference.parse_query_string(text)
        except Exception:
            continue
        accepted += 1
        reader.read("q", text.encode())
    assert accepted > 10
