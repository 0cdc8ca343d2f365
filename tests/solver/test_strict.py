"""Strict comparisons that the network only just does not satisfy, from text to verdict, on every way of a query."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.device import ON_DEVICE
from verifier.api import verify
from verifier.core.result import Verdict

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "root": {"attack.enabled": False, "bab.enabled": False},
    "ibp": {"attack.enabled": False, "bab.enabled": False, "bounds.method": "ibp"},
    "inputs": {"attack.enabled": False, "bab.branching": "input"},
    "neurons": {"attack.enabled": False, "bab.branching": "kfsb"},
}


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Positive(nn.Module):
    """Non-negative combinations of ReLUs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, outputs, bias=False)
        with torch.no_grad():
            self.last.weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


# Inputs in [-3, 3]; network, inputs, outputs, assertions.
TOUCHING: dict[str, tuple[nn.Module, int, int, list[str]]] = {
    "above a clip": (Net(lambda x: x.clamp(0, 1)), 1, 1, ["(> Y_0 1.0)"]),
    "below a clip": (Net(lambda x: x.clamp(-1, 0.5)), 1, 1, ["(< Y_0 -1.0)"]),
    "both sides": (Net(lambda x: x.clamp(0, 1)), 1, 1, ["(or (and (> Y_0 1.0)) (and (< Y_0 0.0)))"]),
    "below a relu": (Net(torch.relu), 1, 1, ["(< Y_0 0.0)"]),
    "above its negation": (Net(lambda x: -torch.relu(x)), 1, 1, ["(> Y_0 0.0)"]),
    "its largest value": (Net(lambda x: -torch.relu(2 * x)), 1, 1, ["(< Y_0 -6.0)"]),
    "leaky": (Net(lambda x: nn.functional.leaky_relu(x, 0.125)), 1, 1, ["(< Y_0 -0.375)"]),
    "cancelling": (Net(lambda x: torch.relu(x) - x), 1, 1, ["(< Y_0 0.0)"]),
    "positive combination": (Positive(1), 4, 1, ["(< Y_0 0.0)"]),
    "sum of clips": (Net(lambda x: x.clamp(0, 1).sum(1, keepdim=True)), 3, 1, ["(> Y_0 3.0)"]),
    "difference": (Net(lambda x: x.clamp(0, 1)[:, :1] - x.clamp(0, 1)[:, 1:]), 2, 1, ["(> Y_0 1.0)"]),
    "sigmoid": (Net(lambda x: torch.sigmoid(40 * x)), 1, 1, ["(> Y_0 1.0)"]),
    "maximum": (Net(lambda x: torch.relu(x).amax(1)), 3, 1, ["(< Y_0 0.0)"]),
    "affine": (Net(lambda x: 2 * x + 3), 1, 1, ["(> Y_0 9.0)"]),
    "against an input": (Net(lambda x: x.clamp(max=1)), 1, 1, ["(> Y_0 X_0)"]),
    "contradiction": (Positive(1), 4, 1, ["(<= Y_0 0.25)", "(> Y_0 0.25)"]),
    "cycle": (Positive(3), 4, 3, ["(>= Y_0 Y_1)", "(>= Y_1 Y_2)", "(> Y_2 Y_0)"]),
}
REACHED: dict[str, tuple[nn.Module, int, int, list[str]]] = {
    "not strict": (Net(lambda x: x.clamp(0, 1)), 1, 1, ["(>= Y_0 1.0)"]),
    "a decimal below its float": (Net(lambda x: x.clamp(0, 0.1)), 1, 1, ["(> Y_0 0.1)"]),
    "a looser bound": (Net(torch.relu), 1, 1, ["(< Y_0 1e-300)"]),
    "cycle of equals": (Net(lambda x: torch.cat([x, x, x], 1)), 1, 3, ["(>= Y_0 Y_1)", "(>= Y_1 Y_2)", "(>= Y_2 Y_0)"]),
}


def text(inputs: int, outputs: int, rows: list[str]) -> str:
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    lines += [f"(assert (>= X_{i} -3.0))\n(assert (<= X_{i} 3.0))" for i in range(inputs)]
    return "\n".join([*lines, *(f"(assert {row})" for row in rows)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TOUCHING)
def test_a_strict_row_that_is_only_reached_is_refuted(tmp_path: Path, name: str, way: str) -> None:
    module, inputs, outputs, rows = TOUCHING[name]
    (tmp_path / "p.vnnlib").write_text(text(inputs, outputs, rows))
    found = verify(module, tmp_path / "p.vnnlib", {**WAYS[way], **ON_DEVICE}, timeout=30)
    assert found.verdict is Verdict.UNSAT, found.reason


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REACHED)
def test_a_row_that_is_reached_is_never_refuted(tmp_path: Path, name: str, way: str) -> None:
    module, inputs, outputs, rows = REACHED[name]
    (tmp_path / "p.vnnlib").write_text(text(inputs, outputs, rows))
    found = verify(module, tmp_path / "p.vnnlib", {**WAYS[way], **ON_DEVICE}, timeout=2)
    assert found.verdict is (Verdict.SAT if way == "default" else found.verdict)
    assert found.verdict is not Verdict.UNSAT
