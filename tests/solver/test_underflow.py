"""Networks that reach their unsafe sets only through numbers which vanish in float32 are never called safe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import verifier.api
from tests.support.device import ON_DEVICE
from verifier import verify
from verifier.core import numerics
from verifier.core.result import Verdict

# A rank whose proofs are all in float64.
WIDE_RANK = (
    "import sys, verifier.core.numerics as n; n._FLOAT32_PROOFS = False; "
    "from verifier.cli.main import main; sys.argv[1:1] = ['rank']; main()"
)


def bump(n: int, outputs: int, seed: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """g = relu(1 - 100 |x - p|_1), which is one at a point p and zero nearly everywhere else."""
    p = np.random.default_rng(seed).uniform(-0.9, 0.9, n).astype(np.float32)
    tensors = {
        "W1": np.concatenate([np.eye(n), -np.eye(n)], 1),
        "b1": np.concatenate([-p, p]),
        "W2": np.full((2 * n, outputs), -100.0),
        "b2": np.ones(outputs),
    }
    nodes = [
        helper.make_node("Gemm", ["X", "W1", "b1"], ["z1"]),
        helper.make_node("Relu", ["z1"], ["a1"]),
        helper.make_node("Gemm", ["a1", "W2", "b2"], ["z2"]),
        helper.make_node("Relu", ["z2"], ["g"]),
    ]
    return nodes, tensors


def folded(n: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Y = -2 g, by way of 1e30 g: the two factors after that make one of 1e-50 when they are folded."""
    nodes, tensors = bump(n, 2, n)
    tensors |= {"u": 1e30 * np.eye(2), "v": 1e-30 * np.eye(2), "s": np.full(2, 1e-20)}
    tensors["w"] = np.array([[-1e20, 0.0]] * 2)
    nodes += [
        helper.make_node("Gemm", ["g", "u"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("Gemm", ["h2", "v"], ["h3"]),
        helper.make_node("Mul", ["h3", "s"], ["h4"]),
        helper.make_node("Relu", ["h4"], ["h5"]),
        helper.make_node("Gemm", ["h5", "w"], ["Y"]),
    ]
    return nodes, tensors


def chained(n: int) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Y = 1 - 8 g, by way of 1e30 g and two products with 1e-25, so that a coefficient on 1e30 g is 1e-50 or so."""
    nodes, tensors = bump(n, 2, n)
    tensors |= {"a": np.array([[1e30, 1e30], [0, 0]]), "b": np.full((2, 2), 1e-25), "s": np.full((2, 2), 1e-25)}
    tensors |= {"bb": np.full(2, -5e-21), "c": np.full((2, 1), -1e20)}
    nodes += [
        helper.make_node("Gemm", ["g", "a"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("Gemm", ["h2", "b"], ["h3"]),
        helper.make_node("Relu", ["h3"], ["h4"]),
        helper.make_node("Gemm", ["h4", "s", "bb"], ["h5"]),
        helper.make_node("Relu", ["h5"], ["h6"]),
        helper.make_node("Gemm", ["h6", "c"], ["Y"]),
    ]
    return nodes, tensors


def query(folder: Path, kind: str, n: int) -> tuple[Path, Path]:
    nodes, tensors = folded(n) if kind == "folded" else chained(n)
    outputs = tensors["w" if kind == "folded" else "c"].shape[1]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, n])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(np.asarray(t, dtype=np.float32), name) for name, t in tensors.items()],
    )
    path = folder / f"{kind}{n}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    lines = [f"(declare-const X_{i} Real)" for i in range(n)] + [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [f"(assert (>= X_{i} -1))\n(assert (<= X_{i} 1))" for i in range(n)] + ["(assert (<= Y_0 -0.5))"]
    text = folder / f"{kind}{n}.vnnlib"
    text.write_text("\n".join(lines) + "\n")
    return path, text


def answer(network: Path, property: Path, attack: bool, ranks: int) -> Verdict:
    settings = {"attack.enabled": attack, "parallel.ranks": ranks, "bab.max_domains": 3000, **ON_DEVICE}
    return verify(network, property, settings, timeout=40 if ranks > 1 else 12).verdict


@pytest.mark.sampled(5)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("wide", [False, True], ids=["default", "float64"])
@pytest.mark.parametrize("attack", [True, False], ids=["attack", "proof"])
@pytest.mark.parametrize(("kind", "n"), [("folded", 5), ("chained", 30), ("chained", 5)])
def test_never_called_safe(
    kind: str, n: int, attack: bool, wide: bool, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(numerics, "_FLOAT32_PROOFS", False)
        monkeypatch.setattr(verifier.api, "RANK_COMMAND", ("-c", WIDE_RANK))
    assert answer(*query(tmp_path, kind, n), attack, ranks) != Verdict.UNSAT


@pytest.mark.parametrize("kind", ["folded", "chained"])
def test_what_the_process_asks_of_torch_makes_no_difference(kind: str, tmp_path: Path) -> None:
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu"):
            assert answer(*query(tmp_path, kind, 5), False, 1) != Verdict.UNSAT
        assert torch.get_float32_matmul_precision() == "medium" and torch.get_default_dtype() == torch.float64
        smallest = torch.ones(1, dtype=torch.int32).view(torch.float32)
        assert int((smallest + smallest).view(torch.int32)) == 0
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
