"""Decides whether a candidate is a counterexample: on the reference network, from its printed text, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError
from verifier.core.problem import Problem
from verifier.core.result import Verdict, Witness
from verifier.spec.witness import Answer, clamp, format_witness, parse_results, read_witness

TOLERANCE = 1e-4  # of inputs, by the competition's rules for a partly accepted counterexample
_MAX_BOXES = 16  # tried per candidate
_MAX_REPLAYS = 32  # candidates of a batch that are replayed one by one
_ELEMENTS = 2**22  # of temporary arrays
_SLACK = 1e-9  # relative; how much the float64 pre-filter may err


class Reference(Protocol):
    """The network that decides (onnxruntime, or the module itself)."""

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        """(n, n_in) to (n, n_out); casts to the network's input type."""
        ...


class Status(StrEnum):
    """Outcome of a check."""

    VALID = "valid"
    TOLERANCE = "tolerance"
    INVALID = "invalid"


@dataclass(frozen=True)
class CheckOutcome:
    """Result of checking a results file."""

    status: Status
    reason: str = ""

    @property
    def text(self) -> str:
        """``valid``, ``tolerance`` or ``invalid: reason``."""
        return f"{self.status.value}: {self.reason}" if self.status is Status.INVALID else self.status.value

    @property
    def exit_code(self) -> int:
        return {Status.VALID: 0, Status.TOLERANCE: 4, Status.INVALID: 5}[self.status]


def row_holds(problem: Problem, row: int, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether one row holds at float values in exact arithmetic; strict rows strictly, NaN and infinity never."""
    total = Fraction(0)
    for coefficients, is_input in (
        (problem.row_y[row], False),
        (None if problem.row_x is None else problem.row_x[row], True),
    ):
        if coefficients is None:
            continue
        for i in np.flatnonzero(coefficients):
            value = _exact(problem, int(i) if is_input else ~int(i), x, y)
            if value is None:
                return False
            total += Fraction(float(coefficients[i])) * value
    limits = problem.row_d if problem.row_d_inner is None else problem.row_d_inner
    limit = Fraction(float(limits[row]))
    strict = problem.row_strict is not None and bool(problem.row_strict[row])
    return total < limit if strict else total <= limit


def _exact(problem: Problem, variable: int, x: np.ndarray, y: np.ndarray) -> Fraction | None:
    """Input i >= 0 or output ~i; a product from its factors, whatever y says. None: not finite."""
    if variable < 0 and ~variable >= problem.n_values:
        total = Fraction(1)
        for factor in problem.products[~variable - problem.n_values]:
            value = _exact(problem, factor, x, y)
            if value is None:
                return None
            total *= value
        return total
    value = float(x[variable] if variable >= 0 else y[~variable])
    return Fraction(value) if np.isfinite(value) else None


def case_holds(problem: Problem, case: int, x: np.ndarray, y: np.ndarray) -> bool:
    """Whether all rows of a case hold exactly at x (n_in,), y (n_out,); boxes are not looked at."""
    return all(row_holds(problem, int(row), x, y) for row in problem.case_rows[case] if row >= 0)


def case_margins(problem: Problem, x: np.ndarray, y: np.ndarray, cases: np.ndarray) -> np.ndarray:
    """Smallest slack over each case's rows in float64, without looking at boxes.

    Args:
        x: (n, n_in); y: (n, n_out); cases: (C,) indices.

    Returns:
        (n, C); infinite for a case without rows, minus infinity where a value is not finite.
    """
    rows = problem.case_rows[cases]
    used, place = np.unique(rows, return_inverse=True)
    place = place.reshape(rows.shape)
    value = y.astype(np.float64) @ problem.row_y[used].T
    if problem.row_x is not None:
        value = value + x.astype(np.float64) @ problem.row_x[used].T
    slack = np.nan_to_num(problem.row_d[used] - value, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
    slack[:, used < 0] = np.inf
    out = np.full((x.shape[0], len(cases)), np.inf)
    for column in range(rows.shape[1]):
        np.minimum(out, slack[:, place[:, column]], out=out)
    return out


def replay(
    network: Reference,
    problem: Problem,
    x: np.ndarray,
    dtype: np.dtype | type | None = None,
    exact: bool = False,
) -> Witness | None:
    """A witness made from ``x``, or None.

    The candidate is clamped into the nearest boxes, printed, read back, and evaluated with the reference's
    optimisations on and off; a case's rows must hold under both, in exact arithmetic. Boxes rounded inward come first,
    those rounded to nearest after all of them.

    Args:
        x: (n_in,), any floating type.
        dtype: of the network's input, in which the witness is; default that of the problem's witness bounds.
        exact: boxes rounded inward alone.
    """
    problem = problem.typed(dtype or problem.dtype)
    point = np.asarray(x).reshape(-1)
    tried: set[tuple[int, bytes]] = set()
    for bounds in _bounds(problem, exact):
        for box in _near_boxes(problem, point):
            clamped = clamp(point, bounds[0][box], bounds[1][box], problem.dtype)
            if (box, clamped.tobytes()) in tried:
                continue
            tried.add((box, clamped.tobytes()))
            witness = _replay_in_box(network, problem, clamped, np.flatnonzero(problem.case_box == box))
            if witness is not None:
                return witness
    return None


def _bounds(problem: Problem, exact: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lower and upper bounds (K, n_in) that a witness may lie in: rounded inward, then to nearest."""
    if problem.inner_lower is not None and problem.inner_upper is not None:
        yield problem.inner_lower, problem.inner_upper
    if not exact or problem.inner_lower is None:
        yield problem.witness_lower, problem.witness_upper


def replay_batch(
    network: Reference,
    problem: Problem,
    x: np.ndarray,
    deadline: Deadline | None = None,
    dtype: np.dtype | type | None = None,
) -> Witness | None:
    """The first witness among many candidates, those with the widest margin first.

    Candidates are clamped into the boxes that hold them, else into the nearest one, and filtered by one batched
    evaluation before any is replayed.

    Args:
        x: (n, n_in).
        dtype: as for :func:`replay`.
    """
    problem = problem.typed(dtype or problem.dtype)
    for bounds in _bounds(problem, exact=False):
        witness = _replay_batch(network, problem, np.asarray(x).reshape(len(x), -1), bounds, deadline)
        if witness is not None:
            return witness
    return None


def _replay_batch(
    network: Reference,
    problem: Problem,
    points: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
    deadline: Deadline | None,
) -> Witness | None:
    """:func:`replay_batch` in boxes of one rounding."""
    pairs = [(i, box) for i, point in enumerate(points) for box in _boxes_around(problem, point)]
    if not pairs:
        return None
    kept, places = [i for i, _ in pairs], [box for _, box in pairs]
    clamped = np.stack([clamp(points[i], bounds[0][k], bounds[1][k], problem.dtype) for i, k in pairs])
    outputs = network.evaluate(clamped, optimised=True).reshape(len(kept), -1)
    found: list[tuple[float, int, np.ndarray]] = []
    for j, box in enumerate(places):
        cases = np.flatnonzero(problem.case_box == box)
        margins = case_margins(problem, clamped[j : j + 1], outputs[j : j + 1], cases)[0]
        likely = cases[margins >= -_tolerance(problem, outputs[j])]
        if len(likely):
            found.append((-float(margins.max()), j, likely))
    for _, j, cases in sorted(found, key=lambda entry: entry[:2])[:_MAX_REPLAYS]:
        if deadline is not None:
            deadline.check("the replay of counterexamples")
        witness = _replay_in_box(network, problem, clamped[j], cases)
        if witness is not None:
            return witness
    return None


def check_results(
    network: Reference, problem: Problem, path: str | Path, dtype: np.dtype | type = np.float32
) -> CheckOutcome:
    """Check the counterexample of a results file by the competition's rules of 2026.

    The reference runs the file's X, cast to ``dtype``; the file's Y are ignored. All rows of some case must hold.
    X inside the case's box, bounds rounded to float32 and for a float64 network to float64 too, is ``valid``; within
    1e-4 of it is ``tolerance``.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        answer = parse_results(path, problem.variables)
    except InputError as error:
        if not Path(path).exists():
            raise
        return CheckOutcome(Status.INVALID, str(error))
    return check_answer(network, problem, answer, dtype)


def check_answer(
    network: Reference, problem: Problem, answer: Answer, dtype: np.dtype | type = np.float32
) -> CheckOutcome:
    """:func:`check_results` for an answer that has been read."""
    if answer.verdict is not Verdict.SAT or answer.inputs is None:
        return CheckOutcome(Status.INVALID, f"the verdict is {answer.verdict.value}, so there is no counterexample")
    if len(answer.inputs) != problem.n_in:
        return CheckOutcome(
            Status.INVALID, f"the counterexample has {len(answer.inputs)} inputs, the property {problem.n_in}"
        )
    if not problem.n_cases:
        return CheckOutcome(Status.INVALID, "the property excludes every input")
    single, problem = problem, problem.typed(dtype)
    with np.errstate(over="ignore"):
        x = answer.inputs.astype(dtype).astype(np.float64)
    if not np.isfinite(x).all():
        return CheckOutcome(Status.INVALID, "an input is outside the range of the network's input type")
    distance = np.maximum(_distances(problem, x), _distances(single, x))
    y = network.evaluate(x[None], optimised=True).reshape(-1).astype(np.float64)
    for status, boxes in ((Status.VALID, distance == 0), (Status.TOLERANCE, distance <= TOLERANCE)):
        cases = np.flatnonzero(boxes[problem.case_box])
        if next(_holding(problem, x, y, cases), None) is not None:
            return CheckOutcome(status)
    return CheckOutcome(Status.INVALID, _why(problem, x, y, distance))


def _why(problem: Problem, x: np.ndarray, y: np.ndarray, distance: np.ndarray) -> str:
    """One reason why no case holds at x."""
    box = int(distance.argmin())
    lower, upper = _witness_box(problem, box)
    if distance[box] > TOLERANCE:
        worst = int(np.maximum(lower - x, x - upper).argmax())
        digits = 9 if problem.dtype == np.float32 else 17
        return (
            f"X_{worst} = {x[worst]:.{digits}g} is outside [{lower[worst]:.{digits}g}, {upper[worst]:.{digits}g}] "
            f"by {distance[box]:.3g}, more than {TOLERANCE:g}"
        )
    cases = np.flatnonzero((distance <= TOLERANCE)[problem.case_box])
    margins = case_margins(problem, x[None], y[None], cases)[0]
    best = int(margins.argmax())
    if not np.isfinite(margins[best]):
        return "the network's output is not finite"
    short = f"violated by {-margins[best]:.3g}" if margins[best] < 0 else "violated by less than rounding"
    return f"the output constraints do not hold; the nearest case is {short}"


def _replay_in_box(network: Reference, problem: Problem, x: np.ndarray, cases: np.ndarray) -> Witness | None:
    """Replay the printed text of a clamped point (n_in,) against some cases of its box."""
    y = network.evaluate(x[None], optimised=True).reshape(-1).astype(np.float64)
    runs: list[np.ndarray] = []
    for case in _holding(problem, x, y, cases):
        margin = float(case_margins(problem, x[None], y[None], np.array([case]))[0, 0])
        witness = Witness(x, y, max(margin, 0.0), case, problem.variables)
        printed, _ = read_witness(format_witness(witness), problem.variables)
        lower, upper = _witness_box(problem, int(problem.case_box[case]))
        if not (np.array_equal(printed, x) and (lower <= printed).all() and (printed <= upper).all()):
            return None
        runs = runs or [
            network.evaluate(printed[None], optimised=optimised).reshape(-1).astype(np.float64)
            for optimised in (True, False)
        ]
        if all(case_holds(problem, case, printed, again) for again in runs):
            return witness
    return None


def _holding(problem: Problem, x: np.ndarray, y: np.ndarray, cases: np.ndarray) -> Iterator[int]:
    """Those among some cases whose rows hold exactly, that with the widest margin first."""
    if not len(cases):
        return
    margins = case_margins(problem, x[None], y[None], cases)[0]
    likely = np.flatnonzero(margins >= -_tolerance(problem, y))
    for i in likely[np.argsort(-margins[likely], kind="stable")]:
        if case_holds(problem, int(cases[i]), x, y):
            yield int(cases[i])


def _tolerance(problem: Problem, y: np.ndarray) -> float:
    """What float64 may lose in a row's slack; only a pre-filter rests on it."""
    finite = np.abs(y[np.isfinite(y)])
    return _SLACK * (1.0 + float(finite.max(initial=0.0)) + float(np.abs(problem.row_d).max(initial=0.0)))


def _witness_box(problem: Problem, box: int) -> tuple[np.ndarray, np.ndarray]:
    return problem.witness_lower[box], problem.witness_upper[box]


def _distances(problem: Problem, x: np.ndarray) -> np.ndarray:
    """Largest amount by which x leaves each witness box, (K,); 0 inside."""
    out = np.empty(len(problem.witness_lower))
    step = max(1, _ELEMENTS // max(problem.n_in, 1))
    for i in range(0, len(out), step):
        lower, upper = problem.witness_lower[i : i + step], problem.witness_upper[i : i + step]
        out[i : i + step] = np.maximum(np.maximum(lower - x, x - upper), 0.0).max(axis=1)
    return np.nan_to_num(out, nan=np.inf)


def _boxes_around(problem: Problem, x: np.ndarray) -> list[int]:
    """The boxes that hold x; the nearest one where none does."""
    if not problem.n_cases:
        return []
    distance = _distances(problem, x.astype(np.float64))
    inside = np.flatnonzero(distance == 0)[:_MAX_BOXES]
    return [int(k) for k in inside] or [int(distance.argmin())]


def _near_boxes(problem: Problem, x: np.ndarray) -> Iterator[int]:
    """Boxes that hold x up to the input tolerance, nearest first; the nearest one in any case."""
    if not problem.n_cases:
        return
    distance = _distances(problem, x.astype(np.float64))
    order = np.argsort(distance, kind="stable")[:_MAX_BOXES]
    for place, box in enumerate(order):
        if place == 0 or distance[box] <= TOLERANCE:
            yield int(box)
