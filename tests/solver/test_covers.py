"""What an ``unsat`` covers: bounds that hold for onnxruntime's float32 runs, and claims that say so or why not."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

import verifier
from scripts.check_runs import KINDS, Model, Runs, make, text
from verifier.bab import certify
from verifier.bab.certify import Certificates
from verifier.bounds import ibp
from verifier.bounds.crown import Specification, crown_hidden, crown_rows, initial_state
from verifier.bounds.engine import ROUNDED_64, Arithmetic, Engine
from verifier.config import Config
from verifier.core.claims import Claims, Covered, Semantics, real_part
from verifier.core.deadline import Deadline
from verifier.core.errors import RankFailed, UnsupportedError
from verifier.core.interval import Interval
from verifier.core.progress import SilentProgress
from verifier.core.result import Result, Verdict
from verifier.core.runtime import Measured, RunModel
from verifier.frontend import runtime
from verifier.frontend.network import load_network
from verifier.frontend.runtime import not_covered, optimised_not_covered, run_model
from verifier.graph.graph import Graph
from verifier.ops.reciprocal import Reciprocal
from verifier.parallel.single import Resident, SingleBackend
from verifier.parallel.world import solo
from verifier.report.record import Outcome
from verifier.runtime.handle import WorkerHandle
from verifier.runtime.messages import Standing
from verifier.runtime.processes import ForkedProcess
from verifier.runtime.query import Query
from verifier.solver import pipeline
from verifier.solver.phases import Begin
from verifier.solver.pipeline import solve
from verifier.spec.vnnlib import parse_vnnlib

# Errors that are generous on any processor: what is tested is not the table.
MODEL = RunModel(
    "test",
    {k: Measured(1e-6, 1e-6) for k in ("Sigmoid", "Tanh", "Sin", "Cos")}
    | {k: Measured(1e-6, 1e-37) for k in ("Exp", "Reciprocal", "Softmax")},
)
RUNS = Arithmetic(torch.float64, rounding=True, run=MODEL)
CPU = torch.device("cpu")


def written(folder: Path, model: bytes) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model)
    return path


def backend_of(graph: Graph) -> SingleBackend:
    store = Resident(CPU, 0)
    for handle, tensor in graph.parameters.items():
        store.put(handle, tensor)
    return SingleBackend(graph, CPU, 1 << 26, store)


def dense(seed: int = 0, widths: tuple[int, ...] = (6, 6)) -> tuple[Model, tuple[int, ...]]:
    m = Model(np.random.default_rng(seed), (1, 3))
    for width in widths:
        m.dense(width)
        m.add("Relu")
    m.dense(1)
    return m, (1, 3)


def asked(folder: Path, model: bytes, low: np.ndarray, up: np.ndarray, threshold: float) -> tuple[Path, Path]:
    property_ = folder / "property.vnnlib"
    property_.write_text(text(low, up, threshold))
    return written(folder, model), property_


@pytest.mark.parametrize("number", range(3 * len(KINDS)))
def test_bounds_contain_every_run(tmp_path: Path, number: int) -> None:
    """At points and on boxes, by intervals and by CROWN, against onnxruntime with and without optimisations."""
    _, model, shape, low, up = make(number, 77)
    network, runs = load_network(written(tmp_path, model)), Runs(model, shape)
    graph, rng = network.graph, np.random.default_rng(number)
    backend = backend_of(graph)
    points = np.stack([low, up, *(np.clip(low + (up - low) * rng.random(low.shape), low, up) for _ in range(6))])
    points = points.astype(np.float32)
    values = np.array([runs.values(x) for x in points])
    at = torch.from_numpy(points).reshape(len(points), *graph.input_shape).double()
    found, _ = ibp.propagate(Engine(graph, backend, arithmetic=RUNS), Interval(at, at))
    own = found[graph.output]
    assert bool((own.lower.flatten() <= torch.from_numpy(values.min(1))).all())
    assert bool((own.upper.flatten() >= torch.from_numpy(values.max(1))).all())

    box = Interval(*(torch.from_numpy(b).reshape(1, *graph.input_shape) for b in (low, up)))
    state = crown_hidden(Engine(graph, backend), initial_state(Engine(graph, backend, arithmetic=RUNS), box))
    rows = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 2, *graph.output_shape)
    lower, walk = crown_rows(Engine(graph, backend), state, Specification(rows))
    assert float(lower[0, 0]) <= values.min() and -float(lower[0, 1]) >= values.max()
    assert bool((walk.error > 0).all())


@pytest.mark.parametrize("width", [2, 5, 17, 40])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_every_run_of_a_softmax_is_within_its_error(tmp_path: Path, width: int, spread: float) -> None:
    m = Model(np.random.default_rng(0), (1, width))
    m.add("Softmax", axis=1)
    model = m.bytes((1, width))
    network, runs, rng = load_network(written(tmp_path, model)), Runs(model, (1, width)), np.random.default_rng(1)
    x = (spread * rng.normal(size=(200, width))).astype(np.float32)
    exact = np.exp(x.astype(np.float64) - x.max(1, keepdims=True).astype(np.float64))
    exact /= exact.sum(1, keepdims=True)
    op = network.graph.nodes[network.graph.output].op
    assert isinstance(op, Reciprocal) and op.row == width
    found = Interval(torch.from_numpy(exact), torch.from_numpy(exact))
    error = op.run_error(MODEL, [], found)
    assert isinstance(error, torch.Tensor) and bool((error.numpy() <= 1e-4 * exact + 1e-5).all())
    for session in runs.sessions:
        for k, point in enumerate(x):
            y = session.run(None, {session.get_inputs()[0].name: point[None]})[0][0].astype(np.float64)
            assert bool((np.abs(y - exact[k]) <= error[k].numpy()).all())
    assert op.run_error(RunModel("test", {}), [], found) is None  # not measured


def test_without_a_run_nothing_changes(tmp_path: Path) -> None:
    m, shape = dense()
    graph = load_network(written(tmp_path, m.bytes(shape))).graph
    backend = backend_of(graph)
    box = Interval(-torch.ones(1, 1, 3), torch.ones(1, 1, 3))
    plain, runs = (initial_state(Engine(graph, backend, arithmetic=a), box) for a in (ROUNDED_64, RUNS))
    rows = Specification(torch.ones(1, 1, 1, 1, dtype=torch.float64))
    lower, walk = crown_rows(Engine(graph, backend), plain, rows)
    assert float(walk.error.abs().max()) == 0.0 and not plain.magnitudes.rates
    below, walk = crown_rows(Engine(graph, backend), runs, rows)
    assert float(below) < float(lower) and float(below + walk.error) <= float(lower)


def test_a_comfortable_proof_covers_runs(tmp_path: Path) -> None:
    m, shape = dense()
    model, low, up = m.bytes(shape), np.full(3, -0.5, np.float32), np.full(3, 0.5, np.float32)
    least, _ = Runs(model, shape).search(low, up, np.random.default_rng(0), 200)
    found = verifier.verify(*asked(tmp_path, model, low, up, least - 0.05), timeout=60)
    assert found.verdict is Verdict.UNSAT and found.covers.real and found.covers.float32
    assert found.covers.run.startswith("onnxruntime ") and found.covers.reason == ""
    assert found.covers.margin is not None and found.covers.error is not None
    assert found.covers.margin > found.covers.error > 0
    strict = {"numerics.semantics": "float32"}
    again = verifier.verify(*asked(tmp_path, model, low, up, least - 0.05), config=strict, timeout=60)
    assert again.verdict is Verdict.UNSAT and again.covers.float32


def cancelling() -> tuple[bytes, tuple[int, ...]]:
    """relu(x + 1e8 - 1e8) - relu(x): a run rounds x away, the network does not."""
    m = Model(np.random.default_rng(0), (1, 2))
    m.add("MatMul", m.constant(np.eye(2)))
    kept = m.last
    for sign in ("Add", "Sub"):
        m.add("Relu") if sign == "Sub" else None
        m.add(sign, m.constant(np.full(2, 1e8)))
    m.add("Sub", kept)
    m.add("MatMul", m.constant(np.ones((2, 1))))
    return m.bytes((1, 2)), (1, 2)


@pytest.mark.parametrize("extra", [{}, {"attack.enabled": False}, {"numerics.semantics": "float32"}])
def test_what_a_run_can_do_is_never_covered(tmp_path: Path, extra: dict[str, object]) -> None:
    """The real network is zero; runs reach about -6."""
    model, shape = cancelling()
    low, up = np.full(2, -3.0, np.float32), np.full(2, 3.0, np.float32)
    least, _ = Runs(model, shape).search(low, up, np.random.default_rng(0), 50)
    assert least < -1
    found = verifier.verify(*asked(tmp_path, model, low, up, -0.5), config=extra, timeout=20)
    assert found.verdict is not Verdict.UNSAT or not found.covers.float32
    assert not extra.get("numerics.semantics") or found.verdict is not Verdict.UNSAT


def test_offsets_that_cancel_when_they_are_folded_count_for_runs(tmp_path: Path) -> None:
    m = Model(np.random.default_rng(0), (1, 2))
    m.add("Gemm", m.constant(np.eye(2)), m.constant(np.full(2, 1e8)))
    m.add("Sub", m.constant(np.full(2, 1e8)))
    m.add("Relu")
    m.add("MatMul", m.constant(np.ones((2, 1))))
    network = load_network(written(tmp_path, m.bytes((1, 2))))
    store = Resident(CPU, 0)
    for handle, tensor in network.graph.parameters.items():
        store.put(handle, tensor)
    x = torch.full((1, *network.graph.input_shape), 3.0, dtype=torch.float64)
    backend = SingleBackend(network.graph, CPU, 1 << 26, store)
    found, _ = ibp.propagate(Engine(network.graph, backend, arithmetic=RUNS), Interval(x, x))
    output = found[network.graph.output]
    value = float(Runs(m.bytes((1, 2)), (1, 2)).least(np.full(2, 3.0)))
    assert value > 6.5 or value < 5.5  # rounding moves 3 to 0 or 8
    assert float(output.lower) <= value <= float(output.upper)


def test_factors_of_very_different_sizes_are_not_covered(tmp_path: Path) -> None:
    m = Model(np.random.default_rng(0), (1, 2))
    m.add("Mul", m.constant(np.full(2, 1e-30)))
    m.add("Mul", m.constant(np.full(2, 1e30)))
    m.add("MatMul", m.constant(np.ones((2, 1))))
    assert "very different sizes" in (not_covered(load_network(written(tmp_path, m.bytes((1, 2)))), MODEL) or "")


def test_values_near_the_end_of_the_range_are_not_covered(tmp_path: Path) -> None:
    m, shape = dense()
    m.add("Relu")
    m.add("MatMul", m.constant(np.array([[1e35]])))
    model, low, up = m.bytes(shape), np.full(3, -0.5, np.float32), np.full(3, 0.5, np.float32)
    found = verifier.verify(*asked(tmp_path, model, low, up, -1e37), timeout=30)
    assert found.verdict is Verdict.UNSAT and not found.covers.float32 and "range" in found.covers.reason


def test_other_networks_say_why_they_are_not_covered(tmp_path: Path) -> None:
    problem = parse_vnnlib(asked(tmp_path, dense()[0].bytes((1, 3)), np.zeros(3), np.ones(3), -100.0)[1])
    module = nn.Sequential(nn.Linear(3, 1)).eval()
    found = verifier.verify(module, problem, timeout=30)
    assert found.verdict is Verdict.UNSAT and found.covers.real and not found.covers.float32
    assert "torch module" in found.covers.reason
    with pytest.raises(UnsupportedError, match="torch module"):
        verifier.verify(module, problem, config={"numerics.semantics": "float32"}, timeout=30)
    plain = verifier.verify(module, problem, config={"numerics.certify": False}, timeout=30)
    assert plain.verdict is Verdict.UNSAT and not plain.covers.real


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    m = Model(np.random.default_rng(0), (1, 3))
    m.add("LogSoftmax", axis=1)
    m.add("MatMul", m.constant(np.ones((3, 1))))
    assert not_covered(load_network(written(tmp_path, m.bytes((1, 3)))), MODEL) == (
        "the error of onnxruntime's LogSoftmax is not known"
    )
    m = Model(np.random.default_rng(0), (1, 3))
    m.add("Sigmoid")
    m.add("MatMul", m.constant(np.ones((3, 1))))
    network = load_network(written(tmp_path, m.bytes((1, 3))))
    assert not_covered(network, MODEL) is None
    assert "Sigmoid was not measured" in (not_covered(network, RunModel("elsewhere")) or "")


def test_fused_kernels_are_looked_at(tmp_path: Path) -> None:
    """x 0.5 (1 + erf(x / sqrt 2)) becomes a Gelu kernel, whose error is not known; plain layers are fine."""
    m, shape = dense()
    assert optimised_not_covered(load_network(written(tmp_path, m.bytes(shape)))) is None
    m = Model(np.random.default_rng(0), (1, 3))
    m.dense(4)
    x = m.last
    m.add("Div", m.constant(np.array(2**0.5)))
    m.add("Erf")
    m.add("Add", m.constant(np.array(1.0)))
    m.add("Mul", x)
    m.add("Mul", m.constant(np.array(0.5)))
    m.dense(1)
    assert "Gelu" in (optimised_not_covered(load_network(written(tmp_path, m.bytes((1, 3))))) or "")


def test_the_proof_stands_while_it_is_strengthened(tmp_path: Path) -> None:
    m, shape = dense(3)
    model, low, up = m.bytes(shape), np.full(3, -0.5, np.float32), np.full(3, 0.5, np.float32)
    least, _ = Runs(model, shape).search(low, up, np.random.default_rng(0), 400)
    network, property_ = asked(tmp_path, model, low, up, least - 1e-6)
    told: list[Result] = []

    class Listener(SilentProgress):
        def standing(self, result: Result) -> None:
            told.append(result)

    problem = parse_vnnlib(property_)
    found = solve(load_network(network), problem, Config(), Deadline(30), Listener())
    if found.verdict is Verdict.UNSAT and not found.covers.float32:
        assert [r.verdict for r in told] == [Verdict.UNSAT] and not told[0].covers.float32 and told[0].covers.real
        assert found.covers.reason
    assert found.verdict in (Verdict.UNSAT, Verdict.SAT, Verdict.UNKNOWN)


def noisy(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Certificates of neuron searches allow for runs that are off by so much more; the first proof waits for none."""
    lower = Certificates.lower

    def lowered(self: Certificates, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bound, own = lower(self, *arguments)
        return bound - error, own + error

    monkeypatch.setattr(Certificates, "lower", lowered)
    monkeypatch.setattr(Claims, "real_closes", lambda self, *counts: self.semantics is not Semantics.FLOAT32)


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_a_search_goes_on_with_what_is_refuted_for_the_real_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Where all of that was kept, the query is not begun again, and the proof covers runs."""
    m, shape = dense(1, (24, 24))
    model, low, up = m.bytes(shape), np.full(3, -3, np.float32), np.full(3, 3, np.float32)
    least, _ = Runs(model, shape).search(low, up, np.random.default_rng(0), 400)
    noisy(monkeypatch, 0.1)
    began: list[object] = []
    begin = Begin.run
    monkeypatch.setattr(Begin, "run", lambda self, state: began.append(state) or begin(self, state))
    monkeypatch.setattr(certify, "KEPT_SHARE", room >> 40)
    config = {"bab.branching": "babsr", "attack.enabled": False, "bab.max_domains": 3000}
    found = verifier.verify(*asked(tmp_path, model, low, up, least - 1.0), config=config, timeout=30)
    assert found.verdict is Verdict.UNSAT and len(began) == (1 if room else 2)
    if room:  # a second query may take longer than the first
        assert found.covers.float32 and found.covers.margin is not None and found.covers.error is not None
        assert found.covers.margin > found.covers.error > 0.1


def test_what_runs_might_do_is_not_covered_by_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs may be off by more than there is to spare: the proof is one of the real network, as before."""
    m, shape = dense(1, (24, 24))
    model, low, up = m.bytes(shape), np.full(3, -3, np.float32), np.full(3, 3, np.float32)
    least, _ = Runs(model, shape).search(low, up, np.random.default_rng(0), 400)
    noisy(monkeypatch, 1.5)
    config = {"bab.branching": "babsr", "attack.enabled": False, "bab.max_domains": 3000}
    found = verifier.verify(*asked(tmp_path, model, low, up, least - 1.0), config=config, timeout=30)
    assert found.verdict is Verdict.UNSAT and found.covers.real and not found.covers.float32
    assert "real arithmetic alone" in found.covers.reason


class Stopped(RuntimeError):
    """What nobody expects."""


@pytest.mark.parametrize("error", [Stopped("no"), MemoryError("none left"), RankFailed("rank 1 is gone")])
def test_a_failed_strengthening_takes_and_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The proof stands as it was: for the network in real arithmetic alone."""
    model, _ = cancelling()
    network, property_ = asked(tmp_path, model, np.full(2, -3.0, np.float32), np.full(2, 3.0, np.float32), -40.0)

    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(pipeline._Run, "_again", fails)
    monkeypatch.setattr(pipeline, "optimised_not_covered", lambda network: None)
    run = pipeline._Run(
        load_network(network), parse_vnnlib(property_), Config(), Deadline(60), SilentProgress(), solo(CPU)
    )
    run._look_at_runs()
    run.state = Never()  # type: ignore[assignment]
    run.verdict, run.reason, run.covered = Verdict.UNSAT, "proved", Covered(weak=3, margin=1.0, error=2.0)
    run.began -= 10
    try:
        run.strengthen()
    except RankFailed as lost:
        run.lost(lost)
    assert run.verdict is Verdict.UNSAT and run.reason == "proved" and run.covered.weak == 3
    assert run._covers().real and not run._covers().float32


class Never:
    """The state of a rank that nobody asks for anything."""

    deadline = Deadline()
    roots: tuple[()] = ()
    setup = SimpleNamespace(backend=SimpleNamespace(device=CPU))


def test_values_so_large_that_lost_weights_matter_are_not_covered(tmp_path: Path) -> None:
    """A runtime multiplies weights by the factor behind them beforehand: 1e-30 and 1e-16 give none, times 1e15."""
    m = Model(np.random.default_rng(0), (1, 3))
    m.add("MatMul", m.constant(np.ones((3, 1))))
    for size, covered in ((1e15, False), (1e8, True)):
        low, up = np.full(3, -size, np.float32), np.full(3, size, np.float32)
        found = verifier.verify(*asked(tmp_path, m.bytes((1, 3)), low, up, -10 * size), timeout=30)
        assert found.verdict is Verdict.UNSAT and found.covers.float32 == covered
        assert covered or "range" in found.covers.reason


def test_factors_that_become_one_are_looked_at() -> None:
    kind = {"domain": "com.microsoft", "alpha": 1e-25}
    tiny = helper.make_node("FusedMatMul", ["a", "b"], ["y"], **kind)
    usual = helper.make_node("FusedMatMul", ["a", "b"], ["y"], **{**kind, "alpha": 0.125})
    assert runtime._strange([tiny]) == "onnxruntime's optimised graph has FusedMatMul, whose error is not known"
    assert runtime._strange([usual]) is None


def test_parameters_that_leave_the_range_are_not_covered(tmp_path: Path) -> None:
    m = Model(np.random.default_rng(0), (1, 2))
    m.add("MatMul", m.constant(np.full((2, 1), 1e33)))
    assert "range" in (not_covered(load_network(written(tmp_path, m.bytes((1, 2)))), MODEL) or "")


@pytest.mark.parametrize(("value", "inside"), [(0.0, True), (1e33, False), (-1e33, False), (math.nan, False)])
def test_parameters_that_are_no_numbers_are_out_of_range(value: float, inside: bool) -> None:
    assert runtime._in_range(torch.tensor([1.0, value, 2.0])) == inside
    assert runtime._in_range(torch.zeros(0)) and runtime._in_range(torch.tensor([1]))


def test_what_leaves_the_range_is_no_proof_for_runs(tmp_path: Path) -> None:
    m, shape = dense()
    m.add("Relu")
    m.add("MatMul", m.constant(np.array([[1e20]])))
    m.add("Relu")
    m.add("MatMul", m.constant(np.array([[1e15]])))
    low, up = np.full(3, -0.5, np.float32), np.full(3, 0.5, np.float32)
    strict = {"numerics.semantics": "float32"}
    found = verifier.verify(*asked(tmp_path, m.bytes(shape), low, up, -1e37), config=strict, timeout=10)
    assert found.verdict is Verdict.UNKNOWN and "range" in found.reason


def test_magnitudes_that_are_no_numbers_may_overflow(tmp_path: Path) -> None:
    m, shape = dense()
    graph = load_network(written(tmp_path, m.bytes(shape))).graph
    backend = backend_of(graph)
    box = Interval(-torch.ones(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, 3, dtype=torch.float64))
    for index in range(len(graph.nodes)):
        _, magnitudes = ibp.propagate(Engine(graph, backend, arithmetic=RUNS), box)
        assert not ibp.may_overflow(magnitudes, backend)
        magnitudes.partial[index] = magnitudes.partial[index] * float("nan")
        assert ibp.may_overflow(magnitudes, backend)


def test_an_answer_that_stands_outlives_its_worker(tmp_path: Path) -> None:
    query = Query(tmp_path / "a.onnx", tmp_path / "a.vnnlib", None, 1.0, 0.0)

    class Nobody(ForkedProcess):
        def kill(self) -> None: ...

    worker = WorkerHandle(query, Nobody(-1), -1)
    seen: list[Outcome] = []
    worker.told = seen.append
    worker._take(Standing(Outcome("unsat", "proved")))
    worker._drain = lambda: False  # type: ignore[method-assign]
    assert worker.time_out().verdict == "unsat" and [o.verdict for o in seen] == ["unsat"]


def test_domains_wait_only_while_they_are_few() -> None:
    both = Claims(Semantics.BOTH, MODEL)
    assert not both.real_closes(0, 0) and both.real_closes(1000, 10) and not both.real_closes(1000, 10**6)
    assert Claims().real_closes(0, 0) and not Claims(Semantics.FLOAT32, MODEL).real_closes(10**9, 0)
    assert Claims().run is None and both.run is MODEL


def test_the_tightest_closing_bound_counts() -> None:
    covered = Covered()
    covered.note(torch.tensor([3.0, 0.5]), torch.tensor([1.0, 0.25]))
    assert (covered.margin, covered.error) == (0.75, 0.25)
    other = Covered()
    other.note(torch.tensor([-0.5]), torch.tensor([1.0]), weak=1)
    covered.add(other)
    assert (covered.margin, covered.error, covered.weak) == (0.5, 1.0, 1) and covered.spare == -0.5
    lower = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert real_part(lower, torch.zeros(2)).tolist() == [1.0, 2.0]
    assert bool((real_part(lower, torch.ones(2)) < lower + 1).all())


def test_this_run_is_named() -> None:
    assert run_model().name.startswith("onnxruntime ")
