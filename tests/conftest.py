"""Settings of the whole test run and fixtures that several folders share."""

from __future__ import annotations

import os

# Threads fight over few cores when several test workers run; set before numpy and torch are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

# Tests import onnxruntime themselves, and start processes that do.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT.parent / "shared" / "vnncomp"

# Derandomised so that a red run can be repeated; HYPOTHESIS_PROFILE=explore looks for new cases.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", derandomize=True, print_blob=True, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default=os.environ.get("VERIFIER_TEST_DEVICE", "cpu"),
        help="what tests of bounds, certificates and searches compute on",
    )
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every N-th case of each test")


def pytest_configure(config: pytest.Config) -> None:
    """Pass the device on to ``tests.support.device``, which is imported later."""
    device = config.getoption("device")
    os.environ["VERIFIER_TEST_DEVICE"] = device
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device on this machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what ``--every`` does; skip tests marked ``gpu`` where no CUDA device is."""
    _thin_out(config, items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _thin_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep cases 0, N, 2 N, ... of every test function."""
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        (kept if seen[test] % config.getoption("every") == 0 else left_out).append(item)
        seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def sample() -> Path:
    """The folder of VNN-COMP instances beside the repository; the test is skipped without it."""
    if not (SAMPLE / "verdicts.csv").is_file():
        pytest.skip(f"the VNN-COMP sample is not at {SAMPLE}; put it there to run this test")
    return SAMPLE
