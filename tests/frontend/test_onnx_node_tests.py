"""ONNX's own node tests: a sample of them; all of them in the thorough run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.onnx_node_tests import Case, Outcome, cases, main, outcome, page, reason


@pytest.mark.parametrize("match", ["layer_normalization_4d", "averagepool_2d", "topk", "attention_4d_causal"])
def test_some_are_right_and_none_is_wrong(match: str, tmp_path: Path) -> None:
    found = [outcome(case, tmp_path) for case in cases(match, 3)]
    kinds = [o.kind for o in found]
    assert "wrong" not in kinds and (kinds.count("right") >= 1 or match == "topk"), found


@pytest.mark.thorough
def test_none_is_wrong(tmp_path: Path) -> None:
    kinds = [outcome(case, tmp_path).kind for case in cases()]
    assert kinds.count("wrong") == 0 and kinds.count("right") >= 1100


def test_other_values_are_wrong(tmp_path: Path) -> None:
    case = next(cases("test_relu"))
    assert outcome(case, tmp_path).kind == "right"
    other = Case(case.name, case.operator, case.model, case.x, np.asarray(case.expected) + 1)
    assert outcome(other, tmp_path).why == "as onnxruntime, not as expected"


def test_page_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--match", "test_relu"]) == 0
    assert "right, 0 wrong" in capsys.readouterr().out
    case = next(cases("test_relu"))
    text = page([Outcome(case, "right"), Outcome(case, "refused", "no rule for Relu (opset 3) at 'y'")])
    assert "| `Relu` | 1 | no rule for Relu |" in text
    assert reason("no rule for A (opset 1) at 'x', shape [1, 2], why") == "no rule for A, why"
