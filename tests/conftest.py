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

# What ``make quick`` runs: file or folder, and which of the cases of each of its tests (every N-th).
QUICK: dict[str, int] = {
    "tests/core": 1,
}

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
    parser.addoption("--quick", action="store_true", help="run the selection QUICK of tests/conftest.py")
    parser.addoption("--thorough", action="store_true", help="run tests marked thorough as well")


def pytest_configure(config: pytest.Config) -> None:
    """Pass the device on to ``tests.support.device``, which is imported later."""
    device = config.getoption("device")
    os.environ["VERIFIER_TEST_DEVICE"] = device
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device on this machine")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--quick``, files outside the selection are not even imported."""
    if not config.getoption("quick") or collection_path.is_dir():
        return None
    return True if quick_stride(collection_path) is None else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the options leave out; skip tests marked ``gpu`` where no CUDA device is."""
    _thin_out(config, items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def quick_stride(file: Path) -> int | None:
    """Which cases of its tests a file contributes to the quick selection (every N-th); None: none at all."""
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.as_posix()
    found = [place for place in QUICK if name == place or name.startswith(f"{place}/")]
    return QUICK[max(found, key=len)] if found else None


def _thin_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep cases 0, N, 2 N, ... of every test function, and tests marked ``thorough`` only if they are asked for."""
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        stride = config.getoption("every") * ((quick_stride(item.path) or 1) if config.getoption("quick") else 1)
        wanted = config.getoption("thorough") or not item.get_closest_marker("thorough")
        (kept if wanted and seen[test] % stride == 0 else left_out).append(item)
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
