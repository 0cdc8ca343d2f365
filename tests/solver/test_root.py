"""Root bounds that are cut short, and the time of the query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.bab.test_input_split import evaluate, network, problem
from tests.support.device import single
from verifier.bab.bounder import CaseRows
from verifier.bounds.crown import Specification
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded
from verifier.core.problem import Problem
from verifier.graph.graph import Graph
from verifier.solver.root import Root, RootContext, bound_root


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


def bounded(questions: int | None, query: Deadline | None = None) -> Root:
    graph, question = deep()
    backend = single(graph)
    deadline = Deadline() if questions is None else After(questions)
    context = RootContext(graph, backend, backend, Config(), 60.0, deadline, query=query or Deadline())
    return bound_root(context, question, np.arange(1))


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
