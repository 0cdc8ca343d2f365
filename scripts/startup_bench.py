"""Compares a trivial instance with the bare imports that it cannot do without, in one run.

    python scripts/startup_bench.py [--rounds 5] [--onnx F --vnnlib F]

Both commands alternate, so that a busy machine slows both; medians are compared. Exits 1 when the instance costs more
than 1.5 times the imports plus one second.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IMPORTS = "import torch, onnx, onnxruntime"


def seconds(command: Sequence[str]) -> float:
    """Wall time of a command that must succeed."""
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx", type=Path, default=EXAMPLES / "rings.onnx")
    parser.add_argument("--vnnlib", type=Path, default=EXAMPLES / "rings_small.vnnlib")
    arguments = parser.parse_args()

    imports = [sys.executable, "-c", IMPORTS]
    instance = [sys.executable, "-m", "verifier", "verify", "--onnx", str(arguments.onnx)]
    instance += ["--vnnlib", str(arguments.vnnlib)]
    for command in (imports, instance):  # files into the page cache
        seconds(command)
    pairs = [(seconds(imports), seconds(instance)) for _ in range(arguments.rounds)]
    base, cost = (statistics.median(column) for column in zip(*pairs, strict=True))
    allowed = 1.5 * base + 1.0
    print(f"imports  {base:6.2f} s  ({IMPORTS})")
    print(f"instance {cost:6.2f} s  ({arguments.onnx.name} {arguments.vnnlib.name})")
    print(f"allowed  {allowed:6.2f} s  (1.5 x imports + 1 s): {'ok' if cost <= allowed else 'TOO SLOW'}")
    return 0 if cost <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
