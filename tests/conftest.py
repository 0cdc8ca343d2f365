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

# Of tests with more cases than this every second one runs, unless ``--thorough`` asks for all of them.
FEW_CASES = 8
# What ``make quick`` runs: a file or folder, and which cases of each of its tests (every N-th; ``slow`` and
# ``timing`` ones are left out). Behind it CPU seconds of one process on a busy machine.
QUICK: dict[str, int] = {
    "tests/attack/test_parts.py": 2,  # 5
    "tests/attack/test_pgd.py": 6,  # 5
    "tests/bab/test_input_split.py": 10,  # 10
    "tests/bab/test_leaf_lp.py": 6,  # 5
    "tests/bab/test_probing.py": 4,  # 5
    "tests/bounds/test_certificates.py": 10,  # 5
    "tests/bounds/test_forms.py": 10,  # 4
    "tests/bounds/test_gradients.py": 10,  # 5
    "tests/bounds/test_relevance.py": 10,  # 1
    "tests/bounds/test_soundness.py": 10,  # 3
    "tests/bounds/test_splits.py": 10,  # 2
    "tests/bounds/test_underflow.py": 10,  # 8
    "tests/cli/test_main.py": 6,  # 12
    "tests/certification": 4,
    "tests/core": 4,  # 18
    "tests/examples/test_examples.py": 12,  # 10
    "tests/frontend/test_capture.py": 6,  # 2
    "tests/frontend/test_crosscheck.py": 6,  # 1
    "tests/frontend/test_normalise.py": 6,  # 3
    "tests/frontend/test_onnx2torch_loader.py": 1,
    "tests/frontend/test_onnx_file.py": 6,  # 1
    "tests/frontend/test_onnx_ops.py": 6,  # 5
    "tests/frontend/test_parity.py": 6,  # 1
    "tests/frontend/test_passes.py": 6,  # 1
    "tests/fuzzing": 20,  # 8
    "tests/graph": 4,
    "tests/ops": 8,  # 9
    "tests/parallel/test_tp.py": 20,  # 12
    "tests/proof/test_trees.py": 2,
    "tests/proofcheck/test_parts.py": 4,
    "tests/report": 2,  # 8
    "tests/runtime/test_warm_kernels.py": 1,
    "tests/solver/test_strict.py": 8,  # 5
    "tests/solver/test_types.py": 8,  # 4
    "tests/spec": 2,  # 3
    "tests/spec/test_vnnlib.py": 6,  # 8
    "tests/support": 30,  # 4
    "tests/testing": 6,
    "tests/truth": 24,  # 10
    "tests/test_api.py": 4,  # 12
    "tests/test_config.py": 4,
    "tests/test_docs.py": 2,  # 5
    "tests/test_mutants.py": 1,
    "tests/test_project.py": 1,  # 12
    "tests/test_thorough.py": 1,
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
    parser.addoption(
        "--thorough",
        action="store_true",
        help="run what is left out otherwise: tests marked thorough, and all cases of every test",
    )


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
    """Keep cases 0, N, 2 N, ... of every test function, and tests marked ``thorough`` only if they are asked for.

    N is what the options and a test's mark ``sampled`` say; without such a mark every second case of a test with many
    of them runs. With ``--thorough`` nothing but ``--every`` leaves cases out.
    """
    cases = Counter(item.nodeid.partition("[")[0] for item in items)
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    quick, thorough = config.getoption("quick"), config.getoption("thorough")
    for item in items:
        test = item.nodeid.partition("[")[0]
        sampled = item.get_closest_marker("sampled")
        stride = config.getoption("every") * ((quick_stride(item.path) or 1) if quick else 1)
        if not thorough and sampled is not None:
            stride *= sampled.args[0]
        elif not thorough and not quick and cases[test] > FEW_CASES:
            stride *= 2
        wanted = thorough or not item.get_closest_marker("thorough")
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
