"""The Python interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import verifier
from tests.cli.networks import above, absolute
from tests.support.device import ON_DEVICE
from verifier.api import load_any, round_down, verify
from verifier.bounding import Bounds, compute_bounds
from verifier.core.errors import ConfigError, InputError
from verifier.core.problem import Problem
from verifier.core.result import Verdict


def module() -> nn.Module:
    """|x_0| + |x_1|."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    weights = [[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0] * 4, [[1.0] * 4], [0.0]]
    with torch.no_grad():
        for tensor, values in zip(net.parameters(), weights, strict=True):
            tensor.copy_(torch.tensor(values))
    return net


def problem(threshold: float) -> Problem:
    box = np.ones((1, 2), dtype=np.float32)
    return Problem(
        lower=-box,
        upper=box,
        witness_lower=-box,
        witness_upper=box,
        row_y=np.array([[-1.0]]),
        row_x=None,
        row_d=np.array([-threshold]),
        case_box=np.array([0]),
        case_rows=np.array([[0]]),
    )


def test_names_at_the_top() -> None:
    assert verifier.verify is verify
    assert verifier.compute_bounds is compute_bounds
    assert set(verifier.__all__) <= set(dir(verifier)) | set(verifier.__all__)


@pytest.mark.parametrize(("threshold", "verdict"), [(2.1, Verdict.UNSAT), (1.9, Verdict.SAT)])
def test_files_modules_and_networks_agree(threshold: float, verdict: Verdict, tmp_path: Path) -> None:
    path, property = absolute(tmp_path), above(tmp_path, threshold)
    for network in (path, str(path), module(), load_any(module(), (1, 2))):
        for asked in (property, problem(threshold)):
            result = verify(network, asked, {"attack.restarts": 10, **ON_DEVICE}, timeout=60)
            assert result.verdict is verdict, result.reason
            assert (result.witness is not None) == (verdict is Verdict.SAT)
            if result.witness is not None:
                assert np.abs(result.witness.inputs).sum() >= threshold - 1e-6
                assert np.abs(result.witness.inputs).max() <= 1.0


def test_the_module_is_left_as_it_was() -> None:
    net = module().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    verify(net, problem(2.1), ON_DEVICE, timeout=60)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_input_shape_of_a_module() -> None:
    net = nn.Sequential(nn.Flatten(), module())
    assert verify(net, problem(2.1), ON_DEVICE, timeout=60, input_shape=(1, 1, 2, 1)).verdict is Verdict.UNSAT


class Fn(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ODD = {
    "single numbers": (lambda x: x.abs().sum() - torch.stack([x.mean(), x[0, 1]]).amax(), 0.0, 3.0),
    "a step of a single number": (lambda x: (x.sum() > 0.25).float() + (x[0, 0] > 2).float(), 0.0, 1.0),
    "steps only": (lambda x: torch.floor(2 * x + 0.5) @ torch.tensor([[1.0], [2.0]]), -6.0, 6.0),
}


@pytest.mark.parametrize("key", ODD)
def test_single_numbers_and_outputs_without_gradient(key: str) -> None:
    """Over [-1, 1]^2 the output reaches ``high`` and never exceeds it."""
    function, _, high = ODD[key]
    for threshold, verdict in ((high + 0.1, Verdict.UNSAT), (high - 0.1, Verdict.SAT)):
        result = verify(Fn(function), problem(threshold), ON_DEVICE, timeout=60)
        assert result.verdict is verdict, result.reason


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
@pytest.mark.parametrize("key", ODD)
def test_bounds_of_single_numbers_and_steps(key: str, method: str) -> None:
    function, low, high = ODD[key]
    bounds = compute_bounds(Fn(function), -torch.ones(1, 2), torch.ones(1, 2), method, config=ON_DEVICE)
    assert float(bounds.lower) <= low and float(bounds.upper) >= high


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown"])
def test_bounds_contain_samples(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    lower, upper = torch.full((1, 3), -0.5), torch.full((1, 3), 0.7)
    found = compute_bounds(net, lower, upper, method, return_intermediate=True, config=ON_DEVICE)  # type: ignore[arg-type]
    assert isinstance(found, Bounds)
    assert found.lower.shape == found.upper.shape == (1, 2)
    with torch.no_grad():
        y = net.double()(lower.double() + torch.rand(2000, 3, dtype=torch.float64) * (upper - lower).double())
    assert (y >= found.lower).all() and (y <= found.upper).all()
    assert len(found.intermediate) >= 2
    found = compute_bounds(net.float(), lower, upper, method, config=ON_DEVICE)  # type: ignore[arg-type]
    assert found.intermediate == {}


def test_methods_are_ordered() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    box = torch.full((1, 3), -1.0), torch.full((1, 3), 1.0)
    widths = [
        float((b.upper - b.lower).sum())
        for b in (compute_bounds(net, *box, m, config=ON_DEVICE) for m in ("ibp", "crown", "alpha-crown"))
    ]
    assert widths[0] >= widths[1] - 1e-5 >= widths[2] - 2e-5


def test_a_point_has_tight_bounds() -> None:
    point = torch.tensor([[0.25, -0.5]])
    found = compute_bounds(module(), point, point, config=ON_DEVICE)
    assert float(found.lower) == pytest.approx(0.75, abs=1e-5)
    assert float(found.upper) == pytest.approx(0.75, abs=1e-5)
    assert float(found.lower) <= 0.75 <= float(found.upper)


def test_float64_boxes_are_rounded_outward() -> None:
    values = np.array([0.1, -0.1, 1.0, 1e-60, -1e-60, 16777217.0])
    down, up = round_down(values), -round_down(-values)
    assert down.dtype == np.float32
    assert (down.astype(np.float64) <= values).all() and (up.astype(np.float64) >= values).all()
    assert (np.nextafter(down, np.float32(np.inf)).astype(np.float64) >= values).all()


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    good = torch.zeros(1, 2), torch.ones(1, 2)
    for bad, words in [
        (lambda: compute_bounds(module(), good[1], good[0]), "lower exceeds upper at 2 inputs"),
        (lambda: compute_bounds(module(), good[0], torch.ones(2)), "one shape"),
        (lambda: compute_bounds(module(), torch.zeros(2, 3), torch.ones(2, 3)), "does not run"),
        (lambda: compute_bounds(module(), good[0], good[1] * float("inf")), "not finite"),
        (lambda: compute_bounds(module(), *good, "magic"), "alpha-crown"),  # type: ignore[arg-type]
        (lambda: verify(module(), problem(1.0), timeout=0), "positive"),
        (lambda: verify(module(), problem(1.0), timeout=float("nan")), "positive"),
        (lambda: verify(3, problem(1.0)), "torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: verify(absolute(tmp_path), above(tmp_path, 1.0, inputs=3)), "declares 3"),
        (lambda: verify(tmp_path / "none.onnx", problem(1.0)), "none.onnx"),
        (lambda: verify(absolute(tmp_path), tmp_path / "none.vnnlib"), "none.vnnlib"),
    ]:
        with pytest.raises(InputError) as caught:
            bad()
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"bab\.batch_size"):
        verify(module(), problem(1.0), {"bab.batchsize": 3})
