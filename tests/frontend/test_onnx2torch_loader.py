"""Models too large for one protobuf message: shapes are inferred without their data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.networks import save_mlp
from verifier.frontend import normalise, onnx2torch_loader
from verifier.frontend.network import load_network, parity


def test_large_models_take_another_way_to_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_mlp(tmp_path / "net.onnx", (6, 20, 20, 3))
    low, up = np.zeros(6, np.float32), np.ones(6, np.float32)
    usual = load_network(tmp_path / "net.onnx")
    monkeypatch.setattr(onnx2torch_loader, "_LARGE_BYTES", 0)
    monkeypatch.setattr(onnx2torch_loader, "_LIGHT_BYTES", 100)
    monkeypatch.setattr(normalise, "LARGEST_MESSAGE", 0)
    large = load_network(tmp_path / "net.onnx")
    assert [(n.op, n.shape) for n in large.graph.nodes] == [(n.op, n.shape) for n in usual.graph.nodes]
    import torch

    from verifier.parallel.single import SingleBackend

    weights = SingleBackend(large.graph, torch.device("cpu")).weights
    assert parity(large, weights, low, up).mismatch is None
