"""Bounds of one box and of many, from Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import verifier
from tests.support.device import DEVICE, ON_DEVICE
from verifier.api import load_any
from verifier.bounding import Bounds, UncertifiedBounds, compute_bounds
from verifier.bounds import batches
from verifier.core.errors import DeadlineExceeded, InputError

METHODS = ("ibp", "crown", "alpha-crown")


class Residual(nn.Module):
    """A sum and two kinds of nonlinearities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(h + torch.tanh(self.second(h)))


def dense(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def image(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def wide(seed: int = 0) -> nn.Module:
    """Products of matrices whose kernels differ with the number of rows."""
    torch.manual_seed(seed)
    layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)]
    return nn.Sequential(*layers)


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual()


NETWORKS = {"dense": (dense, (6,)), "image": (image, (1, 7, 7)), "residual": (residual, (6,))}


def boxes(shape: tuple[int, ...], count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Boxes of many widths, so that what is undecided differs between them."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, *shape, generator=random)
    radius = 0.5 * torch.rand(count, *[1] * len(shape), generator=random) ** 2
    return centre - radius, centre + radius


def close(a: Tensor, b: Tensor) -> bool:
    scale = torch.maximum(a.abs(), b.abs()).flatten(1).amax(1).reshape(-1, *[1] * (a.dim() - 1))
    return bool(((a - b).abs() <= 1e-6 * scale).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_gives_what_its_boxes_give_alone(name: str, method: Any) -> None:
    make, shape = NETWORKS[name]
    network = load_any(make(), (1, *shape))
    low, up = boxes(shape, 9 if method != "alpha-crown" else 3)
    found = compute_bounds(network, low, up, method, True, ON_DEVICE)
    assert found.lower.shape == (len(low), 3)
    for i in range(len(low)):
        alone = compute_bounds(network, low[i : i + 1], up[i : i + 1], method, True, ON_DEVICE)
        assert close(found.lower[i : i + 1], alone.lower) and close(found.upper[i : i + 1], alone.upper)
        for key, interval in alone.intermediate.items():
            here = found.intermediate[key]
            assert here.lower.shape == (len(low), *interval.lower.shape[1:])
            # What float32 decides for one box, float64 decides for a batch: all that is undecided agrees.
            open_ = (interval.lower < 0) & (interval.upper > 0)
            for one, all_ in zip(interval, here, strict=True):
                assert torch.allclose(all_[i : i + 1][open_], one[open_], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_decided_on_a_box_stays_as_it_is(name: str) -> None:
    """Rows that another box needs do not count there: in plain arithmetic all hidden bounds agree."""
    make, shape = NETWORKS[name]
    network = load_any(make(), (1, *shape))
    low, up = boxes(shape, 9)
    found = compute_bounds(network, low, up, "crown", True, ON_DEVICE, certified=False)
    for i in range(len(low)):
        alone = compute_bounds(network, low[i : i + 1], up[i : i + 1], "crown", True, ON_DEVICE, certified=False)
        for key, interval in alone.intermediate.items():
            for one, all_ in zip(interval, found.intermediate[key], strict=True):
                assert torch.allclose(all_[i : i + 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("name", [*NETWORKS, "wide"])
def test_bits_do_not_depend_on_the_other_boxes(name: str, certified: bool) -> None:
    make, shape = {**NETWORKS, "wide": (wide, (784,))}[name]
    network = load_any(make(), (1, *shape))
    low, up = boxes(shape, 8)
    other_low, other_up = boxes(shape, 8, seed=2)
    if name == "wide":  # some boxes leave nearly nothing undecided, others nearly everything
        low, up = (low + up) / 2 - 1e-3, (low + up) / 2 + 1e-3
    first = compute_bounds(network, low, up, config=ON_DEVICE, certified=certified)
    low[4:], up[4:] = other_low[4:], other_up[4:]
    second = compute_bounds(network, low, up, config=ON_DEVICE, certified=certified)
    assert torch.equal(first.lower[:4], second.lower[:4]) and torch.equal(first.upper[:4], second.upper[:4])


def test_kernels_get_the_same_shapes_whatever_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, set[int]] = {}
    lower_bounds = batches.lower_bounds

    def noting(engine: Any, state: Any, start: Any, planes: Any) -> Any:
        ((index, form),) = start.items()
        sizes.setdefault(index, set()).add(form.index.shape[0])
        return lower_bounds(engine, state, start, planes)

    monkeypatch.setattr(batches, "lower_bounds", noting)
    network = load_any(wide(), (1, 784))
    low, up = boxes((784,), 4)
    for share in (0.001, 0.01, 0.2):
        middle, radius = (low + up) / 2, share * (up - low)
        compute_bounds(network, middle - radius, middle + radius, config=ON_DEVICE)
    assert sizes and all(len(found) == 1 for found in sizes.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_box_and_every_linear_function_holds_at_samples(name: str, method: Any) -> None:
    make, shape = NETWORKS[name]
    module, count = make(), 4
    low, up = boxes(shape, count)
    rows = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.25, -2.0]])
    found = compute_bounds(module, low, up, method, config=ON_DEVICE, C=rows, return_linear=True)
    assert isinstance(found, Bounds) and found.linear is not None
    assert found.lower.shape == (count, 2) and found.linear.lower_A.shape == (count, 2, *shape)
    exact = module.double()
    for i in range(count):
        share = torch.rand(500, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).round(
            decimals=1
        )
        x = torch.lerp(low[i].double(), up[i].double(), share)
        with torch.no_grad():
            y = exact(x) @ rows.double().T
        slack = 1e-12  # of the samples themselves, evaluated in float64
        assert (y >= found.lower[i].double() - slack).all() and (y <= found.upper[i].double() + slack).all()
        below = torch.einsum("s...,n...->ns", found.linear.lower_A[i], x) + found.linear.lower_bias[i]
        above = torch.einsum("s...,n...->ns", found.linear.upper_A[i], x) + found.linear.upper_bias[i]
        assert (y >= below - slack).all() and (y <= above + slack).all()
        assert found.linear.lower_A.dtype == torch.float64


def test_linear_functions_are_as_tight_as_the_bounds() -> None:
    """On a network without a nonlinearity they are the network, moved by what rounding costs."""
    module = nn.Linear(6, 3)
    low, up = boxes((6,), 2)
    found = compute_bounds(module, low, up, config=ON_DEVICE, return_linear=True)
    assert found.linear is not None
    assert torch.allclose(found.linear.lower_A, module.weight.double().detach().expand(2, 3, 6))
    assert torch.allclose(found.linear.lower_bias, module.bias.double().detach().expand(2, 3), atol=1e-6)
    assert (found.linear.lower_bias < found.linear.upper_bias).all()


def test_rows_are_tighter_than_differences_of_bounds() -> None:
    module = dense()
    low, up = boxes((6,), 4)
    plain = compute_bounds(module, low, up, config=ON_DEVICE)
    rows = np.array([[[1.0, -1.0, 0.0]]] * 3 + [[[0.0, 1.0, -1.0]]])
    found = compute_bounds(module, low, up, config=ON_DEVICE, C=rows)
    assert found.lower.shape == (4, 1)
    apart = plain.lower[:3, 0] - plain.upper[:3, 1]
    assert (found.lower[:3, 0] >= apart - 1e-5).all() and (found.lower[:3, 0] > apart + 1e-3).any()
    last = compute_bounds(module, low[3:], up[3:], config=ON_DEVICE, C=rows[3])
    assert torch.allclose(found.lower[3:], last.lower, rtol=1e-6, atol=0)


def test_plain_bounds_are_of_another_type() -> None:
    low, up = boxes((6,), 3)
    for given in ({"certified": False}, {"config": {**ON_DEVICE, "numerics.certify": False}}):
        found = compute_bounds(dense(), low, up, **{"config": ON_DEVICE, **given})  # type: ignore[arg-type]
        assert isinstance(found, UncertifiedBounds) and not isinstance(found, Bounds)
    sure = compute_bounds(dense(), low, up, config=ON_DEVICE)
    assert close(found.lower, sure.lower) or torch.allclose(found.lower, sure.lower, rtol=1e-4, atol=1e-5)


def test_names_of_modules() -> None:
    low, up = boxes((6,), 2)
    found = compute_bounds(residual(), low, up, "crown", ["first", "last"], ON_DEVICE)
    assert set(found.intermediate) == {"first", "last"}
    assert found.intermediate["first"].lower.shape == (2, 12)
    assert torch.equal(found.intermediate["last"].lower, found.lower)
    with pytest.raises(InputError, match="did you mean 'second'"):
        compute_bounds(residual(), low, up, "crown", ["secnd"], ON_DEVICE)


def test_shapes_of_boxes() -> None:
    low, up = boxes((1, 7, 7), 3)
    assert compute_bounds(image(), low, up, config=ON_DEVICE).lower.shape == (3, 3)
    network = load_any(image(), (1, 1, 7, 7))
    assert compute_bounds(network, low.flatten(1), up.flatten(1), config=ON_DEVICE).lower.shape == (3, 3)
    assert compute_bounds(network, low[0].flatten(), up[0].flatten(), config=ON_DEVICE).lower.shape == (1, 3)
    whole = nn.Sequential(nn.Flatten(0), nn.Linear(4, 1))  # takes two rows at once
    box = torch.zeros(2, 2), torch.ones(2, 2)
    assert compute_bounds(whole, *box, config=ON_DEVICE, input_shape=(2, 2)).lower.shape == (1,)
    for bad, words in [
        (lambda: compute_bounds(network, low[:, :, :3], up[:, :, :3]), r"takes \[1, 1, 7, 7\]"),
        (lambda: compute_bounds(network, low, up, C=[[1.0, 2.0]]), r"C has shape \[1, 2\]"),
        (lambda: compute_bounds(network, low, up, C=[[[1.0, 2.0, 3.0]]]), r"\(3, S, 3\)"),
        (lambda: compute_bounds(network, low, up, C=[[1.0, 2.0, float("nan")]]), "not finite"),
        (lambda: compute_bounds(network, low[:0], up[:0]), "no box"),
        (lambda: compute_bounds(network, low, up, timeout=-1), "positive"),
        (lambda: compute_bounds(network, low, up, device="abacus"), "device"),
    ]:
        with pytest.raises(InputError, match=words):
            bad()


def test_time_runs_out() -> None:
    low, up = boxes((1, 7, 7), 3)
    with pytest.raises(DeadlineExceeded):
        compute_bounds(image(), low, up, config=ON_DEVICE, timeout=1e-6)


@pytest.mark.parametrize("certified", [True, False])
def test_slopes_are_optimised_once(certified: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    alpha_rows = batches.alpha_rows
    monkeypatch.setattr(batches, "alpha_rows", lambda *a: (calls.append(1), alpha_rows(*a))[1])
    low, up = boxes((6,), 3)
    compute_bounds(dense(), low, up, "alpha-crown", config={"device": "cpu"}, certified=certified)
    assert len(calls) == 3


def test_walks_grow_with_batches_not_with_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    lower_bounds = batches.lower_bounds
    monkeypatch.setattr(batches, "lower_bounds", lambda *a: (calls.append(1), lower_bounds(*a))[1])
    network, counts = load_any(dense(), (1, 6)), []
    for count in (2, 16, 64, 128):
        calls.clear()
        compute_bounds(network, *boxes((6,), count), config=ON_DEVICE)
        counts.append(len(calls))
    assert max(counts[:3]) <= 2 * counts[0] and counts[3] <= 2 * counts[2]


def test_the_same_from_the_top() -> None:
    assert verifier.compute_bounds is compute_bounds
    found = verifier.compute_bounds(dense(), *boxes((6,), 2), device=DEVICE.type)
    assert found.lower.device.type == "cpu"
