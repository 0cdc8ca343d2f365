"""Runs the tests that try to break bounds, certificates, relaxations and searches on a chosen device.

    python scripts/soundness_suite.py [--device cuda] [--quick] [--workers N] [PYTEST ARGUMENT ...]

Every tensor and every query of these tests is on that device: samples and corners against bounds, rational and 60-digit
arithmetic against certificates and relaxations, exact minima (MILP) against verdicts, lost domains against the books of
a search. ``--quick`` takes every fifth case of each test. Other arguments go to pytest; names of files or folders
replace the suite's own (``tests/bounds -k crown``).

Needs, besides torch and what the verifier needs: pytest, hypothesis, mpmath. With pytest-xdist installed the tests run
in several processes, each with a context of its own on the device. Exits 1 when a test fails, 2 when the device or a
package is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUITE = ("tests/ops", "tests/bounds", "tests/attack", "tests/bab", "tests/solver", "tests/truth")
# Also files of networks, which need more packages.
WITH_FILES = ("tests/test_api.py",)
# Modules and the packages that hold them.
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "mpmath": "mpmath",
    "hypothesis": "hypothesis",
    "pytest": "pytest",
}
FOR_FILES = {"click": "click", "onnx": "onnx", "onnx2torch": "onnx2torch", "onnxruntime": "onnxruntime"}
MOST_WORKERS = 8  # more contexts only wait for each other on one device
QUICK = 5  # no divisor of the usual numbers of cases, so that all kinds of them come


def missing(modules: dict[str, str]) -> list[str]:
    """Packages whose modules cannot be found."""
    return [package for module, package in modules.items() if importlib.util.find_spec(module) is None]


def name_of(device: str) -> str | None:
    """What the device is called; None when it is not there."""
    import torch

    if device == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@dataclass
class Counts:
    """A pytest plugin that keeps the numbers of the last line."""

    of: Counter[str] = field(default_factory=Counter)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for outcome in ("passed", "failed", "error", "skipped"):
            self.of[outcome] = len(terminalreporter.stats.get(outcome, ()))


def arguments_of(options: argparse.Namespace, others: Sequence[str], files: bool) -> list[str]:
    """pytest's arguments."""
    chosen = any((ROOT / word.split("::")[0]).exists() for word in others if not word.startswith("-"))
    words = [] if chosen else [*SUITE, *(WITH_FILES if files else ())]
    words += [
        "--device",
        options.device,
        "--thorough",
        "-m",
        "not timing and not thorough",
        "-q",
        "--rootdir",
        str(ROOT),
    ]
    if options.quick:
        words += ["--every", str(QUICK)]
    if not missing({"xdist": ""}):
        workers = options.workers or max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))
        words += ["-n", str(workers)]
    if missing({"pytest_timeout": ""}):
        # Its setting in pyproject.toml would be unknown, which --strict-config refuses.
        words += [
            "-o",
            "addopts=-ra --strict-markers --import-mode=importlib",
            "-W",
            "ignore::pytest.PytestConfigWarning",
        ]
    return [*words, *others]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th case of each test")
    parser.add_argument(
        "--workers", type=int, default=0, help=f"processes; 0: half of the cores, at most {MOST_WORKERS}"
    )
    options, others = parser.parse_known_args(argv)
    absent = missing(NEEDED)
    if absent:
        print(
            f"Error: the suite needs packages that are not installed; pip install {' '.join(absent)}", file=sys.stderr
        )
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    name = name_of(options.device)
    if name is None:
        print(
            "Error: torch finds no CUDA device on this machine; take --device cpu or another machine", file=sys.stderr
        )
        return 2
    left_out = missing(FOR_FILES)
    if left_out:
        print(f"{', '.join(WITH_FILES)} left out: not installed: {' '.join(left_out)}")
    os.chdir(ROOT)
    import pytest
    import torch

    counts, start = Counts(), time.monotonic()
    code = pytest.main(arguments_of(options, others, not left_out), plugins=[counts])
    seconds = time.monotonic() - start
    n = counts.of
    print(f"device   {options.device}: {name}")
    print(f"torch    {torch.__version__}")
    print(f"tests    {n['passed']} passed, {n['failed'] + n['error']} failed, {n['skipped']} skipped")
    print(f"time     {seconds:.0f} s")
    return 0 if code == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main())
