"""What is left out of the bounds cannot matter, and what matters is not left out."""

from __future__ import annotations

import pytest
import torch

from tests.bounds.nets import ARCHITECTURES, make
from tests.support.device import DEVICE
from verifier.bounds.crown import (
    Specification,
    crown_hidden,
    crown_rows,
    open_elements,
    preactivations,
    tight_by_ibp,
)
from verifier.bounds.engine import Engine
from verifier.bounds.relevance import relevant


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_elements_that_gradients_reach_are_relevant(name: str) -> None:
    """Of a smooth stand-in for every node: outputs that move with an element make it relevant."""
    made = make(name, 0)
    graph, backend = made.graph, made.backend
    out = graph.nodes[graph.output]
    row = torch.zeros(1, *out.shape, device=DEVICE)
    row.view(-1)[0] = 1
    found = relevant(Engine(graph, backend), {graph.output: row})
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn((1, *graph.input_shape), generator=random).to(DEVICE)
        values: dict[int, torch.Tensor] = {0: x}
        for node in graph.nodes[1:]:
            with backend.weights.fetch(node.op.handles, torch.float32) as p:
                values[node.index] = node.op.forward([values[i] for i in node.inputs], p)
        for index in preactivations(graph):
            start = values[index].detach().clone().requires_grad_()
            again = {**values, index: start}
            for node in graph.nodes[index + 1 :]:
                with backend.weights.fetch(node.op.handles, torch.float32) as p:
                    again[node.index] = node.op.forward([again[i] for i in node.inputs], p)
            total = (again[graph.output] * row).sum()
            if not total.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(total, start, allow_unused=True)
            if gradient is not None and bool((gradient != 0).any()):
                assert bool(found[index][gradient[0] != 0].all())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_rows_get_the_same_bounds(name: str) -> None:
    made = make(name, 1)
    graph, backend = made.graph, made.backend
    out = graph.nodes[graph.output]
    y = torch.zeros(1, 1, *out.shape, dtype=torch.float64, device=DEVICE)
    y.view(-1)[-1] = -1
    found = relevant(Engine(graph, backend), {graph.output: y})
    lowers = []
    for matters in (found, None):
        state = crown_hidden(Engine(graph, backend), made.state(), relevant=matters)
        lowers.append(crown_rows(Engine(graph, backend), state, Specification(y))[0])
    torch.testing.assert_close(*lowers, rtol=1e-9, atol=1e-9)


def test_windows_leave_most_of_an_image_out() -> None:
    made = make("residual", 0)
    graph = made.graph
    image = next(n for n in graph.nodes if n.index in preactivations(graph) and len(n.shape) == 3)
    row = torch.zeros(image.shape, device=DEVICE)
    row[0, 0, 0] = 1
    found = relevant(Engine(graph, made.backend), {image.index: row})
    assert 0 < int(found[0].sum()) < found[0].numel() / 2


def test_nodes_settled_by_intervals_gain_nothing_from_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of larger values: nodes after the step are what they were without rows."""
    settled = 0
    for seed in range(4):
        made = make("choice", seed)
        graph, backend = made.graph, made.backend
        state = crown_hidden(Engine(graph, backend), made.state())
        nodes = [i for i in preactivations(graph) if tight_by_ibp(graph, graph.nodes[i], state.bounds)]
        monkeypatch.setattr("verifier.bounds.crown.tight_by_ibp", lambda *a: False)
        other = crown_hidden(Engine(graph, backend), made.state())
        monkeypatch.undo()
        for i in nodes:
            settled += int(open_elements(Engine(graph, backend), i, state.bounds[i]).shape[0] > 0)
            torch.testing.assert_close(state.bounds[i].lower, other.bounds[i].lower, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(state.bounds[i].upper, other.bounds[i].upper, rtol=1e-5, atol=1e-6)
    assert settled > 0
