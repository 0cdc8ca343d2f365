"""Slopes are kept for unstable neurons alone where these are few, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.bounds.nets import make
from verifier.bounds import climb
from verifier.bounds.alpha import Optimised, Schedule, alpha_rows
from verifier.bounds.crown import Specification, crown_hidden, crown_rows


def optimised(monkeypatch: pytest.MonkeyPatch, kind: str, least: int) -> tuple[Optimised, torch.Tensor]:
    """Every row of the output, and its bound with the slopes found, certified."""
    monkeypatch.setattr(climb, "_WORTH_PICKING", least)
    monkeypatch.setattr(climb, "_MOST_FREE", 1.0)
    case = make(kind, 4)
    n = case.graph.nodes[case.graph.output].size
    rows = torch.cat([torch.eye(n), -torch.eye(n)]).double().reshape(1, 2 * n, *case.graph.output_shape)
    state = crown_hidden(case.engine, case.state())
    spec = Specification(rows.to(state.box.lower.device))
    found = alpha_rows(case.engine, state, spec, Schedule(12))
    return found, crown_rows(case.engine, state, spec, found.parameters)[0]


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual", "smooth", "choice"])
def test_bounds_are_the_same_and_less_is_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (full, sure), (few, again) = (optimised(monkeypatch, kind, least) for least in (1 << 60, 0))
    assert torch.equal(full.lower, few.lower) and torch.equal(sure, again)
    shapes = [{i: {k: v.shape for k, v in d.items()} for i, d in f.parameters.items()} for f in (full, few)]
    assert shapes[0] == shapes[1]
    assert few.state.slopes <= full.state.slopes
    if kind in ("mlp", "conv", "residual"):
        assert few.state.slopes < full.state.slopes
