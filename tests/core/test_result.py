"""Results in forms that people and programs can use."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import verifier
from tests.support.device import ON_DEVICE
from verifier.core.errors import InputError
from verifier.core.result import Covers, Result, Verdict, Witness
from verifier.spec.build import from_box, robustness


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def test_a_result_is_neither_true_nor_false() -> None:
    for verdict in Verdict:
        with pytest.raises(TypeError, match=r"result\.verdict == 'unsat'"):
            bool(Result(verdict))


def test_json() -> None:
    witness = Witness(np.arange(4.0), np.array([1.5]), 0.25, 1, input_shape=(1, 2, 2), output_shape=(1, 1))
    result = Result(
        Verdict.SAT,
        "why",
        witness,
        seconds={"attack": 0.5},
        statistics={"root": {"worst": float("-inf"), "open": np.int64(3), "list": np.array([1, 2])}},
        memory={"ranks": [{"peak": 5}]},
        covers=Covers(real=True),
    )
    found = json.loads(result.to_json())
    assert found == result.to_dict()
    assert found["verdict"] == "sat" and found["covers"]["real"] is True
    assert found["witness"] == {"inputs": [[[0.0, 1.0], [2.0, 3.0]]], "outputs": [[1.5]], "margin": 0.25, "case": 1}
    assert found["statistics"]["root"] == {"worst": None, "open": 3, "list": [1, 2]}
    assert json.loads(Result(Verdict.UNKNOWN).to_json())["witness"] is None


@pytest.mark.parametrize("lead", [(), (1,)])
def test_a_property_keeps_the_shape_of_its_point(lead: tuple[int, ...]) -> None:
    module, x = classifier(), np.random.default_rng(0).random((*lead, 1, 4, 4))
    with torch.no_grad():
        label = int(module(torch.from_numpy(x).float().reshape(1, 1, 4, 4)).argmax())
    small = verifier.verify(module, robustness(x, 1e-4, label, 3), ON_DEVICE, timeout=60)
    assert small.verdict == "unsat"
    large = verifier.verify(module, robustness(x, 50.0, label, 3), ON_DEVICE, timeout=60)
    assert large.verdict == "sat" and large.witness is not None
    assert large.witness.inputs.shape == (16,) and large.witness.x.shape[-3:] == (1, 4, 4)
    with torch.no_grad():
        again = module(torch.from_numpy(large.witness.x).float().reshape(1, 1, 4, 4)).numpy()
    assert np.allclose(again.reshape(-1), large.witness.y.reshape(-1), atol=1e-5)
    assert json.loads(large.to_json())["witness"]["inputs"] == large.witness.x.tolist()
    box = verifier.verify(module, from_box(x - 1e-4, x + 1e-4, [[(np.eye(3)[0], -1e3)]], 3), ON_DEVICE, timeout=60)
    assert box.verdict == "unsat"


def test_a_shape_that_does_not_fit_is_named() -> None:
    flat = np.zeros(16)
    with pytest.raises(InputError, match=r"shape \[1, 16\]: pass input_shape"):
        verifier.verify(classifier(), robustness(flat, 0.1, 0, 3), ON_DEVICE, timeout=60)
    assert verifier.verify(
        classifier(), robustness(flat, 1e-6, 0, 3), ON_DEVICE, timeout=60, input_shape=(1, 1, 4, 4)
    ).verdict in ("sat", "unsat")


def test_the_package_says_what_it_has() -> None:
    assert set(verifier.__all__) <= set(dir(verifier))
    for name in verifier.__all__:
        assert getattr(verifier, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = verifier.nothing_of_the_kind  # type: ignore[attr-defined]
