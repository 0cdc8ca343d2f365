"""Tiny ONNX models for the tests of the front end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from verifier.frontend.network import Network, load_network, parity
from verifier.graph.graph import Graph
from verifier.parallel.single import Resident


def model(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str | None],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 13,
    output: str = "y",
    elem_type: int = TensorProto.FLOAT,
    out_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model with input ``x`` and one output."""
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info("x", elem_type, list(shape))],
        [helper.make_tensor_value_info(output, out_type, None)],
        [numpy_helper.from_array(a, k) for k, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save(m: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(m.SerializeToString())
    return path


def resident(graph: Graph) -> Resident:
    store = Resident(torch.device("cpu"))
    for handle, tensor in graph.parameters.items():
        store.put(handle, tensor)
    return store


def check(network: Network, low: float = -2.0, high: float = 2.0, seed: int = 0) -> None:
    """The graph agrees with the original on a box."""
    box = np.full(network.n_in, low), np.full(network.n_in, high)
    assert parity(network, resident(network.graph), *box, seed=seed).mismatch is None


def load(m: onnx.ModelProto, folder: Path) -> Network:
    return load_network(save(m, folder))
