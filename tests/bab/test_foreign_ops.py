"""Searches know ops by what they say about themselves: stand-ins get the same splits, matrices and sweeps."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.bounds.foreign import replaced, silent, twin
from tests.bounds.nets import ARCHITECTURES, Case, inside, make
from tests.support.device import DEVICE
from verifier.bab.boxes import bound_boxes, float32_suffices
from verifier.bab.compact import compact
from verifier.bab.splits import SplitSpace, split_space
from verifier.bounds.crown import BoundState, Specification, crown_hidden
from verifier.bounds.engine import PLAIN, ROUNDED_32, ROUNDED_64, Arithmetic
from verifier.core.problem import Problem
from verifier.solver.strategy import features

NAMES = sorted(ARCHITECTURES)
ROWS = 3


def specification(made: Case) -> Specification:
    random = torch.Generator().manual_seed(1)
    y = torch.randn((1, ROWS, *made.graph.output_shape), generator=random, dtype=torch.float64)
    return Specification(y.to(DEVICE))


def root(made: Case) -> BoundState:
    return crown_hidden(made.engine, made.state())


def spaces(made: Case) -> tuple[SplitSpace, SplitSpace, SplitSpace]:
    """Of the network, of its twin and of what says nothing, at the bounds of the network."""
    state = root(made)
    others = (made, replaced(made, twin), replaced(made, silent))
    first, second, third = (split_space(m.graph, m.backend, state.bounds) for m in others)
    return first, second, third


@pytest.mark.parametrize("name", NAMES)
def test_twins_are_split_alike_and_silent_ops_not_at_all(name: str) -> None:
    first, second, third = spaces(make(name, 0, radius=1.0))
    assert [(g.value, g.owner, g.start, g.stop) for g in first.groups] == [
        (g.value, g.owner, g.start, g.stop) for g in second.groups
    ]
    assert all(torch.equal(g.elements, h.elements) for g, h in zip(first.groups, second.groups, strict=True))
    assert torch.equal(first.lower, second.lower) and torch.equal(first.upper, second.upper)
    assert third.size == 0


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "concat", "smooth"])
def test_twins_have_the_same_compact_network(name: str) -> None:
    made = make(name, 0, radius=1.0)
    state, spec = root(made), specification(made)
    found = []
    for m in (made, replaced(made, twin)):
        space = split_space(m.graph, m.backend, state.bounds)
        found.append(compact(m.graph, m.backend, made.box, space, spec, torch.zeros((1, ROWS), device=DEVICE).double()))
    if found[0] is None or found[1] is None:
        assert found == [None, None] and name == "smooth"
        return
    for field in fields(found[0]):
        one, other = (getattr(f, field.name) for f in found)
        assert torch.equal(one, other) if isinstance(one, Tensor) else isinstance(one, tuple) or one == other
    assert [layer.columns for layer in found[0].layers] == [layer.columns for layer in found[1].layers]


@pytest.mark.parametrize("hidden", ["interval", "linear", "crown"])
@pytest.mark.parametrize("arithmetic", [PLAIN, ROUNDED_32, ROUNDED_64], ids=["search", "f32", "f64"])
@pytest.mark.parametrize("name", ["mlp", "residual", "shared", "smooth", "gated", "choice"])
def test_boxes_of_twins_and_of_silent_ops(name: str, arithmetic: Arithmetic, hidden: str) -> None:
    made = make(name, 0, batch=3)
    spec = specification(made)

    def bounded(m: Case) -> tuple[Tensor, dict]:
        found = bound_boxes(m.engine.using(arithmetic), m.box, spec, hidden)  # type: ignore[arg-type]
        return found.lower, found.bounds

    first, second, third = (bounded(m) for m in (made, replaced(made, twin), replaced(made, silent)))
    assert torch.equal(first[0], second[0])
    for i, bounds in first[1].items():
        assert torch.equal(bounds.lower, second[1][i].lower) and torch.equal(bounds.upper, second[1][i].upper)
    values = made.values(made.samples(100))
    for _, found in (first, third):
        assert all(inside(values[i], b, 1e-12 if arithmetic.rounding else 5e-5) for i, b in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_features_and_arithmetic_of_twins(name: str) -> None:
    made = make(name, 0)
    low, up = (b.flatten(1).cpu().numpy() for b in made.box)
    n = made.graph.nodes[made.graph.output].size
    rows, table = np.eye(n)[:1], np.zeros((1, 1), np.int64)
    problem = Problem(low, up, low, up, rows, None, np.zeros(1), np.zeros(1, np.int64), table)
    first, second, third = (m.graph for m in (made, replaced(made, twin), replaced(made, silent)))
    assert features(first, problem) == features(second, problem)
    assert not features(third, problem).only_relu
    assert float32_suffices(first) == float32_suffices(second)
    assert not float32_suffices(third)
