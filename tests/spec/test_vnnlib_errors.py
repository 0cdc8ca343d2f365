"""Malformed or unsupported property files: one sentence, with the line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from verifier.core.errors import InputError, UnsupportedPropertyError, VerifierError
from verifier.spec.vnnlib import parse_vnnlib

HEAD = "(declare-const X_0 Real)\n(declare-const Y_0 Real)\n"  # 2 lines
BOX = "(assert (>= X_0 0))\n(assert (<= X_0 1))\n"  # 2 lines
GOOD = HEAD + BOX
I, U = InputError, UnsupportedPropertyError

CASES: dict[str, tuple[str, type[VerifierError], int | None, str]] = {
    "empty": ("", I, None, "no input"),
    "only comment": ("; nothing\n", I, None, "no input"),
    "truncated": (GOOD + "(assert (or (and (<= Y_0", I, 5, "never closed"),
    "extra parenthesis": (GOOD + "(assert (<= Y_0 0)))\n", I, 5, "without a matching"),
    "stray word": (GOOD + "assert (<= Y_0 0)\n", I, 5, "outside of any"),
    "double parenthesis": (GOOD + "(assert ((<= Y_0 0)))\n", I, 5, "'(('"),
    "empty list": (GOOD + "(assert ())\n", I, 5, "empty"),
    "empty command": (GOOD + "()\n", I, 5, "not a command"),
    "lost bracket": (GOOD + "(assert (<= Y_0 0)\n(assert (<= Y_0 1))\n", I, 6, "missing"),
    "formula outside": (GOOD + "(<= Y_0 0)\n", I, 5, "outside of an assert"),
    "assert of a variable": (GOOD + "(assert Y_0)\n", I, 5, "comparisons"),
    "assert of a sum": (GOOD + "(assert (+ Y_0 1))\n", I, 5, "comparisons"),
    "assert of two": (GOOD + "(assert (<= Y_0 0) (<= Y_0 1))\n", I, 5, "one formula"),
    "empty or": (GOOD + "(assert (or))\n", I, 5, "no arguments"),
    "one-sided": (GOOD + "(assert (<= Y_0))\n", I, 5, "two arguments"),
    "formula compared": (GOOD + "(assert (<= (and (<= Y_0 0)) 0))\n", I, 5, "not a formula"),
    "unknown name": (GOOD + "(assert (<= Z_0 0))\n", I, 5, "Z_0"),
    "leading zero": (GOOD + "(assert (<= Y_00 0))\n", I, 5, "Y_00"),
    "undeclared": (GOOD + "(assert (<= Y_1 0))\n", I, 5, "Y_1 is not declared"),
    "declared too late": (
        "(declare-const Y_0 Real)\n(assert (<= X_0 1))\n(declare-const X_0 Real)\n",
        I,
        2,
        "not declared before",
    ),
    "twice": (GOOD + "(declare-const X_0 Real)\n", I, 5, "declared twice"),
    "gap in X": ("(declare-const X_0 Real)\n(declare-const X_2 Real)\n(declare-const Y_0 Real)\n", I, 2, "X_1 is not"),
    "gap in Y": (GOOD + "(declare-const Y_2 Real)\n", I, 5, "Y_1 is not"),
    "no outputs": ("(declare-const X_0 Real)\n" + BOX, I, None, "no output"),
    "other name": ("(declare-const input Real)\n", I, 1, "'input'"),
    "integer type": ("(declare-const X_0 Int)\n", U, 1, "'Int'"),
    "bad declaration": ("(declare-const X_0)\n", I, 1, "should read"),
    "nan": (GOOD + "(assert (<= Y_0 nan))\n", I, 5, "finite"),
    "infinite bound": (HEAD + "(assert (<= X_0 inf))\n", I, 3, "finite"),
    "overflow": (HEAD + "(assert (<= X_0 1e999))\n", I, 3, "range"),
    "absurd exponent": (HEAD + "(assert (<= X_0 1e-99999999999))\n", I, 3, "range"),
    "beyond float32": (HEAD + "(assert (<= X_0 3.5e38))\n", I, 3, "float32"),
    "underscored number": (GOOD + "(assert (<= Y_0 1_000))\n", I, 5, "1_000"),
    "hexadecimal": (GOOD + "(assert (<= Y_0 0x10))\n", I, 5, "0x10"),
    "two points": (GOOD + "(assert (<= Y_0 1.2.3))\n", I, 5, "1.2.3"),
    "too many digits": (GOOD + f"(assert (<= Y_0 0.{'1' * 2000}))\n", I, 5, "digits"),
    "inverted": (HEAD + "(assert (>= X_0 1))\n(assert (<= X_0 0.5))\n(assert (<= Y_0 0))\n", I, 4, "above"),
    "inverted in an and": (HEAD + "(assert (and (<= X_0 0.5)\n (>= X_0 1)))\n(assert (<= Y_0 0))\n", I, 4, "above"),
    "no upper bound": (HEAD + "(assert (>= X_0 0))\n(assert (<= Y_0 0))\n", U, 1, "no upper bound"),
    "bound in one arm only": (HEAD + "(assert (>= X_0 0))\n(assert (or (<= X_0 1) (<= Y_0 0)))\n", U, 1, "no upper"),
    "product of variables": (GOOD + "(assert (<= (* X_0 Y_0) 0))\n", U, 5, "product"),
    "division by a variable": (GOOD + "(assert (<= (/ 1 Y_0) 0))\n", U, 5, "division"),
    "division by zero": (GOOD + "(assert (<= (/ Y_0 0) 0))\n", I, 5, "zero"),
    "not": (GOOD + "(assert (not (<= Y_0 0)))\n", U, 5, "'not'"),
    "let": (GOOD + "(assert\n (let (<= Y_0 0)))\n", U, 6, "'let'"),
    "push": (GOOD + "(push 1)\n", U, 5, "'push'"),
    "version 2": ("(vnnlib-version <2.0>)\n(declare-network f (declare-input X Real [1]))\n", U, 1, "2.0"),
    "binary": ("\x00\x01PK\x03", I, 1, "outside of any"),
}


@pytest.mark.parametrize("name", CASES)
def test_error_is_one_sentence_with_the_line(name: str, tmp_path: Path) -> None:
    text, kind, line, words = CASES[name]
    path = tmp_path / "bad.vnnlib"
    path.write_text(text, newline="")
    with pytest.raises(VerifierError) as caught:
        parse_vnnlib(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert words in message
    assert "\n" not in message and len(message) < 300
    found = re.search(r"bad\.vnnlib, line (\d+): ", message)
    assert (int(found.group(1)) if found else None) == line, message
    assert str(path) in message


def test_line_numbers_survive_comments_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_bytes((GOOD + "; (a comment\n\n(assert (<= Y_7 0))\n").replace("\n", "\r\n").encode())
    with pytest.raises(InputError, match="line 7"):
        parse_vnnlib(path)


@pytest.mark.parametrize("cut", range(0, 200, 3))
def test_every_truncation_is_an_error_or_a_whole_file(cut: int, tmp_path: Path) -> None:
    text = GOOD + "(assert (or (and (<= Y_0 0.25) (>= X_0 0.5)) (<= 1 Y_0)))\n(assert (>= (+ Y_0 X_0) -2))\n"
    path = tmp_path / "p.vnnlib"
    path.write_text(text[:cut])
    whole = text[:cut].count("(") == text[:cut].count(")") and cut > len(GOOD) - 2
    if whole:
        assert parse_vnnlib(path).n_cases > 0
    else:
        with pytest.raises(VerifierError, match=re.escape(str(path))):
            parse_vnnlib(path)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        (b"(assert (<= \xff\xfe 0))", 5),
        (b"(assert (<= Y_0 1\xc3))", 5),
        (b"(declare-const \xed\xa0\x80 Real)", 5),
        (b"(assert (<= Y_0\xa0 0))", 5),
        (b"(\x80\n)", 5),
    ],
)
def test_bytes_that_are_no_text_are_an_error_with_the_line(line: bytes, number: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.vnnlib"
    path.write_bytes(GOOD.encode() + line + b"\n")
    with pytest.raises(VerifierError, match=rf"bad\.vnnlib, line {number}: ") as caught:
        parse_vnnlib(path)
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_text_do_no_harm_in_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "p.vnnlib"
    path.write_bytes(b"; M\xe4rz \xff\n" + GOOD.encode() + b"(assert (<= Y_0 0)) ; \xfe\n")
    assert parse_vnnlib(path).n_cases == 1
