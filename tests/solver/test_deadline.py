"""The library keeps its time limit: every step of reading and of solving looks at the clock often enough."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from verifier.api import verify
from verifier.core import deadline as clock
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded
from verifier.core.result import Verdict
from verifier.frontend.network import from_module, load_network
from verifier.spec.build import from_box

ROOT = Path(__file__).resolve().parent.parent.parent
LATE = 0.5


class Counted(Deadline):
    """Expires at a given question."""

    def __init__(self, questions: float = float("inf")) -> None:
        super().__init__()
        self.left = questions
        self.asked = 0

    def remaining(self) -> float:
        self.asked += 1
        return 1.0 if self.asked <= self.left else -1.0


def model(path: Path, layers: int) -> Path:
    """Layers with a computed constant and a node of an uncommon kind each."""
    rng = np.random.default_rng(0)
    nodes, tensors, x = [], [], "X"
    for i in range(layers):
        tensors += [
            numpy_helper.from_array(rng.normal(size=(6, 6)).astype(np.float32), f"w{i}"),
            numpy_helper.from_array(rng.normal(size=(1, 6)).astype(np.float32), f"b{i}"),
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"]),
            helper.make_node("Neg", [f"b{i}"], [f"n{i}"]),
            helper.make_node("Add", [f"m{i}", f"n{i}"], [f"a{i}"]),
            helper.make_node("Selu", [f"a{i}"], [f"s{i}"]),
        ]
        x = f"s{i}"
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 6]) for n in ("X", x)]
    graph = helper.make_graph(nodes, "layers", value[:1], value[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def test_every_step_of_reading_asks_for_the_time(tmp_path: Path) -> None:
    few, many = Counted(), Counted()
    load_network(model(tmp_path / "few.onnx", 2), few)
    load_network(model(tmp_path / "many.onnx", 8), many)
    each = (many.asked - few.asked) / 6  # tensors, constants, comparisons, calls, translations of one layer
    assert each >= 15


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_reading_ends_at_whatever_step_time_is_over(tmp_path: Path, part: float) -> None:
    path, total = model(tmp_path / "m.onnx", 3), Counted()
    load_network(path, total)
    over = Counted(int(part * total.asked))
    with pytest.raises(DeadlineExceeded):
        load_network(path, over)
    assert over.asked <= over.left + 1


def test_a_module_is_read_under_the_clock() -> None:
    net = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())))
    with pytest.raises(DeadlineExceeded, match="recording"):
        from_module(net, torch.zeros(1, 4), deadline=Deadline(0.0))


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Large enough that no limit here suffices, on any way of a query."""
    torch.manual_seed(0)
    if kind == "dense":
        layers = [layer for n in (64, 512, 512, 512) for layer in (nn.LazyLinear(n), nn.ReLU())]
        net, shape = nn.Sequential(*layers, nn.LazyLinear(4)), (1, 32)
    else:
        first = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
        net, shape = nn.Sequential(*first, nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(4)), (1, 3, 16, 16)
    net(torch.zeros(shape))
    return net, shape


@pytest.mark.sampled(5)
@pytest.mark.parametrize("limit", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("way", ["neurons", "inputs"])
@pytest.mark.parametrize("kind", ["dense", "convolutions"])
def test_the_limit_is_kept(kind: str, way: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds of this process's own time, which do not depend on what else the machine does."""
    net, shape = network(kind)
    n = int(np.prod(shape))
    with torch.no_grad():
        least = min(float(net(torch.rand((1, *shape[1:])) * 2 - 1)[0, 0]) for _ in range(50))
    rows = [[(np.eye(4)[0], least - 0.5)]]
    asked = from_box(-np.ones(n), np.ones(n), rows, 4)
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "attack.enabled": False}
    settings["bab.branching"] = "input" if way == "inputs" else "kfsb"
    with suppress(DeadlineExceeded):  # what is imported on the way
        verify(net, asked, settings, timeout=1.0, input_shape=shape)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=time.process_time))
    began = time.process_time()
    with suppress(DeadlineExceeded):
        found = verify(net, asked, settings, timeout=limit, input_shape=shape)
        assert found.verdict in (Verdict.TIMEOUT, Verdict.SAT, Verdict.UNSAT), found.reason
    assert time.process_time() - began < limit + LATE


def test_transposes_import_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from verifier.ops.reduce import AvgPool\n"
        "a = torch.ones(1, 1, 2, 2)\n"
        "(back,) = AvgPool((2, 2)).transpose(a, (), [(1, 4, 4)])\n"
        "assert back.shape == (1, 1, 4, 4) and bool((back == 0.25).all()) and not back.requires_grad\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
