"""Counterexample text: round trips and clear errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.core.errors import InputError
from verifier.core.result import Verdict, Witness
from verifier.spec.witness import clamp, format_number, format_witness, parse_results, parse_witness

singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
doubles = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(singles, min_size=1, max_size=5), st.lists(doubles, min_size=1, max_size=5))
def test_text_gives_the_same_numbers_back(x: list[float], y: list[float]) -> None:
    witness = Witness(np.array(x), np.array(y))
    text = format_witness(witness)
    inputs, outputs = parse_witness(text)
    assert np.array_equal(inputs, witness.inputs) and np.array_equal(outputs, witness.outputs)
    assert np.array_equal(inputs.astype(np.float32), np.array(x, dtype=np.float32))
    for value in re.findall(r"_\d+ ([^)]+)", text):
        assert len(re.sub(r"[-.]|e.*", "", value).lstrip("0") or "0" * 9) >= 9


def test_form_of_the_competition() -> None:
    text = format_witness(Witness(np.array([0.5, -2e-9]), np.array([3.0])))
    assert text == f"((X_0 {format_number(0.5)})\n (X_1 {format_number(-2e-9)})\n (Y_0 {format_number(3.0)}))\n"
    assert float(format_number(-2e-9)) == -2e-9 and format_number(0.5) == "0.50000000000000000"


def test_results_files(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_bytes(b"sat\r\n((X_0 0.025000000745)\r\n (X_1 1e-3) (Y_0 -3.5E0)\r\n)\r\n")
    answer = parse_results(path)
    assert answer.verdict is Verdict.SAT and answer.inputs is not None and answer.outputs is not None
    assert answer.inputs.tolist() == [0.025000000745, 1e-3] and answer.outputs.tolist() == [-3.5]
    for word in ("unsat", "unknown", "timeout", "error"):
        path.write_text(word)
        assert parse_results(path).verdict.value == word and parse_results(path).inputs is None


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "not one of"),
        ("SAT\n", 1, "not one of"),
        ("sat ((X_0 1))\n", 1, "not one of"),
        ("sat\n((X_0 1)\n (X_2 1))\n", 3, "X_1 should stand"),
        ("sat\n((X_0 1)\n (X_0 1))\n", 3, "X_1 should stand"),
        ("sat\n((Y_0 1)\n (X_0 1))\n", 3, "Y_1 should stand"),
        ("sat\n((X_0 nan))\n", 2, "finite"),
        ("sat\n((X_0 1e999))\n", 2, "finite"),
        ("sat\n((X_0 0,5))\n", 2, "finite"),
        ("sat\n((X_0 1)\n (X_1 2)\n", 4, "not of the form"),
        ("sat\n((X_0 1)\n (X_1\n", 3, "not of the form"),
        ("sat\n((X_0 1)\n X_1 2)\n", 3, "not of the form"),
    ],
)
def test_bad_results_files(text: str, line: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        parse_results(path)
    assert f"r.txt, line {line}:" in str(caught.value) and "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.floats(allow_nan=True), singles, singles), min_size=1, max_size=6))
def test_clamp_stays_inside_and_keeps_the_inside(rows: list[tuple[float, float, float]]) -> None:
    x = np.array([r[0] for r in rows])
    lower = np.array([min(r[1:]) for r in rows], dtype=np.float32)
    upper = np.array([max(r[1:]) for r in rows], dtype=np.float32)
    for dtype in (np.float32, np.float64):
        point = clamp(x, lower, upper, dtype)
        assert point.dtype == np.float64 and (lower <= point).all() and (point <= upper).all()
        assert np.array_equal(point, point.astype(dtype).astype(np.float64))
        with np.errstate(over="ignore"):
            cast = x.astype(dtype)
        inside = (lower <= cast) & (cast <= upper)
        assert np.array_equal(point[inside], cast[inside].astype(np.float64))
