"""Sweeps over boxes that are recorded once and replayed, and which sweep a search over boxes pays for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.bab.test_input_split import evaluate, lattice, network, problem, run, smooth
from tests.bab.test_recordings import Again, NoLooks
from tests.bounds.nets import make
from tests.support.device import DEVICE
from verifier.bab import sweeps
from verifier.bab.boxes import Hidden, bound_boxes
from verifier.bab.input_split import InputSplitResult
from verifier.bab.recordings import Recordings
from verifier.bab.sweeps import Trial, levels
from verifier.bounds.crown import Specification
from verifier.bounds.engine import ROUNDED_32, ROUNDED_64, Arithmetic
from verifier.core.cuda_graphs import CudaGraphs, Outputs
from verifier.core.interval import Interval
from verifier.graph.graph import Graph

NETS = ["mlp", "conv", "residual", "shared", "concat", "smooth", "gated", "pooled", "choice"]


def rows(graph: Graph, count: int = 3) -> Specification:
    y = torch.randn(1, count, *graph.output_shape, generator=torch.Generator().manual_seed(5))
    return Specification(y.double().to(DEVICE))


@pytest.mark.parametrize("name", ["mlp", "shared", "smooth", "gated", "choice"])
@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
def test_sweeps_with_given_elements_read_no_value(name: str, hidden: Hidden) -> None:
    """And find what they find when they look for the undecided ones themselves."""
    case = make(name, 3, batch=2)
    spec = rows(case.graph)
    free = bound_boxes(case.engine, case.box, spec, hidden)
    with NoLooks():
        given = bound_boxes(case.engine, case.box, spec, hidden, elements=free.elements)
    assert torch.equal(free.lower, given.lower)
    assert (hidden == "crown") == bool(free.elements)


@pytest.mark.parametrize("arithmetic", [ROUNDED_32, ROUNDED_64])
def test_elements_without_rows_have_looser_bounds(arithmetic: Arithmetic) -> None:
    case = make("mlp", 3)
    spec = rows(case.graph)
    engine = case.engine.using(arithmetic)
    full = bound_boxes(engine, case.box, spec, "crown")
    half = bound_boxes(engine, case.box, spec, "crown", elements={i: e[::2] for i, e in full.elements.items()})
    none = bound_boxes(engine, case.box, spec, "crown", elements={})
    widths = [sum(float((b.upper - b.lower).sum()) for b in found.bounds.values()) for found in (full, half, none)]
    assert widths[0] < widths[1] < widths[2]
    y = case.graph.forward(case.box.lower, case.backend.weights)
    assert isinstance(y, Tensor)
    value = (spec.y.flatten(2) @ Graph.flat(y).double()[:, :, None]).squeeze(-1)
    assert bool((half.lower <= value + 1e-9).all())


def recorded(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> tuple[Again, list[Recordings]]:
    """Searches over boxes record on any device; what they recorded."""
    recorder, kept = Again(), []

    class Kept(Recordings):
        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(recorder, 1 << 40, after, numbers=1 << 25)
            kept.append(self)

    monkeypatch.setattr(sweeps, "Recordings", Kept)
    return recorder, kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("maker", [network, smooth])
def test_searches_that_replay_are_right(monkeypatch: pytest.MonkeyPatch, maker: type, seed: int) -> None:
    graph = maker(seed)
    low, up, row = [-1.0, -1.0], [1.0, 1.0], [1.0, -0.7]
    dense = (evaluate(graph, lattice(low, up, 401)) @ row).min()
    _, kept = recorded(monkeypatch)
    monkeypatch.setattr(sweeps.Trial, "pays", lambda self: True)
    found = run(graph, problem([(low, up)], [row], [dense - 0.2], [(0, [0])]), batch_size=4)
    assert found.witness is None and found.open.size == 0
    planted = run(graph, problem([(low, up)], [row], [dense + 1e-3], [(0, [0])]), batch_size=4)
    assert planted.witness is not None
    assert sum(k.replays for k in kept) > 0


def test_cases_with_rows_of_their_own_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows change from box to box, and so what a recording reads."""
    graph = network(2)
    low, up = [-1.0, -1.0], [1.0, 1.0]
    values = evaluate(graph, lattice(low, up, 401))
    limits = [float((values @ r).min()) for r in ([1.0, 0.0], [0.0, 1.0])]

    def ask(shift: float) -> InputSplitResult:
        bounds = [limits[0] - 0.2, limits[1] + shift]
        question = problem([(low, up)] * 2, [[1.0, 0.0], [0.0, 1.0]], bounds, [(0, [0]), (1, [1])])
        return run(graph, question, batch_size=4)

    _, kept = recorded(monkeypatch)
    monkeypatch.setattr(sweeps.Trial, "pays", lambda self: True)
    assert ask(-0.2).open.size == 0
    assert ask(1e-3).witness is not None
    assert sum(k.replays for k in kept) > 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device on this machine")
@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
@pytest.mark.parametrize("name", NETS)
def test_a_gpu_replays_the_bits_of_a_sweep(name: str, hidden: Hidden) -> None:
    case = make(name, 3, batch=8)
    spec = rows(case.graph)
    elements = bound_boxes(case.engine, case.box, spec, hidden).elements

    def work(lower: Tensor, upper: Tensor) -> Outputs:
        found = bound_boxes(case.engine, Interval(lower, upper), spec, hidden, elements=elements)
        return (found.lower, found.walk.a.expand(*found.lower.shape, *found.walk.a.shape[2:]))

    kept = Recordings(CudaGraphs(DEVICE), 1 << 40, after=0, numbers=1 << 25)
    for shrink in (1.0, 0.5, 0.25):
        middle, radius = (case.box.lower + case.box.upper) / 2, (case.box.upper - case.box.lower) / 2
        inputs = (middle - shrink * radius, middle + shrink * radius)
        found = kept.run(hidden, 1, inputs, work)
        if found is None:
            pytest.skip("an op of this network looks at values")
        for value, other in zip(found, work(*inputs), strict=True):
            assert torch.equal(value, other)


# ------------------------------------------------------------------------------------------------- which sweep is paid


def test_levels_count_splits() -> None:
    """A bound that is off by four times as much needs every coordinate halved once more."""
    before, after, truth = (torch.tensor(v, dtype=torch.float64) for v in ([-63.0, -3.0], [-15.0, -3.0], [1.0, 1.0]))
    assert levels(before, after, truth, 5).tolist() == [5.0, 0.0]
    # Near enough to close is near enough: nothing is to be gained between a bound that closes and a better one.
    assert levels(torch.tensor([-3.0]), torch.tensor([0.9]), torch.tensor([1.0]), 4).tolist() == [4.0]


def test_no_bound_is_infinitely_many_splits_away() -> None:
    far = levels(torch.tensor([-math.inf, -1e300]), torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]), 16)
    assert far.tolist() == [60.0, 60.0]
    # Where there is a counterexample, nothing closes.
    assert levels(torch.tensor([-2.0]), torch.tensor([-1.0]), torch.tensor([-0.5]), 2).isfinite().all()


def test_a_trial_pays_when_it_gains_what_it_costs() -> None:
    dear = Trial(1000.0, least=1)
    assert dear.pays()
    dear.note(1, 10.0)
    assert not dear.pays()
    dear.note(1, 5000.0)
    assert dear.pays()


def test_bounds_that_never_close_give_way_to_tight_ones() -> None:
    """However much dearer they are: with linear sweeps alone this needs thousands of boxes."""
    graph = network(6, n_in=6, width=40, depth=5)
    low, up, row = [-0.05] * 6, [0.05] * 6, [1.0, -0.5]
    points = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0)).numpy() * 0.1 - 0.05
    values = evaluate(graph, points) @ row
    limit = 1.1 * float(values.min()) - 0.1 * float(values.max())
    question = problem([(low, up)], [row], [limit], [(0, [0])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps.Sweeps, "_crown_count", lambda self, left: 0)
        cheap = run(graph, question, max_domains=8000)
    chosen = run(graph, question, max_domains=20000)
    assert chosen.open.size == 0
    assert 10 * chosen.totals.statistics.bounded < cheap.totals.statistics.bounded


def test_nothing_is_recorded_while_many_elements_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no row in a recording has interval bounds, so that few may be missing."""
    graph = network(3, n_in=3, width=40)
    low, up, row = [-1.0] * 3, [1.0] * 3, [1.0, 0.5]
    least = float((evaluate(graph, lattice(low, up, 41)) @ row).min())
    question = problem([(low, up)], [row], [least - 0.5], [(0, [0])])
    grew: list[bool] = []
    note = sweeps.Sweeps._note_elements

    def noting(self: sweeps.Sweeps, found: dict[int, Tensor]) -> None:
        assert self.recordings["crown"].replays == 0 or not self._growing
        before = sum(e.shape[0] for e in self._elements.values())
        note(self, found)
        after = sum(e.shape[0] for e in self._elements.values())
        grew.append(self._growing)
        assert self._growing == (after > before)  # of so few elements every new one counts

    _, kept = recorded(monkeypatch)
    monkeypatch.setattr(sweeps.Trial, "pays", lambda self: True)
    monkeypatch.setattr(sweeps.Sweeps, "_note_elements", noting)
    run(graph, question, batch_size=4, max_domains=60)
    assert grew[0] and not grew[-1]
    assert all(not k.possible for k in kept)  # the search has given them up
