"""Compares a trivial instance, cold and with a resident worker, with the imports that it cannot do without, in one run.

    python scripts/startup_bench.py [--rounds 5] [--onnx F --vnnlib F]

The commands take turns, so that a busy machine slows all of them; medians are compared. The imports include a context
on the GPU when there is one. The resident worker is this run's own, and preparing it is not counted. Exits 1 when a
median is above what is allowed, or when an instance was not answered as it should.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = ROOT / "vnncomp_scripts"
IMPORTS = "import torch, onnx, onnxruntime; torch.cuda.is_available() and torch.zeros(1, device='cuda')"
COLD_FACTOR = 1.3
RESIDENT_SECONDS = 0.6


class Failed(Exception):
    """A command did not do what is measured."""


def remarks(command: Sequence[str | Path], variables: dict[str, str]) -> tuple[float, str]:
    """Wall time of a command that must succeed, and what it remarked."""
    begin = time.monotonic()
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables, check=False)
    spent = time.monotonic() - begin
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip()}")
    return spent, done.stderr.strip()


def seconds(command: Sequence[str | Path], variables: dict[str, str], silent: bool = True) -> float:
    """Wall time of a command that must succeed and, where ``silent``, have nothing to remark."""
    spent, said = remarks(command, variables)
    if silent and said:
        raise Failed(f"{' '.join(map(str, command))}: {said}")
    return spent


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's variables and some more; what it starts runs the code of this repository with its interpreter."""
    path = f"{ROOT}:{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else str(ROOT)
    ours = {"PYTHONPATH": path, "VERIFIER_PYTHON": sys.executable, "ORT_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **variables, **ours}


def measure(
    onnx: Path, vnnlib: Path, rounds: int, variables: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of every round by what was run; one more round goes first, so that files are in memory.

    Args:
        variables: of the environment, beside this process's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.txt"
        cold = environment({**(variables or {}), "VERIFIER_RESIDENT_SECONDS": "0"})
        warm = {**cold, "VERIFIER_RESIDENT_SECONDS": "60", "VERIFIER_RESIDENT_FOLDER": f"{folder}/resident"}
        prepare = [SCRIPTS / "prepare_instance.sh", "v1", "test", onnx, vnnlib]
        instance = [SCRIPTS / "run_instance.sh", "v1", "test", onnx, vnnlib, results, "60"]
        verify = [sys.executable, "-m", "verifier", "verify", "--onnx", onnx, "--vnnlib", vnnlib]
        found: dict[str, list[float]] = {"imports": [], "verify": [], "cold": [], "resident": []}
        answers: set[str] = set()
        try:
            for _ in range(rounds + 1):
                found["imports"].append(seconds([sys.executable, "-c", IMPORTS], cold, silent=False))
                found["verify"].append(seconds(verify, cold))
                found["cold"].append(seconds(instance, cold))
                answers.add(results.read_text().split()[0])
                seconds(prepare, warm)
                found["resident"].append(seconds(instance, warm))
                answers.add(results.read_text().split()[0])
        finally:
            seconds([sys.executable, "-m", "verifier", "vnncomp", "resident", "--stop"], warm, silent=False)
        if len(answers) != 1 or not answers <= {"sat", "unsat"}:
            raise Failed(f"the instance was answered {', '.join(sorted(answers))}")
    return {name: values[1:] for name, values in found.items()}


def report(found: dict[str, list[float]]) -> tuple[list[str], bool]:
    """Lines to show, and whether all medians are allowed."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    base = medians["imports"]
    limits = {"verify": COLD_FACTOR * base, "cold": COLD_FACTOR * base, "resident": RESIDENT_SECONDS}
    lines = [f"{'':10} median     min     max  allowed"]
    for name, values in found.items():
        figures = f"{name:10} {medians[name]:5.2f} s {min(values):5.2f} s {max(values):5.2f} s"
        if name in limits:
            figures += f"  {limits[name]:5.2f} s  {'ok' if medians[name] <= limits[name] else 'TOO SLOW'}"
            figures += f" ({medians[name] / base:.2f} x imports)"
        lines.append(figures)
    return lines, all(medians[name] <= limit for name, limit in limits.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--onnx", type=Path, default=EXAMPLES / "rings.onnx")
    parser.add_argument("--vnnlib", type=Path, default=EXAMPLES / "rings_small.vnnlib")
    arguments = parser.parse_args()
    try:
        found = measure(arguments.onnx.absolute(), arguments.vnnlib.absolute(), arguments.rounds)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    lines, allowed = report(found)
    print(f"imports: {IMPORTS}\ninstance: {arguments.onnx.name} {arguments.vnnlib.name}\n" + "\n".join(lines))
    return 0 if allowed else 1


if __name__ == "__main__":
    sys.exit(main())
