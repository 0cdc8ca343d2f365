"""Wall time of instances through the competition's scripts: prepared, cold, and beside what a process start takes.

    python scripts/bench_instances.py SAMPLE [--categories acasxu] [--limit N] [--cold N] [--jobs 1] [--timeout 60]
                                      [--longest 5] [--over-start 0.5]

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``) and perhaps a ``verdicts.csv``. For
every instance ``prepare_instance.sh`` is called, whose time is not counted, and then ``run_instance.sh``. ``--cold N``
also runs N of them, evenly spread, without a resident worker. After that some process starts are timed: importing
torch, onnx and onnxruntime, with a context on the GPU when there is one. ``--jobs`` works on several instances at a
time, each with a resident worker of its own; times are then no better than alone. An instance that was prepared but
went without its resident worker ends the run.

Exits 1 when a verdict contradicts a known one, when an instance takes longer than ``--longest`` seconds, or when the
median is more than ``--over-start`` seconds above the median process start; both hold for prepared instances.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_vnncomp import Selection, selected, truths  # noqa: E402
from scripts.startup_bench import IMPORTS, SCRIPTS, Failed, environment, remarks, seconds  # noqa: E402

# A process start is timed once for so many instances.
_STARTS = 10


@dataclass(frozen=True)
class Timed:
    """One instance.

    Attributes:
        seconds: of ``run_instance.sh``.
    """

    onnx: str
    vnnlib: str
    verdict: str
    seconds: float

    @property
    def name(self) -> str:
        return f"{Path(self.onnx).stem} {Path(self.vnnlib).stem}"


class Bench:
    """Runs instances in folders of its own.

    Args:
        folder: where resident workers and results live.
        timeout: seconds that an instance is given.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder, timeout

    def resident(self, job: int) -> dict[str, str]:
        return {"VERIFIER_RESIDENT_SECONDS": "60", "VERIFIER_RESIDENT_FOLDER": str(self.folder / f"resident{job}")}

    def run(self, category: str, onnx: str, vnnlib: str, job: int, prepared: bool) -> Timed:
        """Answer one instance."""
        variables = environment(self.resident(job) if prepared else {"VERIFIER_RESIDENT_SECONDS": "0"})
        results = self.folder / f"results{job}.txt"
        if prepared:
            _, said = remarks([SCRIPTS / "prepare_instance.sh", "v1", category, onnx, vnnlib], variables)
            if said:  # it always exits with 0
                raise Failed(f"{Path(onnx).name} {Path(vnnlib).name}: {said}")
        command = [SCRIPTS / "run_instance.sh", "v1", category, onnx, vnnlib, results, str(self.timeout)]
        spent, said = remarks(command, variables)
        if prepared and "resident worker" in said:
            raise Failed(f"{Path(onnx).name} {Path(vnnlib).name}: {said}")
        return Timed(onnx, vnnlib, results.read_text(encoding="utf-8").split()[0], spent)

    def all(self, category: str, rows: Sequence[Sequence[str]], jobs: int, prepared: bool) -> list[Timed]:
        """Every row, dealt to the jobs."""

        def part(job: int) -> list[Timed]:
            return [self.run(category, row[0], row[1], job, prepared) for row in rows[job::jobs]]

        with ThreadPoolExecutor(jobs) as pool:
            return [timed for some in pool.map(part, range(jobs)) for timed in some]

    def stop(self, jobs: int) -> None:
        """End the resident workers."""
        for job in range(jobs):
            command = [sys.executable, "-m", "verifier", "vnncomp", "resident", "--stop"]
            seconds(command, environment(self.resident(job)), silent=False)


def process_starts(count: int) -> list[float]:
    """Seconds of importing what every query needs, each in a new process, after one that reads the files."""
    return [seconds([sys.executable, "-c", IMPORTS], environment({}), silent=False) for _ in range(count + 1)][1:]


def line(title: str, found: Sequence[Timed]) -> str:
    """A row of the table."""
    spent = [t.seconds for t in found]
    verdicts = Counter(t.verdict for t in found)
    counts = " ".join(f"{n} {word}" for word, n in sorted(verdicts.items()))
    longest = max(found, key=lambda t: t.seconds)
    return f"| {title} | {len(found)} | {statistics.median(spent):.2f} | {max(spent):.2f} ({longest.name}) | {counts} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--categories", default="acasxu", help="comma-separated CATEGORY or CATEGORY:PART")
    parser.add_argument("--limit", type=int, help="at most so many instances per category")
    parser.add_argument("--cold", type=int, default=0, help="run so many also without a resident worker")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--longest", type=float, default=5.0)
    parser.add_argument("--over-start", type=float, default=0.5)
    arguments = parser.parse_args()
    known = truths(arguments.sample)
    problems: list[str] = []
    chosen: list[tuple[Selection, list[list[str]]]] = []
    for selection in map(Selection.parse, arguments.categories.split(",")):
        if not (arguments.sample / selection.category / "instances.csv").is_file():
            parser.error(f"{arguments.sample / selection.category} has no instances.csv")
        rows = selected(arguments.sample, selection, arguments.limit)
        if not rows:
            parser.error(f"no instance of {selection.category} has '{selection.part}' in its network's name")
        chosen.append((selection, rows))
    print("| | instances | median s | longest s | verdicts |\n|---|---:|---:|---:|---|")
    try:
        for selection, rows in chosen:
            found, start = measured(selection, rows, arguments)
            problems += wrong(found, known) + slow(found["prepared"], start, arguments.longest, arguments.over_start)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return 1 if problems else 0


def measured(
    selection: Selection, rows: Sequence[Sequence[str]], arguments: argparse.Namespace
) -> tuple[dict[str, list[Timed]], float]:
    """Instances by how they were run, and the median process start; a row is printed for each."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.timeout)
        try:
            found = {"prepared": bench.all(selection.category, rows, arguments.jobs, True)}
        finally:  # what is prepared for the next instance would disturb what follows
            bench.stop(arguments.jobs)
        print(line(f"{selection.title} prepared", found["prepared"]), flush=True)
        if arguments.cold:
            some = selected(arguments.sample, selection, arguments.cold)
            found["cold"] = bench.all(selection.category, some, arguments.jobs, False)
            print(line(f"{selection.title} cold", found["cold"]), flush=True)
    starts = process_starts(max(3, len(rows) // _STARTS // arguments.jobs))
    start = statistics.median(starts)
    print(f"| process start | {len(starts)} | {start:.2f} | {max(starts):.2f} | |", flush=True)
    return found, start


def wrong(found: dict[str, list[Timed]], known: dict[tuple[str, str], str]) -> list[str]:
    """Verdicts that contradict known ones."""
    return [
        f"{t.name} {how}: {t.verdict}, known to be {truth}"
        for how, some in found.items()
        for t in some
        if {t.verdict, truth := known.get((t.onnx, t.vnnlib), "unknown")} == {"sat", "unsat"}
    ]


def slow(found: Sequence[Timed], start: float, longest: float, over: float) -> list[str]:
    """What takes longer than it should."""
    out = [f"{t.name} takes {t.seconds:.2f} s" for t in found if t.seconds > longest]
    median = statistics.median(t.seconds for t in found)
    if median > start + over:
        out.append(f"the median is {median:.2f} s, {median - start:.2f} s more than a process start")
    return out


if __name__ == "__main__":
    sys.exit(main())
