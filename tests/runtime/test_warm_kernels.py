"""What a warm process does before the first query."""

from __future__ import annotations

import pytest
import torch

from tests.support.device import DEVICE
from verifier.core.result import Verdict
from verifier.runtime.warm_kernels import warm_kernels


def test_both_searches_run_and_random_numbers_stay_as_they_are() -> None:
    before = torch.random.get_rng_state()
    images, points = warm_kernels(DEVICE.type)
    assert torch.equal(before, torch.random.get_rng_state())
    assert images.statistics["relu_split"]["domains"] > 500
    assert images.statistics["relu_split"]["rounds"] > 3
    assert points.statistics["input_split"]["domains"] > 10
    assert Verdict.SAT not in (images.verdict, points.verdict)


def test_it_joins_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torchrun's variables say: nobody else would come."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    assert all(result.statistics for result in warm_kernels(DEVICE.type))
