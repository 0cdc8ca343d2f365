"""Replay and checking: only exact counterexamples pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.spec.formula import declarations
from verifier.core.errors import InputError
from verifier.core.problem import Problem
from verifier.core.result import Verdict, Witness
from verifier.spec.build import from_box
from verifier.spec.replay import Status, case_holds, case_margins, check_answer, check_results, replay, replay_batch
from verifier.spec.vnnlib import parse_vnnlib
from verifier.spec.witness import Answer, format_witness

Function = Callable[[np.ndarray], np.ndarray]


class Net:
    """A function as the reference network; ``plain`` is what it computes with optimisations off."""

    def __init__(self, function: Function, plain: Function | None = None) -> None:
        self.function, self.plain, self.calls = function, plain or function, 0

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        self.calls += 1
        return (self.function if optimised else self.plain)(x.astype(np.float32)).astype(np.float32)


SUM = Net(lambda x: x.sum(axis=1, keepdims=True))


def unit(row: tuple[list[float], float], n_in: int = 2) -> Problem:
    return from_box(np.zeros(n_in), np.ones(n_in), [[row]], 1)


def test_a_counterexample_is_replayed() -> None:
    witness = replay(SUM, unit(([1.0], 0.5)), np.array([0.25, 0.125]))
    assert witness is not None and witness.inputs.tolist() == [0.25, 0.125] and witness.outputs.tolist() == [0.375]
    assert witness.margin == 0.125 and witness.case == 0


def test_a_safe_point_is_not() -> None:
    assert replay(SUM, unit(([1.0], 0.5)), np.array([0.5, 0.25])) is None


def test_candidates_are_clamped_into_the_box() -> None:
    witness = replay(SUM, unit(([1.0], 0.5)), np.array([-3.0, np.nan]))
    assert witness is not None and witness.inputs.tolist() == [0.0, 0.0]


def test_both_optimisation_levels_must_agree() -> None:
    net = Net(lambda x: x[:, :1], lambda x: x[:, :1] + 1)
    assert replay(net, unit(([1.0], 0.5)), np.array([0.25, 0.0])) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_prove_nothing(value: float) -> None:
    net = Net(lambda x: np.full((len(x), 1), value))
    problem = unit(([1.0], 0.5))
    assert replay(net, problem, np.zeros(2)) is None
    assert replay_batch(net, problem, np.zeros((3, 2))) is None
    assert check_answer(net, problem, Answer(Verdict.SAT, np.zeros(2))).status is Status.INVALID


def read(text: str, tmp_path: Path) -> Problem:
    path = tmp_path / "p.vnnlib"
    path.write_text(text)
    return parse_vnnlib(path)


def test_no_tolerance_at_the_decimal(tmp_path: Path) -> None:
    # float64(0.1) is above 0.1, float32(0.1) further: only values at most the decimal count.
    identity = Net(lambda x: x)
    text = declarations(1, 1) + "(assert (<= X_0 1))(assert (>= X_0 0))(assert (<= Y_0 0.1))"
    problem = read(text, tmp_path)
    assert replay(identity, problem, np.array([np.float32(0.1)])) is None
    below = np.nextafter(np.float32(0.1), np.float32(0))
    assert replay(identity, problem, np.array([below])) is not None


@pytest.mark.parametrize(("op", "found"), [("<", False), ("<=", True)])
def test_strict_rows_are_kept_strict(op: str, found: bool, tmp_path: Path) -> None:
    identity = Net(lambda x: x)
    problem = read(declarations(1, 1) + f"(assert (<= X_0 0.5))(assert (>= X_0 0.5))(assert ({op} Y_0 0.5))", tmp_path)
    assert (replay(identity, problem, np.array([0.5])) is not None) == found
    status = check_answer(identity, problem, Answer(Verdict.SAT, np.array([0.5]))).status
    assert status is (Status.VALID if found else Status.INVALID)


def test_the_right_case_of_many_boxes(tmp_path: Path) -> None:
    arms = "".join(f"(and (>= X_0 {i}) (<= X_0 {i}.5) ({'<=' if i % 2 else '>='} Y_0 {i}.25))" for i in range(40))
    problem = read(declarations(1, 1) + f"(assert (or {arms}))", tmp_path)
    identity = Net(lambda x: x)
    for x, case in ((7.125, 7), (7.75, None), (8.375, 8), (8.125, None), (-5.0, None), (90.0, 39)):
        witness = replay(identity, problem, np.array([x]))
        assert (None if witness is None else witness.case) == (case if x != 90.0 else None)
    points = np.linspace(0, 40, 333)[:, None]
    before = identity.calls
    batch = replay_batch(identity, problem, points)
    assert batch is not None and identity.calls - before <= 5
    assert replay_batch(Net(lambda x: np.full((len(x), 1), 1e-3)), problem, points[:1] * 0) is None


def test_problem_without_cases_has_no_witness(tmp_path: Path) -> None:
    text = declarations(1, 1) + "(assert (<= X_0 1))(assert (>= X_0 0))(assert (or (>= X_0 2) (<= 2 1)))"
    problem = read(text, tmp_path)
    identity = Net(lambda x: x)
    assert replay(identity, problem, np.zeros(1)) is None and replay_batch(identity, problem, np.zeros((2, 1))) is None
    assert check_answer(identity, problem, Answer(Verdict.SAT, np.zeros(1))).status is Status.INVALID


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4), st.floats(-1, 1))
def test_a_witness_always_satisfies_its_case(x: list[float], d: float) -> None:
    problem = from_box(
        [-0.7, -0.3], [0.3, 0.1], [[([1.0, -1.0], d), ([0.3, 0.0], 0.2)], [([-1.0, 0.1], -0.5)]], n_out=2
    )
    net = Net(lambda v: np.stack([v[:, 0] * np.float32(3) - v[:, 1], v[:, 1] / np.float32(3)], axis=1))
    for witness in (replay(net, problem, np.array(x[:2])), replay_batch(net, problem, np.array(x).reshape(2, 2))):
        if witness is None:
            continue
        box = problem.case_box[witness.case]
        assert (problem.witness_lower[box] <= witness.inputs).all()
        assert (witness.inputs <= problem.witness_upper[box]).all()
        y = net.evaluate(witness.inputs[None])[0]
        assert case_holds(problem, witness.case, witness.inputs, y) and witness.margin >= 0
        answer = Answer(Verdict.SAT, witness.inputs)
        assert check_answer(net, problem, answer).status is Status.VALID


def test_case_margins_match_the_rows() -> None:
    problem = from_box([0.0], [1.0], [[([1.0, 0.0], 1.0), ([0.0, 1.0], 2.0)], [([1.0, -1.0], 0.0)], []], n_out=2)
    y = np.array([[0.25, 1.75], [3.0, 0.0]])
    margins = case_margins(problem, np.zeros((2, 1)), y, np.arange(3))
    assert margins.tolist() == [[0.25, 1.5, np.inf], [-2.0, -3.0, np.inf]]


def outcome(text: str, tmp_path: Path, problem: Problem | None = None) -> tuple[str, int]:
    path = tmp_path / "r.txt"
    path.write_text(text)
    result = check_results(SUM, problem or unit(([1.0], 0.5)), path)
    return result.text, result.exit_code


def test_check_of_results_files(tmp_path: Path) -> None:
    good = "sat\n" + format_witness(Witness(np.array([0.25, 0.0]), np.array([99.0])))
    assert outcome(good, tmp_path) == ("valid", 0)
    assert outcome("sat\n((X_0 -0.00005) (X_1 0.0))", tmp_path) == ("tolerance", 4)
    for text, words in [
        ("sat\n((X_0 -0.0002) (X_1 0.0))", "X_0 = -0.000199999995 is outside [0, 1]"),
        ("sat\n((X_0 0.5) (X_1 0.000001))", "violated by"),
        ("sat\n((X_0 0.5))", "1 inputs"),
        ("sat\n", "0 inputs"),
        ("unsat\n", "unsat"),
        ("sat\n((X_0 0.5) (X_1", "not of the form"),
        ("sat\n((X_0 1e300) (X_1 0))", "range"),
    ]:
        line, code = outcome(text, tmp_path)
        assert line.startswith("invalid: ") and words in line and code == 5, line
    with pytest.raises(InputError, match="does not exist"):
        check_results(SUM, unit(([1.0], 0.5)), tmp_path / "missing.txt")


def test_check_compares_with_bounds_rounded_to_float32(tmp_path: Path) -> None:
    problem = from_box([0.1], [0.1], [[([1.0], 1.0)]], 1)
    near = np.float32(0.1)
    assert outcome(f"sat\n((X_0 {float(near)!r}))", tmp_path, problem)[0] == "valid"
    assert outcome("sat\n((X_0 0.1))", tmp_path, problem)[0] == "valid"
    beside = float(np.nextafter(near, np.float32(1)))
    assert outcome(f"sat\n((X_0 {beside!r}))", tmp_path, problem)[0] == "tolerance"
    text = tmp_path / "r.txt"
    text.write_text("sat\n((X_0 0.1))")
    assert check_results(SUM, problem, text, np.float64).text == "tolerance"
