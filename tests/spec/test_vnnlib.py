"""Reading properties: meaning against brute force, fast against general, rounding, speed, sample files."""

from __future__ import annotations

import gzip
import random
import re
import time
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spec.formula import declarations, random_formula, satisfied
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, InputError, UnsupportedPropertyError
from verifier.core.problem import Problem
from verifier.spec import fast, general
from verifier.spec.replay import case_holds
from verifier.spec.source import Source, blank_comments
from verifier.spec.vnnlib import parse_vnnlib

BOX2 = "".join(f"(assert (>= X_{i} -1))(assert (<= X_{i} 1))\n" for i in range(2))


def source(text: str) -> Source:
    return Source("p.vnnlib", blank_comments(text.encode()))


def read(text: str) -> Problem:
    """By the general reader, which must agree with the fast one where that does not decline."""
    slow = general.read(source(text), None, None, None)
    quick = fast.read(source(text), None, None, None)
    if quick is not None:
        assert_same(quick, slow)
    return slow


def read_fast(text: str) -> Problem:
    """As :func:`read`; the fast reader must not decline."""
    assert fast.read(source(text), None, None, None) is not None
    return read(text)


def assert_same(a: Problem, b: Problem) -> None:
    for field in fields(Problem):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, tuple):
            assert left == right, field.name
            continue
        assert (left is None) == (right is None), field.name
        if left is not None:
            assert left.dtype == right.dtype and left.shape == right.shape, field.name
            if field.name.startswith("inner"):
                assert_inside(left, right, np.inf if field.name == "inner_lower" else -np.inf)
            else:
                assert np.array_equal(left, right), field.name
    single_a, single_b = a.typed(np.float32), b.typed(np.float32)
    assert np.array_equal(single_a.inner_lower, single_b.inner_lower)  # type: ignore[arg-type]
    assert np.array_equal(single_a.inner_upper, single_b.inner_upper)  # type: ignore[arg-type]


def assert_inside(quick: np.ndarray, slow: np.ndarray, inward: float) -> None:
    """The fast reader may be one float64 further in, where it did not compare a decimal with its nearest float64."""
    assert np.all((quick == slow) | (quick == np.nextafter(slow, inward)))


def member(problem: Problem, x: list[Fraction], y: list[Fraction], box: str) -> bool:
    """Whether a point is in the problem's set: strictly and by witness boxes, or relaxed and by proof boxes."""
    low, high = (problem.witness_lower, problem.witness_upper) if box == "witness" else (problem.lower, problem.upper)
    xs, ys = np.array([float(v) for v in x]), np.array([float(v) for v in y])
    margins = problem.margins(xs[None], ys[None])[0]
    for case in range(problem.n_cases):
        k = problem.case_box[case]
        if (low[k] <= xs).all() and (xs <= high[k]).all():
            rows = [r for r in problem.case_rows[case] if r >= 0]
            if box == "proof" and all(margins[r] >= 0 for r in rows):
                return True
            if box == "witness" and case_holds(problem, case, xs, ys):
                return True
    return False


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("seed", range(120))
def test_nests_agree_with_brute_force(seed: int, simple: bool) -> None:
    rng = random.Random(seed)
    n_in, n_out = rng.randrange(1, 3), rng.randrange(1, 4)
    text = declarations(n_in, n_out)
    for i in range(n_in):
        text += f"(assert (<= -1 X_{i})) (assert (>= 1 X_{i}))\n"
    for _ in range(rng.randrange(1, 3)):
        text += f"(assert {random_formula(rng, n_in, n_out, 3, simple)})\n"
    try:
        problem = read(text)
    except UnsupportedPropertyError:
        assert "(/" in text
        return
    for _ in range(60):
        x = [Fraction(rng.randrange(-9, 10), 8) for _ in range(n_in)]
        y = [Fraction(rng.randrange(-9, 10), 8) for _ in range(n_out)]
        truth = satisfied(text, x, y)
        assert member(problem, x, y, "witness") == truth, (text, x, y)
        assert member(problem, x, y, "proof") >= truth, (text, x, y)
        if simple:
            assert member(problem, x, y, "proof") == truth, (text, x, y)


@pytest.mark.parametrize("seed", range(60))
def test_fast_reader_takes_common_shapes(seed: int) -> None:
    rng = random.Random(seed)
    n_in, n_out = rng.randrange(1, 4), rng.randrange(2, 5)
    space = lambda: rng.choice(["", " ", "\n", "\r\n", "\t", " ; note (and\n"])  # noqa: E731

    def atom(names: list[str]) -> str:
        return f"({space()}{rng.choice(['<=', '>='])} {rng.choice(names)} {random.Random(rng.random()).uniform(-2, 2)})"

    ys = [f"Y_{j}" for j in range(n_out)]
    text = declarations(n_in, n_out)
    for i in range(n_in):
        text += f"(assert{space()}(>= X_{i} -3.1)){space()}(assert (<= X_{i} 3.7)){space()}"
    for _ in range(rng.randrange(1, 3)):
        arms = []
        for _ in range(rng.randrange(1, 4)):
            atoms = [atom(ys + [f"X_{i}" for i in range(n_in)]) for _ in range(rng.randrange(1, 4))]
            arms.append(atoms[0] if rng.random() < 0.3 else "(and " + space().join(atoms) + ")")
        text += rng.choice(
            [f"(assert (or {space().join(arms)}))", f"(assert (and {atom(ys)}))", f"(assert {atom(ys)})"]
        )
    read_fast(text)


def test_acasxu_shape() -> None:
    text = declarations(2, 3) + "(assert (or (and (<= X_0 .5) (>= X_0 0) (<= X_1 1) (>= X_1 1))"
    text += "(and (<= X_0 1) (>= X_0 .5) (<= X_1 1) (>= X_1 1))))(assert (or (and (<= Y_1 Y_0)) (and (<= Y_2 Y_0))))"
    problem = read_fast(text)
    assert problem.lower.tolist() == [[0, 1], [0.5, 1]] and problem.upper.tolist() == [[0.5, 1], [1, 1]]
    assert problem.row_y.tolist() == [[-1, 1, 0], [-1, 0, 1]] and problem.row_d.tolist() == [0, 0]
    assert problem.case_box.tolist() == [0, 0, 1, 1] and problem.case_rows.tolist() == [[0], [1], [0], [1]]


def test_boxes_rows_and_cases_are_deduplicated() -> None:
    arm = "(and (>= X_0 0.1) (<= X_0 0.2) (<= Y_0 0.3))"
    other = "(and (>= X_0 0.10) (<= X_0 2e-1) (>= Y_0 0.3) (>= Y_0 0.30))"
    problem = read_fast(declarations(1, 1) + f"(assert (or {arm} {other} {arm}))")
    assert problem.lower.shape == (1, 1) and problem.n_cases == 2 and problem.case_rows.shape == (2, 1)


def test_rows_with_inputs_and_input_rows() -> None:
    text = declarations(2, 1) + BOX2 + "(assert (<= (+ (* 2 X_0) (* -0.1 Y_0)) 1.5))(assert (< (+ X_0 X_1) 0.5))"
    problem = read(text)
    assert problem.row_x is not None and problem.row_strict is not None
    assert problem.row_y.tolist() == [[-1], [0]] and problem.row_x.tolist() == [[20, 0], [1, 1]]  # 0.1 is scaled away
    assert problem.row_d.tolist() == [15, 0.5] and problem.row_strict.tolist() == [False, True]


def test_product_of_input_disjunctions_drops_empty_cases() -> None:
    text = declarations(1, 1) + "(assert (>= X_0 0))(assert (<= X_0 3))"
    text += "(assert (or (<= X_0 1) (>= X_0 2)))(assert (or (<= X_0 1.5) (>= X_0 1.75)))(assert (<= Y_0 0))"
    problem = read_fast(text)
    boxes = np.stack([problem.lower, problem.upper], axis=-1)[:, 0]
    assert boxes.tolist() == [[0, 1], [2, 3]] and problem.n_cases == 2


@pytest.mark.parametrize(
    "asserts",
    [
        "(assert (or (>= X_0 2) (and (<= X_0 0) (>= X_0 0.5))))",
        "(assert (< X_0 0.5))(assert (> X_0 0.5))",
        "(assert (<= 1 0))",
        "(assert (< X_0 -1))",
    ],
)
def test_empty_sets_are_refuted_by_definition(asserts: str) -> None:
    problem = read(declarations(2, 1) + BOX2 + asserts + "(assert (<= Y_0 0))")
    assert problem.n_cases == 0 and problem.lower.shape == (0, 2) and problem.n_out == 1


def test_rows_of_dropped_cases_disappear() -> None:
    arms = "(and (>= X_0 2) (<= (+ X_0 Y_0) 9) (< Y_0 4)) (and (<= X_0 0) (<= Y_0 5))"
    problem = read(declarations(2, 1) + BOX2 + f"(assert (or {arms}))")
    assert problem.row_d.tolist() == [5] and problem.row_x is None and problem.row_strict is None
    assert problem.case_rows.tolist() == [[0]] and problem.upper.tolist() == [[0, 1]]


def test_true_constants_vanish() -> None:
    problem = read(declarations(2, 1) + BOX2 + "(assert (<= 0 1))(assert (<= (- Y_0 Y_0) 0))")
    assert problem.n_cases == 1 and problem.case_rows.shape == (1, 0)


def test_strict_bounds_are_closed_for_proofs_and_open_for_witnesses() -> None:
    problem = read(declarations(1, 1) + "(assert (> X_0 0.5))(assert (< X_0 0.1e1))(assert (<= Y_0 0))")
    assert problem.lower[0, 0] == 0.5 and problem.upper[0, 0] == 1
    assert problem.witness_lower[0, 0] == np.nextafter(np.float32(0.5), np.float32(1))
    assert problem.witness_upper[0, 0] == np.nextafter(np.float32(1), np.float32(0))
    narrow = read(declarations(1, 1) + "(assert (> X_0 0.5))(assert (< X_0 0.50000000001))(assert (<= Y_0 0))")
    assert narrow.witness_lower[0, 0] <= narrow.witness_upper[0, 0]


def test_a_strict_bound_beside_one_that_is_not() -> None:
    """Each is treated as it is: of two boxes, of two inputs and of two sides only one is open."""
    box = "(assert (> X_0 1))(assert (<= X_0 2))(assert (>= X_1 1))(assert (< X_1 2))"
    problem = read(declarations(2, 1) + box + "(assert (<= Y_0 0))")
    near = problem.typed(np.float64)
    low, up = problem.witness_lower[0], problem.witness_upper[0]
    assert low.tolist() == [np.nextafter(np.float32(1), np.float32(2)), 1]
    assert up.tolist() == [2, np.nextafter(np.float32(2), np.float32(1))]
    assert near.witness_lower[0, 0] == np.nextafter(1.0, 2.0) and near.witness_upper[0, 1] == np.nextafter(2.0, 1.0)
    assert near.witness_lower[0, 1] == 1 and near.witness_upper[0, 0] == 2
    lower = read(declarations(2, 1) + "(assert (> X_0 1))(assert (<= X_0 2))(assert (>= X_1 1))(assert (<= X_1 2))")
    assert lower.witness_lower[0].tolist() == [np.nextafter(np.float32(1), np.float32(2)), 1]
    upper = read(declarations(2, 1) + "(assert (>= X_0 1))(assert (<= X_0 2))(assert (>= X_1 1))(assert (< X_1 2))")
    assert upper.witness_upper[0].tolist() == [2, np.nextafter(np.float32(2), np.float32(1))]


def test_equality_pins_an_input() -> None:
    problem = read(declarations(1, 1) + "(assert (= X_0 0.1))(assert (= Y_0 0.1))")
    assert float(problem.lower[0, 0]) < 0.1 < float(problem.upper[0, 0])
    assert problem.witness_lower[0, 0] == problem.witness_upper[0, 0] == np.float32(0.1)
    assert problem.row_y.tolist() == [[1], [-1]]


decimals = st.one_of(
    st.floats(-1e6, 1e6, width=32).map(lambda v: f"{v:.40f}"),
    st.floats(-1e6, 1e6).map(repr),
    st.floats(-1e6, 1e6, width=32).map(lambda v: f"{float(v):.17g}"),
    st.decimals(-1000, 1000, allow_nan=False, allow_infinity=False, places=20).map(str),
    st.tuples(st.integers(-(10**18), 10**18), st.integers(-45, 15)).map(lambda p: f"{p[0]}e{p[1]}"),
)


@given(decimals, decimals, decimals)
def test_rounding_is_outward_and_tight(a: str, b: str, d: str) -> None:
    low, high = sorted([a, b], key=Fraction)
    text = declarations(1, 1) + f"(assert (>= X_0 {low}))(assert (<= X_0 {high}))"
    text += f"(assert (<= Y_0 {d}))(assert (>= Y_0 {d}))"
    problem = read(text)
    values = [problem.lower, problem.upper, problem.witness_lower, problem.witness_upper]
    lower, upper, witness_lower, witness_upper = (np.float32(v[0, 0]) for v in values)
    assert Fraction(float(lower)) <= Fraction(low) and Fraction(high) <= Fraction(float(upper))
    assert lower <= witness_lower <= witness_upper <= upper
    assert witness_lower == np.float32(float(low)) and witness_upper == np.float32(float(high))
    tiny = np.finfo(np.float32).tiny
    if abs(lower) > tiny:
        assert Fraction(float(np.nextafter(lower, np.float32(np.inf)))) > Fraction(low)
    if abs(upper) > tiny:
        assert Fraction(float(np.nextafter(upper, np.float32(-np.inf)))) < Fraction(high)
    assert problem.row_d_inner is not None
    for row in range(len(problem.row_d)):  # Y <= d, then -Y <= -d
        sign = 1 if problem.row_y[row, 0] > 0 else -1
        outer, inner = Fraction(float(problem.row_d[row])), Fraction(float(problem.row_d_inner[row]))
        assert inner <= sign * Fraction(d) <= outer
        assert outer == inner or np.nextafter(problem.row_d_inner[row], np.inf) == problem.row_d[row]


def test_double_rounding_does_not_lose_the_exact_bound() -> None:
    # Just above the midpoint of two float32 neighbours, by less than float64 can tell.
    middle = Fraction(1) + Fraction(1, 2**24)
    text = f"{float(middle):.60f}"[:-1] + "1"
    problem = read(declarations(1, 1) + f"(assert (>= X_0 {text}))(assert (<= X_0 {text}))(assert (<= Y_0 0))")
    assert Fraction(float(problem.lower[0, 0])) <= Fraction(text) <= Fraction(float(problem.upper[0, 0]))


def test_exact_float32_text_that_differs_beyond_float64() -> None:
    text = "0.5000000000000000000000000001"
    problem = read_fast(declarations(1, 1) + f"(assert (>= X_0 0))(assert (<= X_0 {text}))(assert (<= Y_0 {text}))")
    assert float(problem.upper[0, 0]) > 0.5 and problem.witness_upper[0, 0] == 0.5 and problem.row_d[0] > 0.5
    assert problem.row_d_inner is not None and problem.row_d_inner[0] == 0.5


def test_line_ends_comments_and_gzip(tmp_path: Path) -> None:
    text = "; c (assert\r\n" + declarations(1, 1).replace("\n", "\r\n")
    text += "(assert (>= X_0 0)) ; low\r\n(assert (<= X_0 1))\r\n(assert (<= Y_0 0))"
    plain, packed = tmp_path / "a.vnnlib", tmp_path / "b.vnnlib.gz"
    plain.write_bytes(text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    first = parse_vnnlib(plain, 1, 1)
    assert_same(first, parse_vnnlib(packed, 1, 1))
    assert_same(first, parse_vnnlib(tmp_path / "b.vnnlib"))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        parse_vnnlib(tmp_path / "b.vnnlib")
    with pytest.raises(InputError, match="does not exist"):
        parse_vnnlib(tmp_path / "c.vnnlib")
    with pytest.raises(InputError, match="folder"):
        parse_vnnlib(tmp_path)


def test_sizes_are_compared_with_the_network(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_text(declarations(2, 1) + BOX2 + "(assert (<= Y_0 0))")
    assert parse_vnnlib(path, 2, 1).n_in == 2
    with pytest.raises(InputError, match=r"2 inputs .* the network has 3"):
        parse_vnnlib(path, n_in=3)
    with pytest.raises(InputError, match=r"1 outputs .* the network has 4"):
        parse_vnnlib(path, n_out=4)


def test_deep_nests_need_no_recursion() -> None:
    depth = 50_000
    text = declarations(2, 1) + BOX2
    text += "(assert " + "(and (or " * depth + "(<= Y_0 0)" + "))" * depth + ")"
    text += "(assert (<= " + "(+ 1 " * 2000 + "Y_0" + ")" * 2000 + " 0))"
    assert sorted(read(text).row_d.tolist()) == [-2000, 0]


def test_blow_up_is_refused_quickly() -> None:
    choice = "(or (<= Y_0 1) (>= Y_0 2) (= X_0 0))"
    start = time.monotonic()
    with pytest.raises(UnsupportedPropertyError, match="cases"):
        read(declarations(2, 1) + BOX2 + f"(assert (and {choice * 30}))")
    with pytest.raises(UnsupportedPropertyError, match="cases"):
        many = "".join(f"(assert (or (<= Y_{j} 0) (>= Y_{j} 1)))" for j in range(25))
        read(declarations(2, 25) + BOX2 + many)
    assert time.monotonic() - start < 10


def test_deadline_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_text(declarations(2, 1) + BOX2 + "(assert (< Y_0 0))")
    with pytest.raises(DeadlineExceeded):
        parse_vnnlib(path, deadline=Deadline(0))


def test_inexact_coefficients_are_scaled_or_refused() -> None:
    problem = read(declarations(2, 2) + BOX2 + "(assert (<= (+ (* 0.3 Y_0) (* 0.7 Y_1)) 0.11))")
    assert problem.row_y.tolist() == [[3, 7]] and problem.row_d[0] == 1.1
    with pytest.raises(UnsupportedPropertyError, match="line 7"):
        read(declarations(2, 2) + BOX2 + "(assert (<= (+ (* 0.12345678901234567891 Y_0) Y_1) 0))")


def test_large_input_disjunction_is_fast(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        f"(and (>= X_0 {a:.16f}) (<= X_0 {a + 1e-3:.16f}) ({op} Y_0 {y:.16f}))\n"
        for a, y in rng.random((20_000, 2))
        for op in ("<=", ">=")
    ]
    path = tmp_path / "big.vnnlib"
    path.write_text(declarations(1, 1) + "(assert (or\n" + "".join(lines) + "))\n")
    start = time.monotonic()
    problem = parse_vnnlib(path)
    assert problem.n_cases == 40_000 and len(problem.lower) <= 20_000
    assert time.monotonic() - start < 5  # 0.3 s on an idle core


def test_many_inputs_are_fast(tmp_path: Path) -> None:
    n = 12_288
    path = tmp_path / "wide.vnnlib"
    bounds = "".join(f"(assert (<= X_{i} 0.{i}1))\n(assert (>= X_{i} -0.{i}))\n" for i in range(n))
    path.write_text(declarations(n, 2) + bounds + "(assert (<= Y_0 Y_1))")
    start = time.monotonic()
    assert parse_vnnlib(path).lower.shape == (1, n)
    assert time.monotonic() - start < 2  # 0.1 s on an idle core


@pytest.mark.sample
def test_all_sample_files_are_read(sample: Path) -> None:
    files = sorted(path for path in sample.glob("*/vnnlib/*") if path.suffix in (".vnnlib", ".gz"))
    assert len(files) > 100
    for path in files:
        problem = parse_vnnlib(path)
        assert problem.n_cases > 0 and (problem.lower <= problem.upper).all(), path
        assert (problem.witness_lower <= problem.witness_upper).all(), path
        assert (problem.lower <= problem.witness_lower).all() and (problem.witness_upper <= problem.upper).all(), path


@pytest.mark.sample
def test_readers_agree_on_small_sample_files(sample: Path) -> None:
    files = sorted(path for path in sample.glob("*/vnnlib/*.vnnlib") if path.stat().st_size < 60_000)
    assert len(files) > 50
    for path in files[::4]:
        read_fast(path.read_text())


@pytest.mark.parametrize("seed", range(200))
def test_fast_reader_never_accepts_what_the_general_one_refuses(seed: int) -> None:
    rng = random.Random(seed)
    text = declarations(1, 2) + "(assert (<= X_0 1)) (assert (>= X_0 -1)) (assert (and (<= Y_0 0.5) (>= Y_1 Y_0)))"
    text += "(assert (or (and (<= Y_0 2) (>= 0.25 X_0)) (>= Y_1 3e-1) (and (<= Y_0 Y_1))))"
    words = re.findall(r"[()]|[^\s()]+", text)
    for _ in range(rng.randrange(1, 4)):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        change = rng.randrange(4)
        if change == 0:
            del words[i]
        elif change == 1:
            words.insert(i, words[j])
        elif change == 2:
            words[i] = rng.choice(
                [*words, "X_00", "Y_9", "nan", "+1", "-.5", "1.", "1e", "--1", "1e-400", "3.5e38", "0e9999"]
            )
        else:
            words[i], words[j] = words[j], words[i]
    quick = fast.read(source(" ".join(words)), None, None, None)
    if quick is not None:
        assert_same(quick, general.read(source(" ".join(words)), None, None, None))
