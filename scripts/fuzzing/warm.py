"""The resident worker: several different queries in turn, under the same file names, answered like by a cold one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.fuzzing import checks, search
from scripts.fuzzing.checks import Complaint, Query
from scripts.fuzzing.search import Found
from scripts.measure import COMPETITION, environment

_QUERIES = 6
_LIMIT = 20.0
_EASY = 2.0  # seconds of a cold answer below which a warm one must decide too


def run(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """One resident worker and the queries it gets."""
    queries: list[Query] = []
    while len(queries) < _QUERIES:
        query = search.random_query(rng, device)
        if query is not None:
            queries.append(checks.at(query, methods=(), timeout=_LIMIT, settings={}))
    yield from sequence(queries)


def sequence(queries: Sequence[Query]) -> Iterator[Found | None]:
    """Every query by a cold solver in this process, and by the competition's scripts with a resident worker."""
    with tempfile.TemporaryDirectory() as place:
        shell = _Scripts(Path(place))
        try:
            for query in queries:
                cold, seconds = _cold(query)
                if cold is None or seconds > _EASY or cold.verdict.value not in ("sat", "unsat"):
                    yield None
                    continue
                complaint = next(iter(checks.judged(query, cold)), None) or shell.compared(query, cold.verdict.value)
                yield Found(query, complaint) if complaint else None
        finally:
            shell.close()


def _cold(query: Query) -> tuple[Any, float]:
    import verifier

    with checks.written(query) as (network, property), checks.quiet():
        began = time.monotonic()
        try:
            return verifier.verify(network, property, dict(query.settings), 4.0), time.monotonic() - began
        except Exception:
            return None, 0.0


class _Scripts:
    """``prepare_instance.sh`` and ``run_instance.sh`` with a resident worker of their own."""

    def __init__(self, place: Path) -> None:
        self.place, self.folder = place, place / "resident"
        ours = {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "VERIFIER_RESIDENT_FOLDER": str(self.folder),
            "VERIFIER_RESIDENT_SECONDS": "60",
            "VERIFIER_RESIDENT_PATIENCE": "5",
        }
        self.environment = environment(ours)

    def call(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(COMPETITION / name), "v1", "fuzz", "net.onnx", "prop.vnnlib", *arguments]
        return subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )

    def compared(self, query: Query, cold: str) -> Complaint | None:
        """What is wrong with the warm answer."""
        (self.place / "net.onnx").write_bytes(query.model)
        (self.place / "prop.vnnlib").write_text(query.text)
        self.call("prepare_instance.sh")
        began = time.monotonic()
        done = self.call("run_instance.sh", "results.txt", str(_LIMIT))
        seconds = time.monotonic() - began
        if seconds > _LIMIT + 3 * checks.LATE:
            return Complaint("late", f"a warm answer after {seconds:.1f} s, limit {_LIMIT:g} s")
        first, _, rest = (self.place / "results.txt").read_text().partition("\n")
        if first != cold:
            return Complaint("other verdict", f"warm says {first!r}, cold {cold!r}; {done.stderr.strip()[-300:]}")
        if first == "sat":
            why = checks.replays(query, rest)
            if why:
                return Complaint("bad witness", f"in the results file: {why}")
        return None

    def close(self) -> None:
        """End the resident worker."""
        command = [sys.executable, "-c", "import sys, pathlib; from verifier.runtime import warm_client; "
                   "warm_client.stop_server(pathlib.Path(sys.argv[1]))", str(self.folder)]  # fmt: skip
        subprocess.run(command, env=self.environment, capture_output=True, timeout=30, check=False)
