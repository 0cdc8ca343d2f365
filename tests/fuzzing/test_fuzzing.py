"""The fuzzer: what it holds for true is true, it finds what is wrong, and its findings are tests that run."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import fuzz
from scripts.fuzzing import (
    checks,
    files,
    formulas,
    frontend,
    networks,
    parts,
    planes,
    reducer,
    relus,
    runner,
    search,
    settings,
    truth,
    vnnlib,
    written,
)
from verifier.contrib.softsign import Softsign
from verifier.core.interval import Interval
from verifier.core.result import Result, Verdict
from verifier.graph.op import NonlinearOp
from verifier.ops import curves, linear
from verifier.ops.registry import our_classes, our_sets
from verifier.spec import replay

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", range(40))
def test_interpreter_agrees_with_onnxruntime(seed: int) -> None:
    rng = np.random.default_rng(seed)
    family = list(networks.FAMILIES)[seed % len(networks.FAMILIES)]
    model = networks.random_network(rng, family)
    runtime = truth.Runtime(model)
    x = rng.uniform(-1, 1, runtime.n_in).astype(np.float32)
    exact, _ = truth.real_output(model, x)
    if family != "steps":  # a jump may lie within float32's error
        np.testing.assert_allclose([float(v) for v in exact], runtime.one(x), rtol=1e-4, atol=1e-4)
    double = truth.evaluate(model, x.astype(np.float64), truth.FLOAT)[model.graph.output[0].name].reshape(-1)
    np.testing.assert_allclose([float(v) for v in exact], double, rtol=1e-9, atol=1e-9)


def test_every_kind_of_node_is_made_and_runs() -> None:
    made = set()
    for seed in range(1500):
        case = frontend.random_case(np.random.default_rng(seed))
        made |= {n.op_type for n in case[0].graph.node} if case else set()
    wanted = "Conv ConvTranspose MaxPool AveragePool Gemm MatMul Slice Gather Pad Split Softmax LSTM Where Resize"
    assert set(wanted.split()) <= made and len(made) > 60


@pytest.mark.parametrize("value", [Fraction(1, 3), Fraction(0)])
def test_decimals_are_exact(value: Fraction) -> None:
    for v in (Fraction(float(value)), -Fraction(float(np.float32(1e-40))), Fraction(3), Fraction(-7, 1000)):
        assert Fraction(formulas.decimal(v)) == v


def test_paths_name_what_exists() -> None:
    for changes in settings.PATHS.values():
        for module, attribute, _ in changes:
            assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    with settings.taken(list(settings.PATHS)):
        pass


def query(seed: int = 3) -> checks.Query:
    """One whose known point satisfies the property."""
    for k in range(100):
        made = search.random_query(np.random.default_rng([seed, k]), "cpu")
        if made is not None and checks.violates(made, made.points[0]):
            return checks.at(made, methods=("crown",), timeout=5.0)
    raise AssertionError


def test_a_wrong_unsat_is_a_complaint() -> None:
    q = query()
    found = checks.judged(q, Result(Verdict.UNSAT))
    assert [c.what for c in found] == ["wrong unsat"] and found[0].point == q.points[0]
    assert checks.judged(q, Result(Verdict.UNKNOWN)) == []
    assert [c.what for c in checks.judged(q, Result(Verdict.ERROR, "no"))] == ["error"]


def test_printed_counterexamples_are_replayed() -> None:
    text = formulas.declarations(1, 1) + "(assert (<= X_0 1))(assert (>= X_0 0))(assert (< Y_0 0.5))"
    b = networks.Builder(np.random.default_rng(0))
    model = b.model((1, 1), b.node("Neg", [networks.Value("X", (1, 1))], (1, 1)))
    q = checks.Query(model.SerializeToString(), text, (0.0,), (1.0,))
    assert checks.replays(q, "((X_0 0.25)\n (Y_0 -0.25))") is None
    assert "is none" not in str(checks.replays(q, "((X_0 1.5)\n (Y_0 -1.5))")) and checks.replays(q, "((X_0 1.5))")
    assert checks.replays(replace(q, text=text.replace("0.5", "-0.25")), "((X_0 0.25))")
    assert checks.replays(q, "((X_0 0.1))")  # no float32
    assert checks.replays(q, "((X_1 0.25))")


@pytest.mark.slow
def test_an_unsound_bound_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted: ReLUs lose the constant of their upper plane."""
    from verifier.ops import relu

    right = relu.Relu.relax

    def wrong(self, xs, params=None):  # type: ignore[no-untyped-def]
        planes = right(self, xs, params)
        return replace(planes, upper_intercept=planes.upper_intercept * 0.5)

    monkeypatch.setattr(relu.Relu, "relax", wrong)
    found = None
    for k in range(60):
        found = next((f for f in search.run(np.random.default_rng([1, k]), "cpu") if f is not None), None)
        if found is not None and found.complaint.what in ("unsound bound", "wrong unsat"):
            break
    assert found is not None
    small, complaint, again = reducer.reduced(found.query, found.complaint, checks.examine, 5.0)
    assert again and complaint.what == found.complaint.what
    assert len(small.proto.graph.node) <= len(found.query.proto.graph.node)
    (tmp_path / "test_found.py").write_text(written.test_of_query(small, complaint, "here"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout  # there the verifier is right


def test_misread_properties_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(0)
    texts = [vnnlib.random_text(source) for _ in range(60)]
    assert all(vnnlib.disagreement(*t, random.Random(1)) is None for t in texts)
    monkeypatch.setattr(vnnlib.formulas, "satisfied", lambda *_: False)
    assert any(vnnlib.disagreement(*t, random.Random(1)) for t in texts)


def test_broken_files_are_compared_with_what_the_command_says() -> None:
    rng = np.random.default_rng(0)
    assert all(files.in_process(files.random_files(rng)) is None for _ in range(10))
    assert files.from_outside((b"nothing", b"(declare-const X_0 Real)")) is None


@pytest.mark.slow
def test_a_run_is_counted_and_ends_in_time(tmp_path: Path) -> None:
    said: list[str] = []
    tally = runner.fuzz(["vnnlib"], 0, 0.02, "cpu", 1, "", said.append)
    assert tally.cases["vnnlib"] > 0 and not tally.findings, said
    assert "vnnlib" in fuzz.report(tally, 1.0)


def test_arguments() -> None:
    assert fuzz.kinds_of("search,files") == ["search", "files"]
    with pytest.raises(SystemExit) as ended:
        fuzz.main(["--only", "nothing"])
    assert ended.value.code == 2


# ------------------------------------------------------------------------------------------------- parts by themselves


@pytest.mark.parametrize("name", list(parts.CHECKS))
def test_parts_are_right(name: str) -> None:
    assert [parts.complaint_of(name, number) for number in range(3 if name == "refinement" else 12)] == [None] * (
        3 if name == "refinement" else 12
    )


def _found(name: str, count: int) -> bool:
    return any(parts.complaint_of(name, number) is not None for number in range(count))


def test_a_plane_that_is_not_looked_at_at_its_far_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = curves.Below.at

    def wrong(*arguments: Any) -> curves.Plane:
        plane = right(*arguments)
        return plane._replace(intercept=plane.intercept + 1e-4 * plane.slope.abs())

    monkeypatch.setattr(curves.Below, "at", wrong)
    assert _found("relaxation", 300)


def test_a_backward_pass_that_forgets_the_bias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.Linear, "bias_dot", lambda self, a, p: None)
    assert _found("adjoint", 200)


def test_a_judge_that_takes_strict_rows_loosely_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = replay.row_holds

    def wrong(problem: Any, row: int, *point: Any) -> bool:
        return right(replace(problem, row_strict=None), row, *point)

    monkeypatch.setattr(replay, "row_holds", wrong)
    assert _found("replays", 400)


def test_every_nonlinear_op_has_a_truth() -> None:
    nonlinear = {c.__name__ for c in our_classes() if issubclass(c, NonlinearOp)}
    several = {type(s.op).__name__ for found in our_sets() for s in found.samples if s.exact is None}
    several |= {"Within", "ExpSum"}  # what translations make of other operators, whose networks are fuzzed
    assert nonlinear - several == {*planes.UNARY, *planes.SEVERAL, *(s.op.kind for s in planes.added().values())}


def test_ops_in_one_file_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Softsign.interval

    def wrong(self: Softsign, xs: Any, p: Any) -> Interval:
        low, up = right(self, xs, p)
        return Interval(low, up - 0.01)

    monkeypatch.setattr(Softsign, "interval", wrong)
    assert _found("relaxation", 400)


@pytest.mark.parametrize("seed", range(8))
def test_programs_find_values_that_no_sample_beats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = networks.layers(rng, [2, 5, 4, 1])
    low, high, row = -np.ones(2), np.ones(2), np.ones(1)
    best = relus.least(layers, row, low, high)
    assert best is not None
    least = relus.value(layers, row, best)
    grid = [relus.value(layers, row, np.array([a, b]) / 8) for a in range(-8, 9) for b in range(-8, 9)]
    assert least <= min(grid) + Fraction(1, 10**9)
