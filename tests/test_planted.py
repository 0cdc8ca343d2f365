"""Planted counterexamples: what the attacks of the script look at, what it writes, and how it counts answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scripts import planted
from scripts.planted import Planted, Shape
from verifier.api import load_any, load_problem
from verifier.spec.replay import replay

TINY = Shape("mlp4", (1, 2, 2), 0.2)


def peak(radius: float) -> Planted:
    """A network whose second label is ahead where the sum of distances to a point of the box is below a radius."""
    centre = torch.tensor([[[[0.1, 0.0], [-0.1, 0.05]]]])
    point = centre + 0.19
    distances, cone = nn.Linear(4, 8), nn.Linear(8, 2)
    with torch.no_grad():
        distances.weight.copy_(torch.cat([torch.eye(4), -torch.eye(4)]))
        distances.bias.copy_(torch.cat([-point.flatten(), point.flatten()]))
        cone.weight.copy_(torch.stack([torch.ones(8), torch.zeros(8)]))
        cone.bias.copy_(torch.tensor([-radius, 0.0]))
    return Planted(nn.Sequential(nn.Flatten(), distances, nn.ReLU(), cone), centre, 0.2, point)


def test_an_attack_stays_in_the_box_and_climbs() -> None:
    found = peak(0.01)
    x = planted.descend(found, 20, 30, torch.Generator().manual_seed(0), 1.0)
    assert (x >= found.centre - found.epsilon).all() and (x <= found.centre + found.epsilon).all()
    assert found.margin(x).max() > found.margin(found.centre)


def test_what_an_attack_finds_does_not_escape() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not planted.escapes(peak(0.3), generator)
    assert planted.escapes(peak(-0.01), generator)  # there is none


def test_a_network_has_to_be_wrong_at_the_point_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    assert not planted._hidden(peak(0.3), generator)  # found
    assert not planted._hidden(peak(-0.01), generator)  # not wrong
    monkeypatch.setattr(planted, "escapes", lambda *asked: True)
    assert planted._hidden(peak(0.3), generator)
    assert not planted._hidden(peak(2.0), generator)  # the centre is wrong, too


@pytest.mark.parametrize("name", ["mlp4", "mlp5", "cnn1", "cnn2"])
def test_a_few_steps_hide_nothing(name: str) -> None:
    assert planted.plant(0, Shape(name, (1, 5, 5), 0.2, steps=3)) is None


@pytest.mark.parametrize("name", ["cnn1", "cnn2"])
def test_the_peak_of_a_cnn_is_narrow(name: str) -> None:
    """Its part of the difference of the labels is six at the point, and none three radii from it."""
    torch.manual_seed(0)
    shape = Shape(name, (1, 5, 5), 0.2)
    network, side = shape.network(), torch.ones(1, 1, 5, 5)
    point = 0.2 * side
    planted._raise_peak(network, point, side, 0.2)
    with torch.no_grad():
        network[-1].bias.zero_()
        network[-1].weight[:, 1:] = 0.0  # what else there is
        found = Planted(network, 0 * point, 0.2, point)
        inner = 25 if name == "cnn1" else 9
        values = [found.margin(point - side * 0.2 * d / inner).item() for d in (0.0, 1.5, 3.0, 4.0)]
    assert values == pytest.approx([6.0, 3.0, 0.0, 0.0], abs=1e-3)


def test_what_is_written_holds_the_planted_counterexample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[int] = []

    def plant(seed: int, shape: Shape) -> Planted | None:
        attempts.append(seed)
        return peak(0.3) if len(attempts) % 2 == 0 else None

    monkeypatch.setattr(planted, "plant", plant)
    monkeypatch.setattr(planted, "SHAPES", (TINY,))
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        lines = [planted._make_one(i, seed=7, folder=tmp_path) for i in range(2)]
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
    assert attempts == [7, 8, 1007, 1008] and all("attempt 2" in line for line in lines)
    for name in ("00_mlp4_1x2", "01_mlp4_1x2"):
        network = load_any(str(tmp_path / f"{name}.onnx"), (1,))
        question = load_problem(str(tmp_path / f"{name}.vnnlib")).typed(network.input_dtype)
        point = np.load(tmp_path / f"{name}.npy").reshape(-1)
        assert replay(network, question, point, exact=True) is not None
        assert replay(network, question, question.lower[0], exact=True) is None


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [(("sat", "sat", "timeout"), 0), (("sat", "timeout", "unknown"), 1), (("sat", "sat", "unsat"), 1)],
)
def test_answers_are_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verdicts: tuple[str, ...],
    code: int,
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.onnx").touch()
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=f"{verdicts[len(commands) - 1]}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["planted.py", "verify", str(tmp_path), "--timeout", "5", "--least", "2", "--set", "seed=3"]
    )
    assert planted.main() == code
    assert all(command[-4:] == ["--timeout", "5", "--set", "seed=3"] for command in commands)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"{verdicts.count('sat')} of 3 found, {verdicts.count('unsat')} answered unsat"
