"""Properties made from Python."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.core.errors import InputError
from verifier.spec.build import from_box, robustness

values = st.floats(-1e3, 1e3)


@given(st.lists(values, min_size=1, max_size=4), st.floats(0, 2), st.booleans())
def test_robustness_box_contains_the_exact_one(x: list[float], epsilon: float, clip: bool) -> None:
    problem = robustness(x, epsilon, 1, 3, clip=(-1e3, 1e3) if clip else None)
    for i, centre in enumerate(x):
        low, high = Fraction(centre) - Fraction(epsilon), Fraction(centre) + Fraction(epsilon)
        if clip:
            low, high = max(low, Fraction(-1000)), min(high, Fraction(1000))
        lower, upper = problem.lower[0, i], problem.upper[0, i]
        assert Fraction(float(lower)) <= low and high <= Fraction(float(upper))
        assert lower <= problem.witness_lower[0, i] <= problem.witness_upper[0, i] <= upper
        gap = abs(float(low)) * 2.0**-23 + float(np.finfo(np.float32).tiny)
        assert float(low) - float(lower) <= gap * 1.01


def test_robustness_rows_say_that_another_class_wins() -> None:
    problem = robustness(np.zeros((1, 2, 2)), 0.1, 2, 4)
    assert problem.n_in == 4 and problem.n_out == 4 and problem.n_cases == 3
    margins = problem.margins(np.zeros((2, 4)), np.array([[0.0, 1, 2, 0], [0, 3, 2, 2]]))
    assert (margins[0] < 0).all() and (margins[1] >= 0).tolist() == [False, True, True]
    assert robustness([0.0], 0.1, 0, 5, targets=[3]).n_cases == 1


def test_from_box_shares_rows() -> None:
    row = ([1.0, 0.0], 2.0)
    problem = from_box([0.0], [1.0], [[row, ([0.0, 1.0], 0.5)], [row, row], []], n_out=2)
    assert problem.case_rows.tolist() == [[0, 1], [0, -1], [-1, -1]] and problem.row_d.tolist() == [2.0, 0.5]
    assert problem.row_y.shape == (2, 2) and problem.case_box.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: robustness([0.0], -0.1, 0, 2), "negative"),
        (lambda: robustness([0.0], 0.1, 2, 2), "class 2"),
        (lambda: robustness([0.0], 0.1, 0, 2, targets=[0]), "both"),
        (lambda: robustness([np.nan], 0.1, 0, 2), "finite"),
        (lambda: robustness([0.0, 0.0, 0.0], [0.1, 0.1], 0, 2), "epsilon has 2"),
        (lambda: robustness([2.0], 0.1, 0, 2, clip=(0, 1)), "above"),
        (lambda: robustness([2.0], 0.1, 0, 2, clip=(1, 0)), "range"),
        (lambda: from_box([1.0], [0.0], [], 1), "above"),
        (lambda: from_box([1.0, 2.0], [3.0], [], 1), "equally many"),
        (lambda: from_box([0.0], [np.inf], [], 1), "finite"),
        (lambda: from_box([0.0], [1e39], [], 1), "float32"),
        (lambda: from_box([0.0], [1.0], [[([1.0, 2.0], 0.0)]], 1), "2 coefficients"),
        (lambda: from_box([0.0], [1.0], [[([1.0], np.nan)]], 1), "finite"),
    ],
)
def test_bad_arguments(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
