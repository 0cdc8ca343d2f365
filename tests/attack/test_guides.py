"""Gradients through steps and saturated functions, and rows over what a last softmax, sigmoid or tanh is fed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack.support import Judge, problem, store, target
from tests.support.device import DEVICE
from verifier.attack.attacks.pgd import search
from verifier.attack.heads import find_head
from verifier.attack.objective import build_objective
from verifier.attack.surrogate import guided
from verifier.core.handles import Handle
from verifier.core.problem import Problem
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import Op
from verifier.ops.add import Add
from verifier.ops.exponential import Exp
from verifier.ops.linear import Linear
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.reduce import Sum
from verifier.ops.relu import Relu
from verifier.ops.shape import Reshape
from verifier.ops.sigmoid import Sigmoid, Tanh
from verifier.ops.step import Floor, Heaviside, Round, Sign, Single


class Chain:
    """A network that is built op by op."""

    def __init__(self, n_in: int) -> None:
        self.nodes = [Node(0, "x", Input(), (), (n_in,))]
        self.parameters: dict[Handle, torch.Tensor] = {}

    def op(self, op: Op, *shape: int, inputs: tuple[int, ...] = ()) -> Chain:
        index = len(self.nodes)
        self.nodes.append(Node(index, f"n{index}", op, inputs or (index - 1,), shape or self.nodes[-1].shape))
        return self

    def linear(self, weight: np.ndarray, bias: np.ndarray | None = None) -> Chain:
        n = len(self.nodes)
        w, b = Handle(f"w{n}", weight.shape), Handle(f"b{n}", weight.shape[:1])
        self.parameters[w] = torch.tensor(weight, dtype=torch.float32)
        self.parameters[b] = torch.tensor(np.zeros(len(weight)) if bias is None else bias, dtype=torch.float32)
        return self.op(Linear(w, b), weight.shape[0])

    def softmax(self) -> Chain:
        """In the steps that the front end makes of it."""
        (n,), z = self.nodes[-1].shape, len(self.nodes) - 1
        self.op(Reshape((1, n)), 1, n).op(Reshape((n, 1)), n, 1, inputs=(z,))
        self.op(Add((1.0, -1.0)), n, n, inputs=(z + 1, z + 2)).op(Exp())
        return self.op(Sum((1,), False), n).op(Reciprocal(n))

    @property
    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), len(self.nodes) - 1, self.parameters)


def box(n: int, rows: np.ndarray, d: list[float], cases: list[tuple[int, list[int]]] | None = None) -> Problem:
    return problem(-np.ones(n), np.ones(n), rows, d, cases or [(0, [i]) for i in range(len(rows))])


# ------------------------------------------------------------------------------------------------------------ surrogate


@pytest.mark.parametrize("op", [Sign(), Heaviside(), Floor(), Round(), Sigmoid(), Tanh()], ids=lambda op: op.kind)
def test_values_stay_and_gradients_never_vanish(op: Op) -> None:
    graph = Chain(6).op(op).graph
    x = torch.linspace(-60, 60, 24, device=DEVICE).view(4, 6)
    leaf = x.clone().requires_grad_()
    y = guided(graph).forward(leaf, store(graph))
    assert isinstance(y, torch.Tensor)
    plain = graph.forward(x, store(graph))
    assert isinstance(plain, torch.Tensor) and torch.equal(y.detach(), plain)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    assert bool((slope > 0).all())  # all of these functions increase


def test_networks_that_need_no_guide_are_left_alone() -> None:
    graph = Chain(3).linear(np.eye(3)).op(Relu()).op(Single()).graph
    assert guided(graph) is graph


def test_a_point_keeps_its_width_and_widths_differ() -> None:
    graph = guided(Chain(2).op(Sign()).graph)
    x = torch.tensor([[1.0, 0.1]], device=DEVICE).repeat(8, 1).requires_grad_()
    y = graph.forward(x, store(graph))
    assert isinstance(y, torch.Tensor)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope[:4], slope[4:]) and len({tuple(s) for s in slope[:4].tolist()}) == 4


@pytest.mark.parametrize("seed", range(4))
def test_binarised_networks_are_attacked(seed: int) -> None:
    """300 inputs and two layers of signs; the wanted output is far beyond what random points reach."""
    rng = np.random.default_rng(seed)
    chain = Chain(300)
    for _ in range(2):
        chain.linear(rng.normal(size=(64, chain.nodes[-1].size)), rng.normal(size=64)).op(Sign())
    graph = chain.linear(rng.choice([-1.0, 1.0], size=(1, 64))).graph
    corners = rng.choice([-1.0, 1.0], size=(4096, 300)).astype(np.float32)
    y = graph.forward(torch.from_numpy(corners).to(DEVICE), store(graph))
    assert isinstance(y, torch.Tensor)
    question = box(300, np.array([[1.0]]), [float(y.min()) - 8])
    assert search(target(graph, question, Judge(graph, question))) is not None


# ----------------------------------------------------------------------------------------------------------------- head


def ends(kind: str, scale: float, n: int = 4, seed: int = 0) -> Graph:
    """A small network with large inputs to its last function."""
    rng = np.random.default_rng(seed)
    chain = Chain(6).linear(rng.normal(size=(24, 6)), rng.normal(size=24)).op(Relu())
    chain = chain.linear(scale * rng.normal(size=(n, 24)), scale * rng.normal(size=n))
    if kind == "softmax":
        return chain.softmax().graph
    return chain.op({"sigmoid": Sigmoid(), "tanh": Tanh()}[kind]).graph


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "tanh"])
def test_heads_are_found_and_only_they(kind: str) -> None:
    graph = ends(kind, 1.0)
    question = box(6, np.eye(4), [0.1] * 4)
    head = find_head(graph, store(graph), question, DEVICE)
    assert head is not None and graph.nodes[head.node].size == 4
    before = next(n for n in graph.nodes if n.index == head.node)
    assert isinstance(before.op, Linear) or before.op.kind == "Reshape"
    cut = Graph(graph.nodes[:4], 3, graph.parameters)
    assert find_head(cut, store(cut), question, DEVICE) is None
    other = Chain(4).op(Sigmoid()).op(Exp()).graph
    assert find_head(other, store(other), box(4, np.eye(4), [0.1] * 4), DEVICE) is None


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["softmax", "sigmoid", "tanh"]))
def test_rows_over_the_inputs_say_the_same(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    graph = ends(kind, 0.3, seed=seed)
    low = -1.0 if kind == "tanh" else 0.0
    rows = np.zeros((4, 4))
    rows[0, [0, 2]], rows[1, 1], rows[2, 3], rows[3] = [2.0, -2.0], 1.5, -1.0, rng.normal(size=4)
    d = [0.0, 1.5 * rng.uniform(low, 1), -rng.uniform(low, 1), 0.1]
    question = box(6, rows, d)
    objective = build_objective(graph, store(graph), question, DEVICE)
    assert objective.head is not None and not objective.head.alone
    x = torch.from_numpy(rng.uniform(-1, 1, (64, 6)).astype(np.float32)).to(DEVICE)
    y = graph.forward(x, store(graph))
    assert isinstance(y, torch.Tensor)
    wanted = torch.tensor(d, device=DEVICE) - y.double() @ torch.from_numpy(rows).to(DEVICE).T
    for case in range(4):
        score = objective.score(x, torch.full((64,), case, device=DEVICE))[0]
        sure = wanted[:, case].abs() > 1e-5
        assert torch.equal((score >= 0)[sure], (wanted[:, case] >= 0)[sure])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "tanh"])
def test_saturation_hides_no_direction(kind: str) -> None:
    """Outputs that float32 rounds to their limits: the slack is -1 or so everywhere, its gradient zero."""
    graph = ends(kind, 400.0)
    rows = np.array([[1.0, -1.0, 0, 0]])
    objective = build_objective(graph, store(graph), box(6, rows, [0.0]), DEVICE)
    x = torch.rand((32, 6), device=DEVICE) * 2 - 1
    case = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    slope = objective.gradient(x, case, torch.zeros(32, device=DEVICE))[2]
    assert bool((slope.abs().amax(1) > 0).all())


def test_what_only_rounding_makes_true_is_still_a_candidate() -> None:
    """Two probabilities that underflow to zero are equal, whatever their logits say."""
    graph = Chain(3).linear(np.zeros((3, 3)), np.array([0.0, -900.0, -950.0])).softmax().graph
    question = box(3, np.array([[0.0, 1.0, -1.0]]), [0.0])
    found = search(target(graph, question, Judge(graph, question)))
    assert found is not None
