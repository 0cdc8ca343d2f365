"""Bounds under split constraints hold for every point that satisfies the splits, whatever the multipliers are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.bounds.nets import Case, make
from tests.support.device import DEVICE
from verifier.bounds.alpha import Schedule, Splits, initial_parameters, optimise
from verifier.bounds.crown import BoundState, Specification, crown_hidden, crown_rows
from verifier.bounds.engine import PLAIN, Engine
from verifier.core.interval import Interval
from verifier.ops.relu import Relu

NAMES = ["mlp", "conv", "strided", "residual", "preactivation", "shared", "concat", "smooth"]
ROWS = 4


class Domain:
    """Splits of a few neurons by the signs that a random point of the box gives them, and sampled members."""

    def __init__(self, name: str, seed: int, share: float) -> None:
        self.case: Case = make(name, seed, radius=1.0)
        graph = self.case.graph
        root = crown_hidden(Engine(graph, self.case.backend), self.case.state())
        random = torch.Generator().manual_seed(seed)
        points = self.case.samples(3000, seed)
        values = self.case.values(points)
        self.signs: dict[int, Tensor] = {}
        bounds = dict(root.bounds)
        members = torch.ones(points.shape[0], dtype=torch.bool, device=DEVICE)
        for node in graph.nodes:
            if isinstance(node.op, Relu):
                index = node.inputs[0]
                z = values[index][:, 0]
                low, up = bounds[index]
                some = torch.rand(low.shape, generator=random).to(DEVICE) < share / low.numel()
                pick = (low < 0) & (up > 0) & some
                sign = torch.where(pick, torch.where(z[0] > 0, -1.0, 1.0), 0.0)
                self.signs[node.index] = sign[:, None]
                members &= (sign * z <= 0).flatten(1).all(1)
                bounds[index] = Interval(
                    torch.where(sign < 0, low.clamp(min=0), low), torch.where(sign > 0, up.clamp(max=0), up)
                )
        self.root = root
        self.state = BoundState(root.box, bounds, root.magnitudes, root.certified)
        y = torch.randn((1, ROWS, *graph.output_shape), generator=random, dtype=torch.float64).to(DEVICE)
        self.spec = Specification(y)
        rows = torch.einsum("nbo,so->ns", values[graph.output].flatten(2), y[0].flatten(1))
        self.values = rows[members]
        self.count = sum(int((s != 0).sum()) for s in self.signs.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_members_stay_above_the_bound(name: str, seed: int) -> None:
    domain = Domain(name, seed, share=3.0)
    made, state = domain.case, domain.state
    least = domain.values.amin(0) + 1e-12
    random = torch.Generator().manual_seed(seed)
    for size in (0.0, 0.01, 0.3, 10.0):
        splits = {
            i: s * size * torch.rand((1, ROWS, *s.shape[2:]), generator=random).to(DEVICE)
            for i, s in domain.signs.items()
        }
        lower, _ = crown_rows(made.engine, state, domain.spec, splits=splits)
        assert bool((lower[0] <= least).all())
        narrow, _ = crown_rows(made.engine.using(PLAIN), state, domain.spec, splits=splits)
        assert bool((narrow[0].double() <= least + 1e-4 * (1 + least.abs())).all())
    # Hidden bounds found inside the domain hold for its members too.
    values, _ = initial_parameters(made.graph, state.bounds, ROWS, len(made.graph.nodes))
    multipliers = {i: torch.zeros(1, ROWS, *s.shape[2:], device=DEVICE) for i, s in domain.signs.items()}
    start = domain.spec.forms(made.backend, made.graph.output, torch.float32)
    found = optimise(made.engine, state, start, values, Schedule(12), Splits(domain.signs, multipliers))
    splits = {i: domain.signs[i] * m for i, m in found.multipliers.items()}
    assert all(bool((m >= 0).all()) for m in found.multipliers.values())
    best, _ = crown_rows(made.engine, state, domain.spec, found.parameters, splits)
    assert bool((best[0] <= least).all())
    without, _ = crown_rows(made.engine, state, domain.spec)
    assert bool((best >= without - 1e-4 * (1 + without.abs())).all())


def test_multipliers_help_and_wrong_signs_would_be_wrong() -> None:
    """Splits tighten some bounds beyond clipping; the opposite sign gives bounds that members violate."""
    better = wrong = 0
    for seed in range(12):
        domain = Domain("mlp", seed, share=6.0)
        made = domain.case
        plain, _ = crown_rows(made.engine, domain.state, domain.spec)
        for size in (0.1, 0.5, 2.0):
            splits = {i: s * size for i, s in domain.signs.items()}
            right, _ = crown_rows(made.engine, domain.state, domain.spec, splits=splits)
            better += int((right > plain + 1e-6).sum())
            flipped = {i: -s for i, s in splits.items()}
            lower, _ = crown_rows(made.engine, domain.state, domain.spec, splits=flipped)
            wrong += int((lower[0] > domain.values.amin(0) + 1e-6).sum())
    assert better > 0
    assert wrong > 0
