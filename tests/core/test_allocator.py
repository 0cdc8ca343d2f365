"""Freed blocks are used again instead of being given back page by page."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from verifier.core.allocator import keep_freed_blocks

# Takes and frees blocks of 4 MiB, as steps of a search do, and prints the page faults that it met.
PROGRAM = """
import resource, sys, numpy
from verifier.core.allocator import keep_freed_blocks
if sys.argv[1] == "keep":
    assert keep_freed_blocks()
for _ in range(20):
    numpy.ones(1 << 19) + numpy.ones(1 << 19)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    numpy.ones(1 << 19) + numpy.ones(1 << 19)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": ""}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return int(out.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes the advice")
def test_freed_blocks_are_used_again() -> None:
    plain, kept = faults("plain"), faults("keep")
    assert kept < 100 and kept < plain / 10, (plain, kept)


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_blocks() is False
