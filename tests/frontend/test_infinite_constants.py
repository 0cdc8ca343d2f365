"""Minus infinity and the lowest number as constants: masks, limits, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from tests.frontend.models import check, load, model, resident
from verifier.core.errors import UnsupportedError
from verifier.core.interval import Interval
from verifier.graph.graph import Graph

INF, LOWEST = -np.inf, float(np.finfo(np.float32).min)


def mask(fill: float) -> np.ndarray:
    return np.where(np.tril(np.ones((3, 3), bool)), 0, fill).astype(np.float32)


def intervals(graph: Graph, low: float, high: float) -> Interval:
    """Of the output, by interval arithmetic."""
    full = [torch.full((1, *graph.input_shape), v, dtype=torch.float64) for v in (low, high)]
    found, store = {0: Interval(*full)}, resident(graph)
    for node in graph.nodes[1:]:
        with store.fetch(node.op.handles, torch.float64) as p:
            found[node.index] = node.op.interval([found[i] for i in node.inputs], p)
    return found[graph.output]


def added(fill: float) -> Any:
    nodes = [helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node("Softmax", ["s"], ["y"], axis=-1)]
    return nodes, {"m": mask(fill)}


def chosen(fill: float) -> Any:
    nodes = [helper.make_node("Where", ["k", "x", "f"], ["s"]), helper.make_node("Softmax", ["s"], ["y"], axis=-1)]
    return nodes, {"k": mask(1.0) == 0, "f": np.array(fill, np.float32)}


@pytest.mark.parametrize("made", [added, chosen])
@pytest.mark.parametrize("fill", [INF, LOWEST, -1e9, -1e4])
def test_masked_softmax(made: Any, fill: float, tmp_path: Path) -> None:
    nodes, constants = made(fill)
    network = load(model(nodes, (1, 3, 3), constants), tmp_path)
    check(network)
    low, up = intervals(network.graph, -1, 1)
    assert bool((up <= 1 + 1e-9).all()) and bool((low >= -1e-300).all())
    hidden = up[0][torch.from_numpy(mask(1.0) != 0).expand_as(up[0])]
    assert bool((hidden < 1e-300).all()) and bool((hidden > 0).all() if fill > INF else (hidden == 0).all())


def test_small_mask_hides_nothing(tmp_path: Path) -> None:
    """A score of 60 under a mask of -50 has nearly all of the weight."""
    nodes, constants = added(-50.0)
    network = load(model(nodes, (1, 3, 3), constants), tmp_path)
    assert intervals(network.graph, 0, 60).upper.max() > 0.9999


def test_row_that_is_masked_altogether_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node("Softmax", ["s"], ["y"], axis=-1)]
    with pytest.raises(UnsupportedError, match="minus infinity altogether"):
        load(model(nodes, (1, 3, 3), {"m": np.full((3, 3), INF, np.float32)}), tmp_path)


PAD: dict[str, list[NodeProto]] = {
    "pool": [helper.make_node("MaxPool", ["p"], ["y"], kernel_shape=[2, 3])],
    "reduced": [helper.make_node("ReduceMax", ["p"], ["y"], axes=[2, 3])],
}


@pytest.mark.parametrize("key", PAD)
@pytest.mark.parametrize("fill", [INF, LOWEST])
def test_padding_below_everything(key: str, fill: float, tmp_path: Path) -> None:
    nodes = [helper.make_node("Pad", ["x", "n", "f"], ["p"]), *PAD[key]]
    constants = {"n": np.array([0, 0, 1, 1, 0, 0, 0, 1]), "f": np.array(fill, np.float32)}
    network = load(model(nodes, (1, 1, 3, 3), constants), tmp_path)
    check(network)
    low, up = intervals(network.graph, -1, 1)
    assert bool((low >= -10).all()) and bool((up <= 20).all())


def test_limits_that_are_infinite(tmp_path: Path) -> None:
    constants = {"a": np.array(INF, np.float32), "b": np.array(-INF, np.float32)}
    network = load(
        model(
            [helper.make_node("Clip", ["x", "a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["y"])],
            (1, 3),
            constants,
        ),
        tmp_path,
    )
    assert [n.op.kind for n in network.graph.nodes] == ["Input", "Relu"]


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_limit_far_away(op: str, tmp_path: Path) -> None:
    far = np.float32(-1e30 if op == "Max" else 1e30)
    network = load(model([helper.make_node(op, ["x", "c"], ["y"])], (1, 3), {"c": np.full(3, far)}), tmp_path)
    low, up = intervals(network.graph, -1, 1)
    assert low.min() == -1 and up.max() == 1


@pytest.mark.parametrize("op", ["Exp", "Relu", "Neg"])
def test_other_readers_refuse_infinity(op: str, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "m"], ["s"]), helper.make_node(op, ["s"], ["y"])]
    with pytest.raises(UnsupportedError, match="minus infinity"):
        load(model(nodes, (3, 3), {"m": mask(INF)}), tmp_path)
