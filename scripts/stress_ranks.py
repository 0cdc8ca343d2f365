"""Runs small queries on several ranks many times over: no run may hang, fail, or contradict one rank.

    python scripts/stress_ranks.py [--count 200] [--jobs 1] [--device cpu] [--seed 0]

Every run takes an example, a number of ranks (2 to 4), a backend and a number of groups at random. One rank answers
each example first. Exits 1 when a run hangs (longer than the time limit and ten seconds), ends in an error, is not
solved, or has another verdict.
"""

from __future__ import annotations

import argparse
import collections
import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT = 90.0


@dataclass(frozen=True)
class Run:
    """One query and how it is shared."""

    onnx: Path
    vnnlib: Path
    settings: tuple[str, ...] = ()

    def command(self, device: str) -> list[str]:
        words = [sys.executable, "-m", "verifier", "verify", "--onnx", str(self.onnx), "--vnnlib", str(self.vnnlib)]
        words += ["--timeout", str(TIMEOUT), "--device", device]
        return words + [word for s in ("threads=1", *self.settings) for word in ("--set", s)]

    @property
    def label(self) -> str:
        return f"{self.vnnlib.name} {' '.join(s.removeprefix('parallel.') for s in self.settings)}"


def examples() -> list[Run]:
    """The queries in ``examples/instances.csv``."""
    with (EXAMPLES / "instances.csv").open() as stream:
        return [Run(EXAMPLES / row[0], EXAMPLES / row[1]) for row in csv.reader(stream) if row]


def shared(run: Run, rng: random.Random) -> Run:
    """The same query on several ranks."""
    ranks = rng.choice([2, 3, 4])
    backend = rng.choice(["single", "fsdp", "tp"])
    groups = rng.choice([d for d in range(1, ranks + 1) if ranks % d == 0 and not (backend == "tp" and d == ranks)])
    settings = [f"parallel.ranks={ranks}", f"parallel.backend={backend}", f"parallel.domains={groups}"]
    # Every kind of search that can decide the query, also where the strategy would do without.
    kinds = ["auto", "kfsb", "input"] if run.onnx.name.startswith("rings") else ["auto", "kfsb"]
    settings.append(f"bab.branching={rng.choice(kinds)}")
    if rng.random() < 0.5:
        settings.append("attack.enabled=false")
    return Run(run.onnx, run.vnnlib, tuple(settings))


def answer(run: Run, device: str) -> tuple[str, float]:
    """Verdict (``hang`` when it had to be ended), and seconds."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    began = time.monotonic()
    try:
        done = subprocess.run(
            run.command(device), env=environment, capture_output=True, text=True, timeout=TIMEOUT + 10
        )
        verdict = done.stdout.strip() or "error"
        if done.returncode:
            verdict = f"error: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    except subprocess.TimeoutExpired:
        verdict = "hang"
    return verdict, time.monotonic() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    queries = examples()
    known = {q.vnnlib: answer(q, options.device)[0] for q in queries}
    for vnnlib, verdict in known.items():
        if verdict not in ("sat", "unsat"):
            parser.exit(1, f"{vnnlib.name}: one rank alone answers {verdict}\n")
    runs = [shared(rng.choice(queries), rng) for _ in range(options.count)]
    bad, verdicts, slowest = [], collections.Counter[str](), 0.0
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, (verdict, seconds) in zip(runs, pool.map(lambda r: answer(r, options.device), runs), strict=True):
            verdicts[verdict.split(":")[0]] += 1
            slowest = max(slowest, seconds)
            if verdict != known[run.vnnlib]:
                bad.append(run)
                print(f"{run.label}: {verdict}, alone {known[run.vnnlib]} ({seconds:.1f} s)", flush=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    print(f"{len(runs)} runs: {counts}; slowest {slowest:.1f} s; {len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
