"""Optimisations of slopes end when what is left to gain is of no use, and not before."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.bounds.nets import make
from verifier.bounds import climb
from verifier.bounds.alpha import Schedule, alpha_hidden
from verifier.bounds.crown import crown_hidden
from verifier.bounds.worth import CONFIRMED, NEGLIGIBLE, DriedUp, Forecast, looked_at

STEPS = 40
LOOKS = [step for step in range(STEPS) if looked_at(step)]


def test_the_host_looks_every_few_steps() -> None:
    assert LOOKS[:5] == [0, 2, 4, 6, 8]
    assert all(b - a >= 2 for a, b in itertools.pairwise(LOOKS)) and len(LOOKS) <= STEPS / 4 + 3


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.95])
def test_forecasts_of_shrinking_gains_are_no_smaller_than_the_gains(rate: float) -> None:
    """Bounds that approach a limit by a factor per step: both forecasts are at least what is left."""
    forecast = Forecast(STEPS)
    for step in LOOKS:
        forecast.note(step, torch.tensor([-(rate**step)], dtype=torch.float64))
        left = rate**step - rate**STEPS
        if forecast.linear is not None:
            assert float(forecast.linear) >= left * (1 - 1e-9) or step < 2
        if forecast.series is not None:
            assert left * (1 - 1e-6) <= float(forecast.series) <= float(forecast.linear) * (1 + 1e-9)  # type: ignore[arg-type]


def ended(bounds: list[float], width: float) -> int:
    """The look that ends it, -1 for none."""
    dry = DriedUp(STEPS, torch.tensor([width]))
    pairs = zip(LOOKS, bounds, strict=False)
    return next((step for step, bound in pairs if dry(step, torch.tensor([[bound]]))), -1)


def test_dry_is_what_cannot_gain_a_part_of_the_width() -> None:
    assert ended([-1.0] * 20, 2.0) == 2
    assert ended([-1.0 + 0.01 * step for step in LOOKS], 1.0) == -1
    assert ended([-1.0 + 0.01 * step for step in LOOKS], 0.4 / NEGLIGIBLE * 1.01) == 2
    assert ended([-(0.2**step) for step in LOOKS], 1.0) == LOOKS[1 + CONFIRMED]
    late = [-1.0, -0.9, -0.899] + [-0.5 + 0.1 * math.log(k + 1) for k in range(12)]
    assert ended(late, 1.0) not in (4, 6)  # a quiet look alone, whose gains go on shrinking, is not enough
    assert ended([-math.inf, -math.inf, -1.0, -0.5], 1.0) == 2  # no width is known, nothing was gained


def test_rows_without_a_bound_that_get_one_go_on() -> None:
    dry = DriedUp(STEPS, torch.tensor([1.0, math.inf]))
    assert not dry(0, torch.tensor([[-1.0, -math.inf]]))
    assert not dry(2, torch.tensor([[-1.0, -5.0]]))


@pytest.mark.parametrize("kind", ["mlp", "smooth"])
def test_hidden_nodes_stop_early_and_keep_most_of_the_gain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, own = [0], climb.Climb.bound

    def counted(self: climb.Climb) -> None:
        steps[0] += 1
        own(self)

    monkeypatch.setattr(climb.Climb, "bound", counted)
    case = make(kind, 5)
    plain = crown_hidden(case.engine, case.state())
    before = {i: b.upper - b.lower for i, b in plain.bounds.items()}

    def widths(stops: bool) -> float:
        with pytest.MonkeyPatch.context() as patch:
            if not stops:
                patch.setattr("verifier.bounds.alpha.DriedUp", lambda *_: lambda *_: False)
            steps[0] = 0
            state = crown_hidden(case.engine, case.state())
            found = alpha_hidden(case.engine, state, Schedule(20))
        return float(sum((b.upper - b.lower).double().sum() for b in found.bounds.values()))

    start = float(sum(w.double().sum() for w in before.values()))
    full, most = widths(False), steps[0]
    short, fewer = widths(True), steps[0]
    assert fewer < most and full <= short + 1e-6 <= start + 2e-6
    assert short - full <= 4 * NEGLIGIBLE * start
