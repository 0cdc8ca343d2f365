"""Ranges by construction: the op on boxes that leave the range, and what it does for networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from verifier.core.interval import Interval
from verifier.frontend.network import from_module
from verifier.ops.within import Within

RANGES = [(0.0, math.inf), (-1.5, 1.5), (1.0, math.inf), (-math.inf, 0.0), (-math.inf, math.inf)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("ends", RANGES)
def test_planes_hold_inside_the_range(ends: tuple[float, float], share: float | None, dtype: torch.dtype) -> None:
    """On boxes that reach beyond the range, for the numbers of the box that lie in it."""
    op, g = Within(*ends), torch.Generator().manual_seed(0)
    centre, radius = torch.randn(1, 64, generator=g, dtype=dtype) * 3, torch.rand(1, 64, generator=g, dtype=dtype) * 6
    box = Interval(centre - radius, centre + radius)
    image = op.interval([box], ())
    params = None
    if share is not None:
        params = {k: torch.full_like(spec.initial, share) for k, spec in op.parameters([box]).items()}
    planes = op.relax([box], params)
    for part in (0.0, 0.2, 0.5, 0.9, 1.0):
        z = box.lower + part * (box.upper - box.lower)
        z = z.clamp(*ends)
        inside = (z >= box.lower) & (z <= box.upper)

        def held(below: Tensor, above: Tensor, inside: Tensor = inside) -> bool:
            return bool((below <= above)[inside].all())

        assert held(image.lower, z) and held(z, image.upper)
        at = z[:, None].double()
        assert held((planes.lower_slope.double() * at + planes.lower_intercept.double())[:, 0], z.double())
        assert held(z.double(), (planes.upper_slope.double() * at + planes.upper_intercept.double())[:, 0])
        assert bool(torch.isfinite(planes.lower_intercept).all() and torch.isfinite(planes.upper_intercept).all())


def test_interval_beside_the_range_is_an_end_of_it() -> None:
    found = Within(0.0, 1.0).interval([Interval(torch.tensor([[-2.0, 3.0]]), torch.tensor([[-1.0, 4.0]]))], ())
    assert found.lower.tolist() == [[0, 1]] and found.upper.tolist() == [[0, 1]]


class Length(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum(-1, keepdim=True).sqrt()


def output(module: nn.Module, radius: float) -> Interval:
    """Of a network on a box around zero, by interval arithmetic."""
    from tests.frontend.models import resident

    graph = from_module(module, input_shape=(1, 4)).graph
    full = torch.full((1, 1, 4), radius, dtype=torch.float64)
    found, store = {0: Interval(-full, full)}, resident(graph)
    for node in graph.nodes[1:]:
        with store.fetch(node.op.handles, torch.float64) as p:
            found[node.index] = node.op.interval([found[i] for i in node.inputs], p)
    return found[graph.output]


def test_a_norm_has_bounds_where_it_is_zero() -> None:
    low, up = output(Length(), 1.0)
    assert low.min() >= 0 and up.max() <= 2 + 1e-9


@pytest.mark.parametrize("radius", [0.1, 10.0, 1e4])
def test_normalised_numbers_are_bounded(radius: float) -> None:
    low, up = output(nn.LayerNorm(4, elementwise_affine=False), radius)
    assert up.max() <= math.sqrt(3) + 1e-9 and low.min() >= -math.sqrt(3) - 1e-9
    assert from_module(nn.LayerNorm(4), input_shape=(1, 4)).output_shape == (1, 4)
    x = torch.tensor([[1e4, 0, 0, 0]])
    assert nn.functional.layer_norm(x, (4,)).max() > 1.732  # which is reached


@pytest.mark.parametrize("factor", [1.0, 100.0, 1000.0])
def test_softmax_of_large_numbers_keeps_its_range(factor: float) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(factor * x, -1)

    low, up = output(Scaled(), 1.0)
    assert low.min() >= -1e-9 and up.max() <= 1 + 1e-9
