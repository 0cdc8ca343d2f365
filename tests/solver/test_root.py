"""Root bounds that are cut short, and the time of the query."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch

from tests.bab.test_input_split import evaluate, network, problem
from tests.support.device import DEVICE, ON_DEVICE, single
from verifier.api import verify
from verifier.bab.bounder import CaseRows
from verifier.bounds.crown import Specification
from verifier.config import Config, load_config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded
from verifier.core.problem import Problem
from verifier.core.result import Verdict
from verifier.frontend.network import Network
from verifier.graph.graph import Graph
from verifier.solver.root import Noted, Root, RootContext, bound_root


def deep() -> tuple[Graph, Problem]:
    """A network whose hidden bounds matter, and a row just below its least value."""
    graph = network(3, n_in=4, width=16, n_out=1, depth=4)
    points = torch.rand(4096, 4, generator=torch.Generator().manual_seed(0)).numpy() - 0.5
    least = float(evaluate(graph, points).min())
    return graph, problem([([-0.5] * 4, [0.5] * 4)], [[1.0]], [least - 0.01], [(0, [0])])


class After(Deadline):
    """Expires at the n-th question."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def expired(self) -> bool:
        self.left -= 1
        return self.left < 0


def bounded(
    questions: int | None, query: Deadline | None = None, noted: Noted | None = None, config: Config | None = None
) -> Root:
    graph, question = deep()
    backend = single(graph)
    deadline = Deadline() if questions is None else After(questions)
    noted, query = noted or Noted(), query or Deadline()
    context = RootContext(graph, backend, backend, config or Config(), 60.0, deadline, query=query, noted=noted)
    return bound_root(context, question, np.arange(1))


def test_what_time_has_cut_is_counted() -> None:
    cuts = [bounded(questions).cut for questions in (0, 9, 20, None)]
    assert not cuts[-1] and all(cuts[:-1])
    hidden = [cut.hidden for cut in cuts]
    assert hidden == sorted(hidden, reverse=True) and hidden[0] == 3 and hidden[-1] == 0  # of four, one is exact
    assert cuts[0].rows and not cuts[-1].rows
    if DEVICE.type != "cpu":
        return  # the clock is asked less often
    steps = load_config(values={"bounds.alpha.intermediate_iterations": 3})
    slopes = [bounded(questions, config=steps).cut.slopes for questions in (40, 50, 55, None)]
    assert slopes == sorted(slopes, reverse=True) and slopes[0] > 0 == slopes[-1]


def test_the_worst_bound_is_known_at_every_moment() -> None:
    """Whenever the query ends, the worst bound so far is what the last finished method found; it only grows."""
    full = bounded(None)
    worst = []
    for questions in range(8):
        noted = Noted()
        with suppress(DeadlineExceeded):
            bounded(0, After(questions), noted)
        assert noted.worst is not None and noted.worst <= float(full.gap.min()) + 1e-6
        worst.append(noted.worst)
    assert worst == sorted(worst) and worst[0] < worst[-1]
    noted = Noted()
    root = bounded(None, noted=noted)
    assert noted.worst == pytest.approx(float(root.gap.min()), rel=1e-12)


def test_records_of_queries_that_end_in_the_root_have_the_worst_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, question = deep()

    def interrupted(context: RootContext, problem: Problem, cases: np.ndarray) -> Root:
        context.report("CROWN")
        context.noted.tighter(-3.0)
        context.noted.tighter(-7.0)
        context.noted.cut.hidden = 2
        raise DeadlineExceeded("in the middle")

    monkeypatch.setattr("verifier.solver.phases.bound_root", interrupted)
    net = Network(graph, "net", graph.input_shape, graph.output_shape, np.dtype(np.float32), None, forward(graph))
    off = {"attack.enabled": False, "bab.branching": "kfsb", "threads": 1, **ON_DEVICE}
    found = verify(net, question, off, 30.0)
    assert found.verdict is Verdict.TIMEOUT
    cut = {"boxes": 1, "hidden": 2, "slopes": 0, "rows": 0}
    assert found.statistics["root"] == {"method": "CROWN", "open": 1, "worst": -3.0, "cut": cut}


def forward(graph: Graph) -> Callable[[np.ndarray, bool], np.ndarray]:
    def run(x: np.ndarray, optimised: bool) -> np.ndarray:
        out = graph.forward(torch.from_numpy(x)[None].to(DEVICE), single(graph).weights)
        assert isinstance(out, torch.Tensor)
        return out[0].cpu().numpy()

    return run


def test_a_root_that_is_cut_short_keeps_what_it_has() -> None:
    """The later, the tighter; every one is sound, and has slopes to search with."""
    graph, question = deep()
    points = torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) - 0.5
    widths = []
    for questions in (0, 5, 40, None):
        root = bounded(questions)
        assert root.open.tolist() == [0] and root.rows is not None and root.state.certified
        value = graph.forward(points.to(root.state.box.lower.device)[:, None], single(graph).weights)
        assert isinstance(value, torch.Tensor)
        out = root.state.bounds[graph.output]
        assert bool((value >= out.lower - 1e-5).all()) and bool((value <= out.upper + 1e-5).all())
        assert root.gap[0] <= float(value.min()) - question.row_d[0]
        widths.append(sum(float((b.upper - b.lower).sum()) for b in root.state.bounds.values()))
    assert widths == sorted(widths, reverse=True) and widths[0] > 1.05 * widths[-1]


def test_a_root_ends_with_its_query() -> None:
    with pytest.raises(DeadlineExceeded, match="CROWN"):
        bounded(0, Deadline(0.0))


def test_some_of_the_cases_keep_their_rows() -> None:
    n, s = 5, 2
    spec = Specification(torch.arange(n * s * 3, dtype=torch.float64).reshape(n, s, 3))
    rows = CaseRows(
        spec,
        torch.arange(n * s, dtype=torch.float64).reshape(n, s),
        {4: {"alpha": torch.arange(n * s * 6.0).reshape(n, s, 6)}},
        torch.arange(n * s).reshape(n, s) % 3 == 0,
    )
    some = rows.select(torch.tensor([1, 4]))
    for k, i in enumerate((1, 4)):
        assert torch.equal(some.spec.y[k], spec.y[i]) and torch.equal(some.thresholds[k], rows.thresholds[i])
        assert torch.equal(some.parameters[4]["alpha"][k], rows.parameters[4]["alpha"][i])
        assert some.strict is not None and rows.strict is not None and torch.equal(some.strict[k], rows.strict[i])
