"""The whole way of a query against exact truth: MILP minima of small networks with thresholds close on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support.device import ON_DEVICE
from tests.support.networks import KINDS
from tests.support.planted import Planted, planted
from verifier.attack.target import Target
from verifier.bab.refine import Stage
from verifier.bab.statistics import GroupShare, SearchStatistics, SearchTotals
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.core.progress import SilentProgress
from verifier.core.result import Result, Verdict, Witness
from verifier.frontend.network import Parity, from_module
from verifier.graph.graph import Graph
from verifier.parallel.world import World, solo
from verifier.solver import pipeline
from verifier.solver.counts import entry
from verifier.solver.phases import Phase, RankState, SplitInputs
from verifier.solver.pipeline import solve
from verifier.solver.root import _Enough, _RowTable
from verifier.solver.setup import Setup
from verifier.solver.strategy import Features, starts_on_host
from verifier.spec.build import from_box

NEURONS = {"bab": {"branching": "kfsb"}}
BABSR = {"bab": {"branching": "babsr"}}
INPUTS = {"bab": {"branching": "input"}}
ATTACKED = {"attack": {"enabled": True, "restarts": 5, "steps": 3}, **INPUTS}


def problem_of(case: Planted, extra: list[tuple[np.ndarray, float]] | None = None) -> Problem:
    """One case per row: the planted one and others."""
    low, up = case.lower.reshape(1, -1).numpy(), case.upper.reshape(1, -1).numpy()
    rows = [(case.row, case.threshold), *(extra or [])]
    n = len(rows)
    return Problem(
        lower=low,
        upper=up,
        witness_lower=low,
        witness_upper=up,
        row_y=np.stack([r for r, _ in rows]),
        row_x=None,
        row_d=np.array([d for _, d in rows]),
        case_box=np.zeros(n, np.int64),
        case_rows=np.arange(n, dtype=np.int64)[:, None],
    )


def compared(mismatch: str | None) -> Parity:
    return Parity(mismatch, points=17, left_out=0, boxes=1, difference=0.0, tolerance=1e-4, dtype="float32")


def answer(case: Planted, settings: dict, problem: Problem | None = None, seconds: float = 60.0) -> Result:
    network = from_module(case.network, input_shape=(1, *case.lower.shape))
    config = Config.model_validate({"attack": {"enabled": False}, **ON_DEVICE, **settings})
    return solve(network, problem or problem_of(case), config, Deadline(seconds), SilentProgress())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", [NEURONS, INPUTS], ids=["kfsb", "input"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("seed", range(2))
def test_never_proves_a_planted_counterexample(kind: str, seed: int, settings: dict) -> None:
    case = planted(kind, 10 * seed + 1, sat=True, gap=0.004)
    limits = {"max_domains": 2000, **settings["bab"]}
    result = answer(case, {"bab": limits}, seconds=10.0)
    assert result.verdict is not Verdict.UNSAT
    if result.verdict is Verdict.SAT:
        assert result.witness is not None
        assert (result.witness.inputs >= case.lower.reshape(-1).double().numpy()).all()
        assert (result.witness.inputs <= case.upper.reshape(-1).double().numpy()).all()
        assert result.witness.outputs @ case.row <= case.threshold


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", [NEURONS, BABSR], ids=["kfsb", "babsr"])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("seed", range(2))
def test_proves_what_holds_by_a_small_gap(kind: str, seed: int, settings: dict) -> None:
    """ReLU splits are complete: with the LP at the leaves every small network is decided."""
    case = planted(kind, 10 * seed + 2, sat=False, gap=0.004)
    result = answer(case, settings)
    assert result.verdict is Verdict.UNSAT, result.reason
    assert result.certified


def test_all_cases_must_be_refuted() -> None:
    case = planted("mlp", 3, sat=False)
    impossible = (case.row, case.threshold - 100.0)
    certain = (case.row, case.threshold + 1e4)
    assert answer(case, NEURONS, problem_of(case, [impossible])).verdict is Verdict.UNSAT
    assert answer(case, NEURONS, problem_of(case, [impossible, certain])).verdict is Verdict.SAT


def test_a_case_needs_only_one_refuted_row() -> None:
    case = planted("mlp", 4, sat=False)
    base = problem_of(case, [(case.row, case.threshold + 1e4)])
    both = Problem(**{**vars(base), "case_box": np.zeros(1, np.int64), "case_rows": np.array([[1, 0]])})
    assert answer(case, NEURONS, both).verdict is Verdict.UNSAT
    padded = Problem(**{**vars(base), "case_box": np.zeros(1, np.int64), "case_rows": np.array([[1, -1]])})
    assert answer(case, NEURONS, padded).verdict is Verdict.SAT


def test_a_case_without_rows_is_its_whole_box() -> None:
    case = planted("mlp", 5, sat=False)
    base = problem_of(case)
    empty = Problem(**{**vars(base), "case_rows": np.full((1, 1), -1, np.int64)})
    assert answer(case, NEURONS, empty).verdict is not Verdict.UNSAT
    bare = from_box(base.lower[0], base.upper[0], [[]], base.n_out)
    for settings in (NEURONS, INPUTS):
        assert answer(case, settings, bare).verdict is Verdict.SAT


def test_no_cases_is_a_proof() -> None:
    case = planted("mlp", 6, sat=True)
    base = problem_of(case)
    none = Problem(**{**vars(base), "case_box": np.zeros(0, np.int64), "case_rows": np.zeros((0, 1), np.int64)})
    assert answer(case, NEURONS, none).verdict is Verdict.UNSAT


def test_limits_end_in_unknown_or_timeout_with_a_reason() -> None:
    case = planted("mlp", 8, sat=False, gap=0.001, radius=2.0)
    few = answer(case, {"bab": {"branching": "kfsb", "max_domains": 1}})
    assert few.verdict in (Verdict.UNKNOWN, Verdict.UNSAT)
    assert few.verdict is Verdict.UNSAT or "domain limit" in few.reason
    late = answer(case, NEURONS, seconds=0.0)
    assert late.verdict is Verdict.TIMEOUT
    none = answer(case, {"bab": {"enabled": False}, "bounds": {"method": "ibp"}})
    assert none.verdict is Verdict.UNKNOWN and none.reason


def test_memory_limit_below_the_weights_is_unknown() -> None:
    result = answer(planted("mlp", 9, sat=False), {"memory": {"device_limit": 100}})
    assert result.verdict is Verdict.UNKNOWN
    assert "out of memory" in result.reason and "memory.device_limit" in result.reason


def test_same_seed_same_figures() -> None:
    case = planted("residual", 12, sat=False, gap=0.004)
    first, second = answer(case, NEURONS), answer(case, NEURONS)
    assert first.statistics == second.statistics
    assert first.verdict is second.verdict


def test_a_graph_that_disagrees_with_its_reference_never_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = planted("mlp", 13, sat=False)
    monkeypatch.setattr("verifier.solver.pipeline.parity", lambda *args: compared("output 0 differs by 1"))
    result = answer(case, NEURONS)
    assert result.verdict is Verdict.ERROR
    assert "output 0 differs by 1" in result.reason


class TestStartOnTheHost:
    """Small queries are looked at on the CPU before a GPU is; here the CPU stands for both."""

    @pytest.fixture
    def worlds(self, monkeypatch: pytest.MonkeyPatch) -> list[World]:
        """The jobs that networks are set up for."""
        made: list[World] = []
        set_up = pipeline.set_up

        def noting(graph: Graph, config: Config, world: World) -> Setup:
            made.append(world)
            return set_up(graph, config, world)

        monkeypatch.setattr(pipeline, "set_up", noting)
        monkeypatch.setattr(pipeline, "starts_on_host", lambda found, config, device, ranks: True)
        return made

    def test_what_the_first_look_settles_needs_no_device(self, worlds: list[World]) -> None:
        result = answer(planted("mlp", 1, sat=False, gap=50.0), ATTACKED)
        assert result.verdict is Verdict.UNSAT and len(worlds) == 1
        assert worlds[0].device.type == result.device == "cpu"

    @pytest.mark.parametrize("sat", [True, False])
    def test_what_it_leaves_goes_on_there(
        self, sat: bool, worlds: list[World], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipeline, "first_look", lambda found: 2)
        monkeypatch.setattr(pipeline, "quick", lambda attack: attack.model_copy(update={"enabled": True, "steps": 1}))
        case = planted("mlp", 8, sat=sat, gap=0.001, radius=2.0)
        job = solo(torch.device("cpu"))
        settings = {**ATTACKED, "attack": {"enabled": True, "restarts": 1, "steps": 1}}
        network = from_module(case.network, input_shape=(1, *case.lower.shape))
        config = Config.model_validate({**settings, "device": "cpu"})
        result = solve(network, problem_of(case), config, Deadline(60.0), SilentProgress(), job)
        assert result.verdict is (Verdict.SAT if sat else Verdict.UNSAT), result.reason
        if not sat:
            assert len(worlds) == 2 and worlds[0] is not job and worlds[1] is job

    @pytest.mark.parametrize("told", [["this is off", None], [None, "this is off"]], ids=["host", "device"])
    def test_disagreement_on_either_side_forbids_a_proof(
        self, told: list[str | None], worlds: list[World], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter([compared(word) for word in told])
        monkeypatch.setattr(pipeline, "parity", lambda *a: next(answers))
        monkeypatch.setattr(pipeline, "first_look", lambda found: 2)
        result = answer(planted("mlp", 8, sat=False, gap=0.001, radius=2.0), ATTACKED)
        assert len(worlds) == 2
        assert result.verdict is Verdict.ERROR and "this is off" in result.reason


@pytest.mark.parametrize(
    ("device", "ranks", "settings", "flops", "expected"),
    [
        ("cuda", 1, {}, 1e4, True),
        ("cuda", 1, {}, 1e8, False),
        ("cuda", 2, {}, 1e4, False),
        ("cpu", 1, {}, 1e4, False),
        ("cuda", 1, {"device": "cuda"}, 1e4, False),
        ("cuda", 1, {"bab": {"branching": "kfsb"}}, 1e4, False),
        ("cuda", 1, {"attack": {"enabled": False}}, 1e4, False),
    ],
)
def test_who_starts_on_the_host(device: str, ranks: int, settings: dict, flops: float, expected: bool) -> None:
    found = Features(free_inputs=5, boxes=1, cases=1, only_relu=True, walk_flops=flops, box_flops=100 * flops)
    assert starts_on_host(found, Config.model_validate(settings), torch.device(device), ranks) is expected


def test_a_long_look_is_left_to_the_device() -> None:
    few, many = (
        Features(free_inputs=5, boxes=1, cases=1, only_relu=True, walk_flops=5e5, box_flops=5e5 * rows)
        for rows in (300, 3500)
    )
    assert starts_on_host(few, Config(), torch.device("cuda"), 1)
    assert not starts_on_host(many, Config(), torch.device("cuda"), 1)


def test_slopes_are_left_alone_when_they_gain_nothing() -> None:
    """A look that ends the optimisation needs all cases refuted, or rows that cannot gain what would be of use."""

    class Table:
        thresholds = torch.zeros(2)

        def open_rows(self, lower: torch.Tensor) -> torch.Tensor:
            return torch.full((2,), not bool((lower[0] > 0).any()))

    steps = [0, 2, 4, 6, *range(8, 40, 4)]

    def ended(bounds: Callable[[int], list[float]]) -> int:
        enough = _Enough(cast(_RowTable, Table()), 40)
        return next((step for step in steps if enough(step, torch.tensor([bounds(step)]))), -1)

    assert ended(lambda step: [-2.0 + 0.1 * step, -5.0]) == 24  # refuted
    assert ended(lambda step: [-2.0, -2.0]) == 4  # gains nothing
    assert ended(lambda step: [-2.0, -2.0 + 0.01 * step]) == -1  # climbs as before
    assert ended(lambda step: [-200.0, -200.0 + 0.01 * step]) == 4  # climbs, but far too slowly
    assert ended(lambda step: [-2.0, -2.0 + (step > 3)]) == 8  # a quiet look alone ends nothing
    assert ended(lambda step: [-2.0 - 0.5**step, -2.0 - 0.25**step]) == 8  # gains shrink
    assert ended(lambda step: [-float("inf"), -1.0]) == -1  # a row without a bound may get one


def test_counts_of_several_searches_add_up() -> None:
    first = SearchTotals(SearchStatistics(bounded=2282, closed=7, rounds=3, depth=9, open=50, stuck=1, worst=-1.0))
    second = SearchTotals(SearchStatistics(bounded=2658, closed=1, rounds=2, depth=4))
    expected = {"domains": 2282, "closed": 7, "open": 51, "rounds": 3, "depth": 9, "worst": -1.0}
    assert entry("input_split", first.after(None)) == expected
    expected = {"domains": 4940, "closed": 8, "open": 0, "rounds": 5, "depth": 9}
    assert entry("input_split", second.after(first)) == expected
    groups = GroupShare(3, 1), GroupShare(4, 0)
    shared = SearchTotals(SearchStatistics(bounded=7, leaves=2), groups)
    found = entry("relu_split", shared.after(shared))
    assert found["domains"] == 14 and found["leaves"] == 4
    assert found["groups"] == [{"domains": 6, "received": 2}, {"domains": 8, "received": 0}]
    assert shared.after(first).groups == groups and first.after(shared).groups == groups


def test_every_search_of_a_query_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look by input splits and the search in earnest after it: the record has the domains of both."""
    searched: list[int] = []
    run_on_all = pipeline.run_on_all

    def counted(state: RankState, phase: Phase[Any]) -> object:
        ended = run_on_all(state, phase)
        if isinstance(phase, SplitInputs):
            searched.append(ended.totals.statistics.bounded)
        return ended

    monkeypatch.setattr(pipeline, "run_on_all", counted)
    monkeypatch.setattr("verifier.solver.pipeline.first_look", lambda found: 1)
    case = planted("deep-mlp", 0, sat=False, gap=0.001, radius=2.0)
    result = answer(case, ATTACKED)
    assert len(searched) == 2 and min(searched) > 0
    assert result.statistics["input_split"]["domains"] == sum(searched)


def hidden() -> Planted:
    """A rough network with a counterexample that a long descent ends at, and short searches do not come near."""
    torch.manual_seed(0)
    sizes = ((8, 24), (24, 24), (24, 1))
    layers = [m for a, b in sizes for m in (torch.nn.Linear(a, b), torch.nn.ReLU())][:-1]
    network, one = torch.nn.Sequential(*layers), torch.ones(8)
    for layer in layers[::2]:
        layer.weight.data.mul_(2.0)
    x = torch.rand(2000, 8) * 2 - 1
    for k in range(100):
        (slope,) = torch.autograd.grad(network(x.requires_grad_()).sum(), x)
        x = (x.detach() - 0.1 * 0.96**k * slope.sign()).clamp(-1, 1)
    y = network(x)[:, 0].detach()
    point, threshold = x[y.argmin()].double().numpy(), float(y.min()) + 1e-4
    return Planted(cast(Any, network), -one, one, np.ones(1), threshold, True, point, 1e-4)


def hunted(
    monkeypatch: pytest.MonkeyPatch, finds: int, looks: bool = False, **settings: Any
) -> tuple[Result, list[tuple[Target, float]]]:
    """An answer after three short searches of neurons, and the hunts after the last two of them.

    Args:
        looks: a look has all three searches, and the search does the last one again.
        finds: which hunt offers the counterexample; the others offer another point, or all run out of memory (-1).
    """
    hunts: list[tuple[Target, float]] = []
    case = hidden()

    def hunt(target: Target, share: float) -> Witness | None:
        hunts.append((target, share))
        if finds < 0:
            raise torch.OutOfMemoryError("no room")
        return target.offer((case.point if len(hunts) == finds else 0 * case.point).astype(np.float32))

    monkeypatch.setattr("verifier.bab.refine.plan", lambda limit, least: [Stage(0.0, 0.0)] * 3)
    if not looks:
        monkeypatch.setattr("verifier.bab.refine._LOOK", -1.0)
    monkeypatch.setattr("verifier.bab.refine.attempt.worthwhile", lambda *asked: False)
    monkeypatch.setattr("verifier.solver.pipeline.hunt", hunt)
    attacked = "verifier.solver.pipeline.methods.search"
    monkeypatch.setattr(attacked, lambda target, names: hunts.append((target, len(target.starts))) if looks else None)
    settings = {"attack": {"enabled": True}, "bab": {"branching": "kfsb", "batch_size": 32}, **settings}
    return answer(case, settings), hunts


def test_a_query_hunts_between_searches_from_points_of_open_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    result, hunts = hunted(monkeypatch, finds=2)
    assert result.verdict is Verdict.SAT and result.witness is not None
    assert [share for _, share in hunts] == [1 / 32, 1 / 8]
    for target, _ in hunts:
        [points] = target.starts
        assert len(points) > 1 and len(np.unique(points, axis=0)) == len(points)
        assert (np.abs(points) <= 1).all() and (np.abs(points) == 1).mean() > 0.9  # a minimiser is a corner
    assert hunts[0][0].seed != hunts[1][0].seed


def test_a_look_hands_its_points_to_the_thorough_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    result, [(_, none), (thorough, starts), (_, share)] = hunted(monkeypatch, finds=0, looks=True)
    assert result.verdict is Verdict.UNKNOWN and none == 0 and share == 1 / 8
    assert starts == 2 and len(thorough.starts[1]) > 1  # the root's and the look's


def test_hunts_that_find_nothing_leave_the_query_open(monkeypatch: pytest.MonkeyPatch) -> None:
    result, hunts = hunted(monkeypatch, finds=0)
    assert result.verdict is Verdict.UNKNOWN and len(hunts) == 2
    assert result.statistics["relu_split"]["open"] > 0


def test_a_hunt_that_does_not_fit_into_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    result, hunts = hunted(monkeypatch, finds=-1)
    assert result.verdict is Verdict.UNKNOWN and len(hunts) == 2 and "memory" not in result.reason


def test_nobody_hunts_where_attacks_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    result, hunts = hunted(monkeypatch, finds=1, attack={"enabled": False})
    assert result.verdict is Verdict.UNKNOWN and not hunts
