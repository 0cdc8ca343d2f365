"""Quantised networks: integers between their layers, compared with onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import NodeProto, helper

from tests.frontend.models import check, load, model
from verifier.core.errors import UnsupportedError

RNG = np.random.default_rng(1)
CONSTANTS: dict[str, np.ndarray] = {
    "s": np.array(0.125, np.float32),
    "z": np.array(120, np.uint8),
    "t": np.array(0.25, np.float32),
    "w": RNG.integers(0, 255, (4, 3)).astype(np.uint8),
    "wz": np.array(128, np.uint8),
    "k": RNG.integers(-128, 127, (2, 1, 2, 2)).astype(np.int8),
    "kz": np.array(0, np.int8),
    "kz2": np.array([0, 0], np.int8),
    "ks": np.array([0.01, 0.02], np.float32),
    "r": np.array(8.0, np.float32),
    "bias": np.array([100, -300], np.int32),
    "ones": np.array(3, np.uint8),
}
QUANTISE = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])


def network(nodes: list[NodeProto], shape: tuple[int, ...], folder: Path) -> Any:
    used = {k: v for k, v in CONSTANTS.items() if any(k in n.input for n in nodes)}
    return load(model(nodes, shape, used, 13), folder)


CASES: dict[str, tuple[tuple[int, ...], list[NodeProto]]] = {
    "there and back": ((1, 4), [QUANTISE, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])]),
    "moved between": (
        (1, 1, 3, 4),
        [
            QUANTISE,
            helper.make_node("MaxPool", ["q"], ["p"], kernel_shape=[2, 2]),
            helper.make_node("Transpose", ["p"], ["m"], perm=[0, 1, 3, 2]),
            helper.make_node("DequantizeLinear", ["m", "s", "z"], ["y"]),
        ],
    ),
    "MatMulInteger": (
        (2, 4),
        [
            QUANTISE,
            helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=1),
            helper.make_node("Mul", ["f", "t"], ["y"]),
        ],
    ),
    "ConvInteger": (
        (1, 1, 3, 3),
        [
            QUANTISE,
            helper.make_node("ConvInteger", ["q", "k", "z", "kz"], ["i"], pads=[1, 0, 0, 1]),
            helper.make_node("Cast", ["i"], ["y"], to=1),
        ],
    ),
    "QLinearMatMul": (
        (1, 4),
        [
            QUANTISE,
            helper.make_node("QLinearMatMul", ["q", "s", "z", "w", "t", "wz", "r", "z"], ["i"]),
            helper.make_node("DequantizeLinear", ["i", "r", "z"], ["y"]),
        ],
    ),
    "QLinearConv": (
        (1, 1, 3, 3),
        [
            QUANTISE,
            helper.make_node("QLinearConv", ["q", "s", "z", "k", "ks", "kz2", "t", "z", "bias"], ["i"]),
            helper.make_node("DequantizeLinear", ["i", "t", "z"], ["y"]),
        ],
    ),
}


@pytest.mark.parametrize("key", CASES)
def test_agrees_with_onnxruntime(key: str, tmp_path: Path) -> None:
    shape, nodes = CASES[key]
    check(network(nodes, shape, tmp_path), -12, 12)


def test_arithmetic_that_wraps_around_is_refused(tmp_path: Path) -> None:
    nodes = [
        QUANTISE,
        helper.make_node("Add", ["q", "ones"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["y"]),
    ]
    with pytest.raises(UnsupportedError, match="uint8 numbers that depend on the input"):
        network(nodes, (1, 4), tmp_path)
