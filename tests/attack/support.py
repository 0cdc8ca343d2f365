"""Small networks and problems for the tests of attacks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.device import DEVICE, array, single
from verifier.attack.offers import Accept
from verifier.attack.target import Target
from verifier.config import AttackConfig
from verifier.core.deadline import Deadline
from verifier.core.handles import Handle
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import Op
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu


def network(layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> Graph:
    """ReLU network of (weight, bias) pairs, no ReLU after the last."""
    n_in = layers[0][0].shape[1]
    nodes = [Node(0, "x", Input(), (), (n_in,))]
    parameters: dict[Handle, Tensor] = {}

    def add(op: Op, n: int) -> None:
        nodes.append(Node(len(nodes), f"n{len(nodes)}", op, (len(nodes) - 1,), (n,)))

    for i, (weight, bias) in enumerate(layers):
        w, b = Handle(f"w{i}", weight.shape), Handle(f"b{i}", bias.shape)
        parameters[w] = torch.tensor(weight, dtype=torch.float32)
        parameters[b] = torch.tensor(bias, dtype=torch.float32)
        add(Linear(w, b), weight.shape[0])
        if i + 1 < len(layers):
            add(Relu(), weight.shape[0])
    return Graph(tuple(nodes), len(nodes) - 1, parameters)


def random_network(rng: np.random.Generator, sizes: Sequence[int]) -> Graph:
    return network(
        [(rng.normal(size=(b, a)) * (2 / a) ** 0.5, rng.normal(size=b) * 0.1) for a, b in itertools.pairwise(sizes)]
    )


def store(graph: Graph):
    return single(graph).weights


def evaluate(graph: Graph, x: np.ndarray) -> np.ndarray:
    """(P, n) float32 to (P, n_out)."""
    y = graph.forward(torch.from_numpy(np.atleast_2d(x)).to(DEVICE), store(graph))
    assert isinstance(y, Tensor)
    return array(y)


def problem(
    lower: np.ndarray,
    upper: np.ndarray,
    rows: np.ndarray,
    d: Sequence[float] | np.ndarray,
    cases: Sequence[tuple[int, Sequence[int]]],
    row_x: np.ndarray | None = None,
) -> Problem:
    """Boxes (K, n), rows (M, n_out), and cases as (box, rows)."""
    low, up = np.atleast_2d(lower).astype(np.float32), np.atleast_2d(upper).astype(np.float32)
    width = max((len(r) for _, r in cases), default=0)
    table = np.array([list(r) + [-1] * (width - len(r)) for _, r in cases], dtype=np.int64).reshape(len(cases), width)
    box = np.array([b for b, _ in cases], dtype=np.int64)
    return Problem(low, up, low, up, np.asarray(rows, float), row_x, np.asarray(d, float), box, table)


def target(graph: Graph, question: Problem, accept: Accept, **changes: Any) -> Target:
    """The question to attacks, with ``changes`` of what a target consists of."""
    usual = {"config": AttackConfig(restarts=30, steps=30), "deadline": Deadline(20), "device": DEVICE, "seed": 0}
    values = usual | changes
    return Target(graph, values.pop("store", None) or store(graph), question, accept=accept, **values)


class Judge:
    """Replays candidates with the graph itself and records them; refuses the first ``refusals`` that hold."""

    def __init__(self, graph: Graph, question: Problem, refusals: int = 0) -> None:
        self.graph, self.problem, self.refusals = graph, question, refusals
        self.seen: list[np.ndarray] = []

    def __call__(self, x: np.ndarray) -> Witness | None:
        assert x.dtype == np.float32 and x.shape == (self.problem.n_in,)
        self.seen.append(x.copy())
        y = evaluate(self.graph, x)
        slack = self.problem.margins(x[None], y)[0]
        for case, (box, rows) in enumerate(zip(self.problem.case_box, self.problem.case_rows, strict=True)):
            in_box = (self.problem.witness_lower[box] <= x).all() and (x <= self.problem.witness_upper[box]).all()
            if in_box and all(slack[r] >= 0 for r in rows if r >= 0):
                if self.refusals > 0:
                    self.refusals -= 1
                    return None
                return Witness(x.astype(np.float64), y[0].astype(np.float64), case=case)
        return None
