"""Is the deadline kept, and is the result file valid at every moment, also when the run is killed?

    python scripts/deadline_test.py SAMPLE [--timeout 10] [--count 40] [--kills 10] [--seed 0]

Calls ``vnncomp_scripts/run_instance.sh`` on hard instances of a VNN-COMP sample (unsolved ones first, then the slowest,
over all categories) and on two made here: a property file of more than 30 MB, and a network whose proof needs LPs at
leaves and cannot close. Wall time is taken around the script, process start included. Then runs are ended by SIGTERM or
SIGKILL at random moments. Exits 1 when a limit is passed, a result file is not valid, or a process is left behind.
"""

from __future__ import annotations

import csv
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.measure import COMPETITION, Query, environment, parser_of
from scripts.networks import OnnxWriter, save_box

RUN = COMPETITION / "run_instance.sh"
WORDS = ("sat", "unsat", "unknown", "timeout", "error")
MARK = "VERIFIER_DEADLINE_TEST"
START_SECONDS = 0.3  # a run killed before its shell could start has no file yet
END_SECONDS = 3.0  # within which everything that a killed run started must be gone


def hard_instances(sample: Path, count: int) -> list[Query]:
    """In turn from every category: those that nobody solved, then the slowest, then any."""
    with (sample / "verdicts.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_category: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    for group in by_category.values():
        group.sort(key=lambda r: (r["verdict"] != "unknown", -float(r["best_time"] or 0)))
    picked: list[Query] = []
    for depth in range(max(map(len, by_category.values()))):
        for category, group in by_category.items():
            if depth < len(group) and len(picked) < count:
                picked.append(Query(category, sample / group[depth]["onnx"], sample / group[depth]["vnnlib"]))
    return picked


def large_property(folder: Path, slivers: int = 90_000) -> Query:
    """y = |x - 0.3| never leaves [0, 0.8], asked for very many slivers of [0, 1]: more than 30 MB of text."""
    onnx_path = folder / "sliver.onnx"
    save_network(onnx_path, 1, 1)
    path = folder / "sliver.vnnlib"
    with path.open("w", encoding="utf-8") as file:
        file.write("(declare-const X_0 Real)\n(declare-const Y_0 Real)\n(assert (or\n")
        for i in range(slivers):
            low, high = i / slivers, (i + 1) / slivers
            bounds = f"(>= X_0 {low:.60f}) (<= X_0 {high:.60f})"
            file.write(f"    (and {bounds} (<= Y_0 -0.0001))\n    (and {bounds} (>= Y_0 0.8))\n")
        file.write("))\n")
    return Query("made", onnx_path, path)


def leaf_network(folder: Path, active: int = 6) -> Query:
    """y = sum |x_i - 0.3| over a few of 64 inputs and y <= -1e-9: false, but closer to true than rounding can tell."""
    onnx_path, path = folder / "leaf.onnx", folder / "leaf.vnnlib"
    save_network(onnx_path, 64, active)
    save_box(path, np.full(64, -1.0), np.full(64, 1.5), 1, -1e-9, "<=")
    return Query("made", onnx_path, path)


def save_network(path: Path, n_in: int, active: int) -> None:
    """y = sum over the first ``active`` inputs of |x_i - 0.3|."""
    weight = np.zeros((2 * active, n_in), dtype=np.float32)
    for i in range(active):
        weight[2 * i, i], weight[2 * i + 1, i] = 1.0, -1.0
    bias = np.tile(np.array([-0.3, 0.3], dtype=np.float32), active)
    writer = OnnxWriter((n_in,))
    hidden = writer.relu(writer.linear("X", weight, bias))
    writer.linear(hidden, np.ones((1, 2 * active), np.float32), np.zeros(1, np.float32))
    writer.save(path, 1)


def flaw(results: Path) -> str:
    """What is wrong with a result file; empty when it is valid."""
    try:
        text = results.read_text(encoding="utf-8")
    except FileNotFoundError:
        return "no result file"
    first, _, rest = text.partition("\n")
    if first not in WORDS:
        return f"first line is {first!r}"
    if first != "sat":
        return f"text after {first}" if rest.strip() else ""
    names = re.findall(r"\(([XY]_\d+) [-+0-9.eE]+\)", rest)
    n_in = sum(name.startswith("X") for name in names)
    wanted = [f"X_{i}" for i in range(n_in)] + [f"Y_{j}" for j in range(len(names) - n_in)]
    closed = re.fullmatch(r"\((?:\(\S+ \S+\)\s*)+\)", rest.strip())
    if not closed or names != wanted or not n_in or n_in == len(names):
        return "witness incomplete"
    return ""


def start(instance: Query, results: Path, timeout: float, mark: str) -> subprocess.Popen[bytes]:
    """The competition's call; everything it starts carries ``mark`` in its environment."""
    command = ["bash", str(RUN), "v1", instance.category, str(instance.onnx), str(instance.vnnlib), str(results)]
    log, variables = subprocess.DEVNULL, environment({MARK: mark})
    return subprocess.Popen([*command, f"{timeout:g}"], env=variables, stdout=log, stderr=log, start_new_session=True)


def left_behind(mark: str) -> list[int]:
    """Processes whose environment carries the mark (zombies have none)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_gone(mark: str) -> list[int]:
    """Processes still there after the grace time."""
    end = time.monotonic() + END_SECONDS
    while (pids := left_behind(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return pids


def timed(instance: Query, timeout: float, folder: Path) -> tuple[float, str, str]:
    """Wall seconds, verdict and flaw of one full run."""
    results, mark = folder / "results.txt", uuid.uuid4().hex
    results.unlink(missing_ok=True)
    begin = time.monotonic()
    process = start(instance, results, timeout, mark)
    code = process.wait()
    wall = time.monotonic() - begin
    problem = flaw(results)
    if code != 0:
        problem = problem or f"exit code {code}"
    if wall > timeout:
        problem = problem or "over the limit"
    if pids := wait_gone(mark):
        problem = problem or f"left processes {pids}"
    verdict = results.read_text(encoding="utf-8").partition("\n")[0] if results.exists() else "-"
    return wall, verdict, problem


def killed(instance: Query, timeout: float, after: float, number: signal.Signals, folder: Path) -> str:
    """Flaw of a run whose script gets a signal ``after`` seconds."""
    results, mark = folder / "results.txt", uuid.uuid4().hex
    results.unlink(missing_ok=True)
    process = start(instance, results, timeout, mark)
    end = time.monotonic() + after
    while time.monotonic() < end and process.poll() is None:
        if results.exists() and (problem := flaw(results)):
            return f"while running: {problem}"
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    problem = flaw(results)
    pids = wait_gone(mark)
    if problem == "no result file" and after < START_SECONDS:
        problem = ""
    return problem or flaw(results).replace("no result file", "") or (f"left processes {pids}" if pids else "")


def report(title: str, walls: Sequence[float], problems: Sequence[str]) -> None:
    longest = f", longest {max(walls):.2f} s" if walls else ""
    print(f"{title}: {len(problems)} problems{longest}")
    for problem in problems:
        print(f"  PROBLEM {problem}")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--count", type=int, default=40, help="instances, the two made here among them")
    parser.add_argument("--kills", type=int, default=10, help="runs to end by each of SIGTERM and SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.sample / "verdicts.csv").is_file():
        parser.error(f"{arguments.sample} has no verdicts.csv")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        instances = [large_property(folder), leaf_network(folder)]
        instances += hard_instances(arguments.sample.resolve(), max(0, arguments.count - 2))
        walls, problems = [], []
        for instance in instances[: arguments.count]:
            wall, verdict, problem = timed(instance, arguments.timeout, folder)
            walls.append(wall)
            print(f"{wall:6.2f} s  {verdict:8} {instance.title} {problem}", flush=True)
            problems += [f"{instance.title}: {problem}"] if problem else []
        report(f"{len(walls)} runs with a limit of {arguments.timeout:g} s", walls, problems)

        rng = random.Random(arguments.seed)
        kills: list[str] = []
        for number in (signal.SIGTERM, signal.SIGKILL):
            for _ in range(arguments.kills):
                instance, after = rng.choice(instances), rng.uniform(0.0, 0.9 * arguments.timeout)
                if problem := killed(instance, arguments.timeout, after, number, folder):
                    kills.append(f"{number.name} after {after:.2f} s, {instance.title}: {problem}")
        report(f"{2 * arguments.kills} runs ended by SIGTERM and SIGKILL", [], kills)
    return 1 if problems or kills else 0


if __name__ == "__main__":
    sys.exit(main())
