"""Numbers that ONNX nodes take by default: float32 values, as onnxruntime has them."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from torch import nn

from tests.frontend.models import check, load, model, save
from verifier.api import verify
from verifier.bounding import compute_bounds
from verifier.core.errors import UnsupportedError
from verifier.core.result import Verdict
from verifier.frontend import normalise
from verifier.frontend.network import Network, from_module
from verifier.graph.graph import Graph
from verifier.ops.relu import Relu
from verifier.spec.build import from_box

EPSILON = float(np.float32(1e-5))
BY_DEFAULT = [
    # op, opset, constants after x, attribute, its decimal
    ("BatchNormalization", 15, [np.ones(3), np.zeros(3), np.zeros(3), np.zeros(3)], "epsilon", 1e-5),
    ("InstanceNormalization", 13, [np.ones(3), np.zeros(3)], "epsilon", 1e-5),
    ("LayerNormalization", 17, [np.ones(4)], "epsilon", 1e-5),
    ("LeakyRelu", 13, [], "alpha", 0.01),
    ("HardSigmoid", 13, [], "alpha", 0.2),
    ("Selu", 13, [], "alpha", 1.67326319217681884765625),
    ("Celu", 13, [], "alpha", 1.0),
    ("ThresholdedRelu", 13, [], "alpha", 1.0),
    ("LRN", 13, [], "alpha", 1e-4),
]


@pytest.mark.parametrize(("op", "opset", "constants", "attribute", "decimal"), BY_DEFAULT, ids=lambda v: str(v)[:20])
def test_defaults_stand_in_the_nodes_as_float32_numbers(
    op: str, opset: int, constants: list[np.ndarray], attribute: str, decimal: float, tmp_path: Path
) -> None:
    names = [f"c{i}" for i in range(len(constants))]
    stored = {k: v.astype(np.float32) for k, v in zip(names, constants, strict=True)}
    more: dict[str, Any] = {"size": 3} if op == "LRN" else {}
    node = helper.make_node(op, ["x", *names], ["y"], **more)
    file = normalise.load(save(model([node], [1, 3, 2, 4], stored, opset), tmp_path))
    (found,) = (a for a in file.model.graph.node[0].attribute if a.name == attribute)
    assert found.f == float(np.float32(decimal))


def test_given_attributes_stay(tmp_path: Path) -> None:
    node = helper.make_node("LeakyRelu", ["x"], ["y"], alpha=0.3)
    file = normalise.load(save(model([node], [1, 3]), tmp_path))
    assert [a.f for a in file.model.graph.node[0].attribute] == [float(np.float32(0.3))]


def parameters(graph: Graph) -> set[float]:
    return {float(v) for t in graph.parameters.values() for v in t.double().reshape(-1)}


def test_the_slope_of_leaky_relu(tmp_path: Path) -> None:
    graph = load(model([helper.make_node("LeakyRelu", ["x"], ["y"])], [1, 3]), tmp_path).graph
    assert [n.op.negative_slope for n in graph.nodes if isinstance(n.op, Relu)] == [float(np.float32(0.01))]


def test_the_epsilon_of_layer_norm(tmp_path: Path) -> None:
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y"])
    network = load(model([node], [1, 4], {"w": np.ones(4, np.float32)}, 17), tmp_path)
    assert EPSILON in parameters(network.graph) and 1e-5 not in parameters(network.graph)
    check(network)


def normalised(folder: Path, kind: int) -> Network:
    """x / sqrt(0 + epsilon) by BatchNormalization."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    stored = {"one": np.ones(1, dtype), "zero": np.zeros(1, dtype)}
    node = helper.make_node("BatchNormalization", ["x", "one", "zero", "zero", "zero"], ["y"])
    return load(model([node], [1, 1], stored, 15, elem_type=kind, out_type=kind), folder)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.DOUBLE], ids=["float32", "float64"])
def test_the_epsilon_of_batch_norm(kind: int, tmp_path: Path) -> None:
    network = normalised(tmp_path, kind)
    exact = float(Fraction(EPSILON)) ** -0.5
    assert abs(exact - 1e-5**-0.5) > 1e-6
    assert min(abs(v - exact) for v in parameters(network.graph)) < 1e-12
    if kind == TensorProto.DOUBLE:  # in float32 the original cannot show the difference
        assert abs(float(network.evaluate(np.ones((1, 1)))[0, 0]) - exact) < 1e-9
        for row, d in (([1.0], exact - 1e-9), ([-1.0], -exact - 1e-9)):
            result = verify(network, from_box([1.0], [1.0], [[(row, d)]], 1), {"device": "cpu"}, timeout=20)
            assert result.verdict is Verdict.UNSAT, result.reason


def test_softplus_of_onnx_has_no_threshold(tmp_path: Path) -> None:
    """At 21 it exceeds its argument by 7.6e-10; torch's own gives 21."""
    nodes = [helper.make_node("Softplus", ["x"], ["s"]), helper.make_node("Sub", ["s", "c"], ["y"])]
    network = load(model(nodes, [1, 1], {"c": np.array([21], np.float32)}), tmp_path)
    found = compute_bounds(network, np.full((1, 1), 21.0), np.full((1, 1), 21.0))
    exact = math.log1p(math.exp(-21.0))
    assert 0.9 * exact < float(found.lower) <= exact <= float(found.upper) < 1.1 * exact


def test_softplus_of_torch_in_float64() -> None:
    """Its jump at the threshold is larger than what float64 resolves, unless the threshold is high."""
    with pytest.raises(UnsupportedError, match="with threshold = 20"):
        from_module(nn.Sequential(nn.Linear(1, 1), nn.Softplus()).double(), input_shape=(1, 1))
    from_module(nn.Sequential(nn.Linear(1, 1), nn.Softplus(threshold=50)).double(), input_shape=(1, 1))
    from_module(nn.Sequential(nn.Linear(1, 1), nn.Softplus()), input_shape=(1, 1))
