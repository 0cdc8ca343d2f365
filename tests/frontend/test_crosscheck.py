"""Where converters, torch and onnxruntime disagree: what is mended computes onnxruntime's values, the rest is refused.

In a network such a difference can hide behind a value that is zero at most points; so nodes are tried alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.frontend.models import load, model, resident, save
from verifier.core.errors import InputError, UnsupportedError, UnsupportedOpError
from verifier.frontend import crosscheck, normalise
from verifier.frontend.network import Network, load_network


def node(op: str, inputs: list[str], outputs: list[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def same(network: Network) -> None:
    """The graph gives onnxruntime's values at random points, whole numbers and zeros."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal(size=(20, network.n_in)), rng.integers(-2, 3, (20, network.n_in)), [[0.0] * network.n_in]]
    )
    x = x.astype(network.input_dtype)
    right = network.evaluate(x)
    given = torch.from_numpy(x).reshape(-1, *network.input_shape)
    found = network.graph.forward(given, resident(network.graph))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.reshape(len(x), -1).numpy(), right, rtol=1e-5, atol=1e-5)


SAME = {
    "node named like the input": ([node("Relu", ["x"], ["h"], name="x"), node("Add", ["x", "h"], ["y"])], (1, 3), {}),
    "nodes named like attributes": (
        [node("Relu", ["x"], ["h"], name="forward"), node("Neg", ["h"], ["y"], name="_modules")],
        (1, 3),
        {},
    ),
    "output left out at the end": (
        [node("MaxPool", ["x"], ["p", ""], kernel_shape=[2]), node("Neg", ["p"], ["y"])],
        (1, 2, 4),
        {},
    ),
    "output left out at the start": (
        [node("RNN", ["x", "w", "r"], ["", "y"], hidden_size=2)],
        (3, 1, 2),
        {"w": np.full((1, 2, 2), 0.3, np.float32), "r": np.full((1, 2, 2), -0.4, np.float32)},
    ),
    "slope broadcast from the right": ([node("PRelu", ["x", "s"], ["y"])], (1, 3, 3), {"s": floats(0.1, 2.0, -1.0)}),
    "slope per channel": ([node("PRelu", ["x", "s"], ["y"])], (1, 3, 2), {"s": floats(0.1, 2.0, -1.0).reshape(3, 1)}),
    "negative axes, unsqueeze": (
        [node("Unsqueeze", ["x", "a"], ["u"]), node("Mul", ["u", "c"], ["y"])],
        (1, 3),
        {"a": ints(-1, -3), "c": np.arange(6, dtype=np.float32).reshape(2, 1, 3, 1)},
    ),
    "negative axes, squeeze": (
        [node("Squeeze", ["x", "a"], ["u"]), node("Mul", ["u", "c"], ["y"])],
        (1, 3, 1, 2),
        {"a": ints(-2, -4), "c": np.arange(6, dtype=np.float32).reshape(3, 2)},
    ),
    "selu nearly as usual": ([node("Selu", ["x"], ["y"], alpha=1.67327, gamma=1.05071)], (1, 3), {}),
    "truth joined to constants": (
        [
            node("Greater", ["x", "z"], ["t"]),
            node("Concat", ["t", "c"], ["b"], axis=1),
            node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
        ],
        (1, 2),
        {"z": floats(0.3), "c": np.array([[True, False, True]])},
    ),
    "cumulative sum of constants": (
        [node("CumSum", ["c", "k"], ["s"]), node("Mul", ["x", "s"], ["y"])],
        (1, 3),
        {"c": floats(1, 2, 4), "k": np.array(0)},
    ),
    "positions of constants": (
        [
            node("NonZero", ["c"], ["p"]),
            node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["x", "f"], ["y"]),
        ],
        (1, 3),
        {"c": floats(1, 0, 3, 4)},
    ),
    "float32 constants": (
        [node("Mul", ["a", "b"], ["p"]), node("Floor", ["p"], ["f"]), node("Mul", ["x", "f"], ["y"])],
        (1, 2),
        {"a": floats(0.7), "b": floats(10)},
    ),
    "integers that wrap around": (
        [
            node("Mul", ["a", "a"], ["p"]),
            node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["x", "f"], ["y"]),
        ],
        (1, 2),
        {"a": np.array([70_000], dtype=np.int32)},
    ),
    "zeros that repeat a value": (
        [node("Add", ["z", "x"], ["a"]), node("Sub", ["z", "x"], ["b"]), node("Mul", ["a", "b"], ["y"])],
        (1, 2),
        {"z": np.zeros((3, 1), np.float32)},
    ),
    "product of constants": (
        [node("Gemm", ["a", "b", "x"], ["y"], beta=10.0, alpha=0.5)],
        (1, 2),
        {"a": np.ones((1, 3), np.float32), "b": np.ones((3, 2), np.float32)},
    ),
    "constants from a shape": (
        [
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["f", "c"], ["p"]),
            node("Floor", ["p"], ["q"]),
            node("Mul", ["x", "q"], ["y"]),
        ],
        (10, 2),
        {"c": floats(0.7)},
    ),
    "largest of equal constants": (
        [
            node("TopK", ["c", "k"], ["v", "i"]),
            node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["x", "f"], ["y"]),
        ],
        (1, 3),
        {"c": np.ones(40, np.float32), "k": ints(3)},
    ),
}


@pytest.mark.parametrize("key", SAME)
def test_computes_what_onnxruntime_computes(key: str, tmp_path: Path) -> None:
    nodes, shape, constants = SAME[key]
    same(load(model(nodes, shape, constants), tmp_path))


REFUSED = {
    "reduction of nothing": ([node("ReduceL1", ["x"], ["y"], noop_with_empty_axes=1)], (1, 3), {}, 18),
    "padding from the other side, cropped": (
        [node("Pad", ["x", "p"], ["y"], mode="wrap")],
        (1, 1, 4),
        {"p": ints(0, 0, 2, 0, 0, -1)},
        19,
    ),
    "same padding, dilated": (
        [node("MaxPool", ["x"], ["y"], kernel_shape=[3], dilations=[2], auto_pad="SAME_UPPER")],
        (1, 1, 7),
        {},
        13,
    ),
    "same padding, strides beyond the kernel": (
        [node("AveragePool", ["x"], ["y"], kernel_shape=[2], strides=[4], auto_pad="SAME_UPPER")],
        (1, 1, 8),
        {},
        19,
    ),
    "size of a transposed convolution": (
        [
            node("ConvTranspose", ["x", "w"], ["c"], strides=[2], output_shape=[10]),
            node("ReduceSum", ["c"], ["y"]),
        ],
        (1, 1, 5),
        {"w": floats(1, 2, 3).reshape(1, 1, 3)},
        13,
    ),
    "mask of a dropout": (
        [
            node("Dropout", ["x"], ["d", "m"]),
            node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["d", "f"], ["y"]),
        ],
        (1, 3),
        {},
        10,
    ),
}


@pytest.mark.parametrize("key", REFUSED)
def test_refuses_what_it_would_compute_otherwise(key: str, tmp_path: Path) -> None:
    nodes, shape, constants, opset = REFUSED[key]
    with pytest.raises(UnsupportedOpError, match="otherwise than by onnxruntime"):
        load(model(nodes, shape, constants, opset), tmp_path)


def test_a_difference_hidden_by_the_network_is_found(tmp_path: Path) -> None:
    """Behind a product with zero no point of any box would show it."""
    nodes = [
        node("Mul", ["x", "zero"], ["h"]),
        node("MaxPool", ["h"], ["y"], kernel_shape=[3], dilations=[2], auto_pad="SAME_UPPER"),
    ]
    with pytest.raises(UnsupportedOpError, match=r"MaxPool .*'y'"):
        load(model(nodes, (1, 1, 7), {"zero": floats(0)}), tmp_path)


def test_a_shape_that_depends_on_values_is_no_constant(tmp_path: Path) -> None:
    nodes = [
        node("NonZero", ["x"], ["p"]),
        node("Shape", ["p"], ["s"]),
        node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        node("ReduceSum", ["f"], ["n"]),
        node("Mul", ["x", "n"], ["y"]),
    ]
    with pytest.raises(UnsupportedError, match="depends"):
        load(model(nodes, (1, 3)), tmp_path)


def test_what_nobody_reads_need_not_agree(tmp_path: Path) -> None:
    unread = node("MaxPool", ["x"], ["p"], kernel_shape=[3], dilations=[2], auto_pad="SAME_UPPER")
    same(load(model([unread, node("Sign", ["x"], ["y"])], (1, 1, 7)), tmp_path))


def test_two_versions_of_the_standard_operators_are_refused(tmp_path: Path) -> None:
    m = model([node("Softmax", ["x"], ["y"])], (1, 2, 3), opset=11)
    m.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    with pytest.raises(InputError, match=r"two versions .*\[11, 13\]"):
        load(m, tmp_path)


def test_names_that_the_converter_uses_are_refused(tmp_path: Path) -> None:
    m = model([node("Relu", ["x"], ["y"])], (1, 3))
    m.graph.input[0].name = m.graph.node[0].input[0] = "onnx_initializer_0"
    with pytest.raises(UnsupportedError, match="cannot be named"):
        load(m, tmp_path)


def test_the_reference_stays_the_file(tmp_path: Path) -> None:
    """What is folded for the converter is there again when onnxruntime runs the model."""
    nodes = [node("Add", ["a", "a"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    network = load_network(save(model(nodes, (1, 2), {"a": floats(1.5)}), tmp_path))
    kinds = [n.op_type for n in network.run.file.model.graph.node]  # type: ignore[attr-defined]
    assert kinds == ["Add", "Mul"] and len(network.run.file.model.graph.initializer) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("op", "alpha"), [("LeakyRelu", 1e31), ("Elu", 0.0)])
def test_slopes_without_meaning_are_refused_in_one_sentence(op: str, alpha: float, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match=r"slope|division") as caught:
        load(model([node(op, ["x"], ["y"], alpha=alpha)], (1, 3)), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("offset", "agrees"), [(0.0, True), (0.01, False)])
def test_large_values_elsewhere_hide_no_difference(offset: float, agrees: bool, tmp_path: Path) -> None:
    """A node that grows fast is compared at small values as well, where another graph is off by a hundredth."""
    right = normalise.load(save(model([node("Exp", ["x"], ["y"])], (1, 40)), tmp_path, "right.onnx"))
    nodes = [node("Exp", ["x"], ["e"]), node("Add", ["e", "o"], ["y"])]
    ours = load(model(nodes, (1, 40), {"o": floats(offset)}), tmp_path)
    assert crosscheck._agree(right, ours.graph) is agrees
