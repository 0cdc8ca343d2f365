"""The helpers are instruments: they are checked before anything is measured with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.support.exact import affine_matrix, exact_min
from tests.support.networks import KINDS, from_sequential, random_box, random_network, random_points
from tests.support.onnx_writer import write_onnx
from tests.support.planted import planted, write_comparison, write_vnnlib


def absolute_value_network() -> nn.Sequential:
    """y = |x| - 1 from two ReLUs."""
    first, second = nn.Linear(1, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        first.bias.zero_()
        second.weight.copy_(torch.tensor([[1.0, 1.0]]))
        second.bias.fill_(-1.0)
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize(
    ("low", "high", "row", "least", "at"),
    [(-2.0, 3.0, 1.0, -1.0, 0.0), (-2.0, 3.0, -1.0, -2.0, 3.0), (0.5, 0.75, 1.0, -0.5, 0.5), (-4, -4, 1.0, 3.0, -4)],
)
def test_minimum_known_by_hand(low: float, high: float, row: float, least: float, at: float) -> None:
    network = from_sequential(absolute_value_network(), (1,))
    found = exact_min(network, torch.tensor([low]), torch.tensor([high]), np.array([row]))
    assert found.bound == pytest.approx(least, abs=1e-6)
    assert found.value == pytest.approx(least, abs=1e-6)
    assert found.point == pytest.approx([at], abs=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_sample_is_below_the_exact_minimum(kind: str, seed: int) -> None:
    network = random_network(kind, seed, torch.float64)
    lower, upper = random_box(network, seed + 10, radius=0.4)
    row = np.random.default_rng(seed).normal(size=2)
    least = exact_min(network, lower, upper, row)
    values = network(random_points(lower, upper, 2000, seed).double()).detach().numpy() @ row
    assert values.min() >= least.bound - 1e-6 * (1 + abs(least.bound))
    assert least.value == pytest.approx(least.bound, abs=1e-4)
    assert np.all(lower.double().numpy() <= least.point) and np.all(least.point <= upper.double().numpy())


def test_exact_minimum_beats_interval_arithmetic() -> None:
    """The answer is the minimum, not merely a bound: some network has unstable neurons that interact."""
    gaps = []
    for seed in range(5):
        network = random_network("mlp", seed, torch.float64)
        lower, upper = random_box(network, seed)
        row = np.array([1.0, -1.0])
        low, high = lower.double().numpy(), upper.double().numpy()
        shapes = network.shapes
        for i, step in enumerate(network.steps):
            if step.kind == "relu":
                low, high = np.maximum(low, 0), np.maximum(high, 0)
                continue
            weight, bias = affine_matrix(network.parts[step.module], shapes[i])
            centre, radius = (low + high) / 2, (high - low) / 2
            low, high = weight @ centre + bias - abs(weight) @ radius, weight @ centre + bias + abs(weight) @ radius
        gaps.append(exact_min(network, lower, upper, row).bound - (low[0] - high[1]))
    assert min(gaps) >= -1e-6
    assert max(gaps) > 0.05


def test_minimum_of_every_relu_pattern() -> None:
    """Against brute force: one LP vertex per corner grid is enough for a piecewise linear function of one input."""
    network = random_network("deep-mlp", 3, torch.float64)
    lower, upper = torch.tensor([-1.0, 0.25]), torch.tensor([1.5, 0.25])
    row = np.array([0.7, -1.3])
    grid = torch.linspace(-1.0, 1.5, 200_001, dtype=torch.float64)
    points = torch.stack([grid, torch.full_like(grid, 0.25)], 1)
    brute = float((network(points).detach().numpy() @ row).min())
    least = exact_min(network, lower, upper, row)
    assert least.bound <= brute + 1e-6
    assert brute - least.bound < 1e-3


def test_timeout_is_an_error() -> None:
    network = random_network("residual", 0)
    lower, upper = random_box(network, 0, radius=4.0)
    with pytest.raises(TimeoutError):
        exact_min(network, lower, upper, np.array([1.0, -1.0]), seconds=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_the_same(kind: str, tmp_path: Path) -> None:
    network = random_network(kind, 5)
    path = tmp_path / "network.onnx"
    write_onnx(network, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    lower, upper = random_box(network, 5)
    for x in random_points(lower, upper, 5, 5):
        (got,) = session.run(None, {"X": x[None].numpy()})
        assert got == pytest.approx(network(x[None]).detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "residual", "shared"])
def test_planted_counterexample_is_one(kind: str) -> None:
    case = planted(kind, 7, sat=True)
    value = float(case.network(torch.from_numpy(case.point).float()[None]).detach().double().numpy()[0] @ case.row)
    assert value <= case.threshold
    beside = planted(kind, 7, sat=False)
    values = beside.network(random_points(beside.lower, beside.upper, 2000, 0)).detach().double().numpy() @ beside.row
    assert values.min() > beside.threshold
    assert beside.threshold < case.threshold


def test_seed_decides_everything() -> None:
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    a, b = random_network("residual", 4), random_network("residual", 4)
    assert torch.equal(torch.rand(1), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(random_network("residual", 5).parameters()))


def test_points_are_inside() -> None:
    network = random_network("conv", 0)
    lower, upper = random_box(network, 3)
    points = random_points(lower, upper, 100, 0)
    assert bool(((points >= lower) & (points <= upper)).all())


def test_property_files_read_back(tmp_path: Path) -> None:
    lower, upper = torch.tensor([0.1, -1e-30]), torch.tensor([0.30000001192092896, 1e20])
    write_vnnlib(tmp_path / "a.vnnlib", lower, upper, np.array([[1.0, -2.5]]), np.array([0.125]))
    text = (tmp_path / "a.vnnlib").read_text()
    assert "(assert (<= (+ (* 1.0 Y_0) (* -2.5 Y_1)) 0.125))" in text
    asserted = [line for line in text.splitlines() if "X_" in line and "assert" in line]
    bounds = [np.float32(line.split()[-1].rstrip(")")) for line in asserted]
    assert bounds == [lower[0].item(), upper[0].item(), lower[1].item(), upper[1].item()]
    write_comparison(tmp_path / "b.vnnlib", lower, upper, 3, label=2, other=0)
    assert "(assert (<= Y_2 Y_0))" in (tmp_path / "b.vnnlib").read_text()
