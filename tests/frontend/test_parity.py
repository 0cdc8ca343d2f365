"""Parity: on what a graph is compared with the original, and what that finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests.frontend.models import load, model, resident
from verifier.frontend.network import Network, Parity, parity

Change = Callable[[np.ndarray, np.ndarray], np.ndarray]


def identity(folder: Path, double: bool = False, n: int = 1) -> Network:
    kind, dtype = (TensorProto.DOUBLE, np.float64) if double else (TensorProto.FLOAT, np.float32)
    node = helper.make_node("Mul", ["x", "one"], ["y"])
    return load(model([node], [1, n], {"one": np.ones((1, n), dtype)}, elem_type=kind, out_type=kind), folder)


def changed(network: Network, change: Change) -> Network:
    """With an original that gives ``change(x, y)``."""
    return replace(network, run=lambda x, optimised: change(x, network.run(x, optimised)))


def compare(network: Network, low: object, up: object) -> Parity:
    lower, upper = (np.asarray(b, network.input_dtype) for b in (low, up))
    return parity(network, resident(network.graph), lower, upper)


def test_all_boxes_are_looked_at(tmp_path: Path) -> None:
    off = changed(identity(tmp_path), lambda x, y: y + (x > 5))
    assert compare(off, [0.0], [1.0]).mismatch is None
    found = compare(off, [[0.0], [10.0]], [[1.0], [11.0]])
    assert found.mismatch is not None and "differs from the original by 1" in found.mismatch
    assert found.boxes == 2 and found.difference == 1.0


def test_between_boxes_too(tmp_path: Path) -> None:
    off = changed(identity(tmp_path), lambda x, y: y + ((x > 2) & (x < 9)))
    assert compare(off, [[0.0], [10.0]], [[1.0], [11.0]]).mismatch is not None


def test_one_point_is_not_enough(tmp_path: Path) -> None:
    """The network is steady at the lower corner alone, where the two agree."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["p"]),
        helper.make_node("Sin", ["p"], ["y"]),
    ]
    network = load(model(nodes, [1, 1], {"k": np.array([1e12], np.float32)}), tmp_path)
    found = compare(network, [0.0], [0.7])
    assert found.mismatch is not None and "compared at 1 points, fewer than 4" in found.mismatch
    assert found.points == 1 and found.left_out > 40  # several attempts were made


def test_more_points_are_taken_where_few_are_steady(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sub", ["x", "c"], ["d"]),
        helper.make_node("Relu", ["d"], ["r"]),
        helper.make_node("Mul", ["r", "k"], ["p"]),
        helper.make_node("Sin", ["p"], ["y"]),
    ]
    constants = {"c": np.array([0.15], np.float32), "k": np.array([1e12], np.float32)}
    network = load(model(nodes, [1, 1], constants), tmp_path)
    found = compare(network, [0.0], [1.0])
    assert found.mismatch is None and found.points >= 4 and found.left_out > found.points


def test_a_box_of_one_point(tmp_path: Path) -> None:
    found = compare(identity(tmp_path), [0.5], [0.5])
    assert found.mismatch is None and found.points == 1 and found.left_out == 0


def test_outputs_that_are_nowhere_finite(tmp_path: Path) -> None:
    found = compare(changed(identity(tmp_path), lambda x, y: y + np.inf), [0.0], [1.0])
    assert found.mismatch is not None and "not finite" in found.mismatch and found.points == 0


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_the_comparison_is_in_the_network_s_own_type(double: bool, tmp_path: Path) -> None:
    network = identity(tmp_path, double)
    seen: list[np.ndarray] = []

    def note(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        seen.append(x)
        return y

    found = compare(changed(network, note), [0.1], [0.7])
    assert found.mismatch is None and found.dtype == ("float64" if double else "float32")
    assert {x.dtype for x in seen} == {np.dtype(found.dtype)}
    if double:
        assert any(np.float32(x) != x for x in seen)
        assert found.difference == 0.0 and found.tolerance < 1e-7
    # An error of float32's size is a difference in float64 alone.
    off = compare(changed(network, lambda x, y: y * (1 + 1e-6)), [0.1], [0.7])
    assert (off.mismatch is None) != double


def test_a_network_that_rounds_is_compared_in_float64(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["f"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Sub", ["x", "d"], ["e"]),
        helper.make_node("Mul", ["e", "k"], ["y"]),
    ]
    double = TensorProto.DOUBLE
    network = load(model(nodes, [1, 1], {"k": np.array([1e9])}, elem_type=double, out_type=double), tmp_path)
    assert compare(network, [0.5], [1.0]).mismatch is None
    # The same graph without the rounding is wrong.
    wrong = changed(network, lambda x, y: np.zeros_like(y))
    assert compare(wrong, [0.5], [1.0]).mismatch is not None


def test_float64_inside_a_network_of_float32(tmp_path: Path) -> None:
    """x - 1/3 near 1/3, scaled: in float32 nothing would be left of it."""
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Sub", ["d", "c"], ["e"]),
        helper.make_node("Mul", ["e", "k"], ["y"]),
    ]
    constants = {"c": np.array([1 / 3]), "k": np.array([1e9])}
    network = load(model(nodes, [1, 1], constants, out_type=TensorProto.DOUBLE), tmp_path)
    third = np.float32(1 / 3)
    found = compare(network, [third], [third + np.float32(3e-7)])
    assert found.mismatch is None and found.points >= 4 and found.left_out == 0
    assert compare(changed(network, lambda x, y: y + 1), [third], [third + np.float32(3e-7)]).mismatch is not None


def test_the_record_says_what_was_compared(tmp_path: Path) -> None:
    found = compare(identity(tmp_path, n=3), np.zeros((2, 3)), np.ones((2, 3)))
    assert set(found.record) == {"points", "left_out", "boxes", "difference", "tolerance", "dtype"}
    assert found.record["boxes"] == 2 and found.record["points"] > 10 and found.record["difference"] == 0.0


def test_small_networks_agree_at_every_batch_size(tmp_path: Path) -> None:
    network = identity(tmp_path)
    graph = network.graph
    calls: list[int] = []

    class Noting(type(graph)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, store: object, keep: object = None) -> object:
            calls.append(x.shape[0])
            return graph.forward(x, store)  # type: ignore[arg-type]

    noting = Noting(graph.nodes, graph.output, graph.parameters)
    assert compare(replace(network, graph=noting), [0.0], [1.0]).mismatch is None
    assert {1, 2, 7} <= set(calls)
