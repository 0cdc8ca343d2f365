"""Wall time of the competition's scripts, prepared and cold, beside what a process start takes.

    python scripts/bench_instances.py [--rounds 5] [--onnx F --vnnlib F]
    python scripts/bench_instances.py SAMPLE [--categories acasxu] [--limit N] [--cold N] [--jobs 1] [--timeout 60]
                                      [--longest 5] [--over-start 0.5]

Without SAMPLE one trivial instance takes turns with the imports that it cannot do without (torch, onnx and onnxruntime,
with a context on the GPU when there is one), so that a busy machine slows all of them; medians are compared. The
resident worker is this run's own, and preparing it is not counted. Exits 1 when a median is above what is allowed, or
when the instance was not answered as it should.

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``) and perhaps a ``verdicts.csv``. For
every instance ``prepare_instance.sh`` is called, whose time is not counted, and then ``run_instance.sh``. ``--cold N``
also runs N of them, evenly spread, without a resident worker. After that some process starts are timed, which are the
imports above. ``--jobs`` works on several instances at a time, each with a resident worker of its own; times are then
no better than alone. An instance that was prepared but went without its resident worker ends the run. Exits 1 when a
verdict contradicts a known one, when an instance takes longer than ``--longest`` seconds, or when the median is more
than ``--over-start`` seconds above the median process start; both hold for prepared instances.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import measure
from scripts.measure import Failed, Known, Row, Selection

IMPORTS = "import torch, onnx, onnxruntime; torch.cuda.is_available() and torch.zeros(1, device='cuda')"
STOP = measure.verifier("vnncomp", "resident", "--stop")
COLD_FACTOR = 1.3
RESIDENT_SECONDS = 0.6
# A process start is timed once for so many instances.
_STARTS = 10


def resident(folder: Path | None) -> dict[str, str]:
    """Variables of a resident worker that lives in a folder; of none without one."""
    if folder is None:
        return {"VERIFIER_RESIDENT_SECONDS": "0"}
    return {"VERIFIER_RESIDENT_SECONDS": "60", "VERIFIER_RESIDENT_FOLDER": str(folder)}


def process_start(variables: Mapping[str, str]) -> float:
    """Seconds of importing what every query needs in a new process."""
    return measure.seconds([sys.executable, "-c", IMPORTS], variables, silent=False)


# ------------------------------------------------------------------------------------------------ one trivial instance


def take_turns(
    onnx: Path, vnnlib: Path, rounds: int, variables: Mapping[str, str] | None = None
) -> dict[str, list[float]]:
    """Seconds of every round by what was run; one more round goes first, so that files are in memory.

    Args:
        variables: of the environment, beside this process's own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = folder / "results.txt"
        cold = measure.environment({**(variables or {}), **resident(None)})
        warm = {**cold, **resident(folder / "resident")}
        prepare = [measure.COMPETITION / "prepare_instance.sh", "v1", "test", onnx, vnnlib]
        instance = [measure.COMPETITION / "run_instance.sh", "v1", "test", onnx, vnnlib, results, "60"]
        verify = measure.verifier("verify", "--onnx", onnx, "--vnnlib", vnnlib)
        found: dict[str, list[float]] = {"imports": [], "verify": [], "cold": [], "resident": []}
        answers: set[str] = set()
        try:
            for _ in range(rounds + 1):
                found["imports"].append(process_start(cold))
                found["verify"].append(measure.seconds(verify, cold))
                found["cold"].append(measure.seconds(instance, cold))
                answers.add(results.read_text().split()[0])
                measure.seconds(prepare, warm)
                found["resident"].append(measure.seconds(instance, warm))
                answers.add(results.read_text().split()[0])
        finally:
            measure.seconds(STOP, warm, silent=False)
        if len(answers) != 1 or not answers <= {"sat", "unsat"}:
            raise Failed(f"the instance was answered {', '.join(sorted(answers))}")
    return {name: values[1:] for name, values in found.items()}


def report(found: Mapping[str, Sequence[float]]) -> tuple[list[str], bool]:
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


def trivial(arguments: argparse.Namespace) -> bool:
    """Measure the trivial instance and show it; whether all is well."""
    onnx, vnnlib = arguments.onnx.absolute(), arguments.vnnlib.absolute()
    lines, allowed = report(take_turns(onnx, vnnlib, arguments.rounds))
    print(f"imports: {IMPORTS}\ninstance: {onnx.name} {vnnlib.name}\n" + "\n".join(lines))
    return allowed


# --------------------------------------------------------------------------------------------------- whole categories


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

    def variables(self, job: int | None) -> dict[str, str]:
        """The environment of a job, with a resident worker of its own; without one for None."""
        return measure.environment(resident(None if job is None else self.folder / f"resident{job}"))

    def run(self, category: str, onnx: str, vnnlib: str, job: int, prepared: bool) -> Timed:
        """Answer one instance."""
        variables = self.variables(job if prepared else None)
        results = self.folder / f"results{job}.txt"
        if prepared:
            _, said = measure.remarks(
                [measure.COMPETITION / "prepare_instance.sh", "v1", category, onnx, vnnlib], variables
            )
            if said:  # it always exits with 0
                raise Failed(f"{Path(onnx).name} {Path(vnnlib).name}: {said}")
        command = [measure.COMPETITION / "run_instance.sh", "v1", category, onnx, vnnlib, results, str(self.timeout)]
        spent, said = measure.remarks(command, variables)
        if prepared and "resident worker" in said:
            raise Failed(f"{Path(onnx).name} {Path(vnnlib).name}: {said}")
        return Timed(onnx, vnnlib, results.read_text(encoding="utf-8").split()[0], spent)

    def all(self, category: str, rows: Sequence[Row], jobs: int, prepared: bool) -> list[Timed]:
        """Every row, dealt to the jobs."""

        def part(job: int) -> list[Timed]:
            return [self.run(category, row[0], row[1], job, prepared) for row in rows[job::jobs]]

        with ThreadPoolExecutor(jobs) as pool:
            return [timed for some in pool.map(part, range(jobs)) for timed in some]

    def stop(self, jobs: int) -> None:
        """End the resident workers."""
        for job in range(jobs):
            measure.seconds(STOP, self.variables(job), silent=False)


def process_starts(count: int) -> list[float]:
    """Seconds of several process starts, after one that reads the files."""
    return [process_start(measure.environment()) for _ in range(count + 1)][1:]


def line(title: str, found: Sequence[Timed]) -> str:
    """A row of the table."""
    spent = [t.seconds for t in found]
    verdicts = Counter(t.verdict for t in found)
    counts = " ".join(f"{n} {word}" for word, n in sorted(verdicts.items()))
    longest = max(found, key=lambda t: t.seconds)
    most = f"{max(spent):.2f} ({longest.name})"
    return measure.table_row([title, len(found), f"{statistics.median(spent):.2f}", most, counts])


def categories(arguments: argparse.Namespace, chosen: Sequence[tuple[Selection, Sequence[Row]]]) -> bool:
    """Measure rows of categories and show them; whether all is well."""
    known = measure.truths(arguments.sample)
    problems: list[str] = []
    print("| | instances | median s | longest s | verdicts |\n|---|---:|---:|---:|---|")
    for selection, rows in chosen:
        found, start = measured(selection, rows, arguments)
        problems += wrong(found, known) + slow(found["prepared"], start, arguments.longest, arguments.over_start)
    for problem in problems:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return not problems


def measured(
    selection: Selection, rows: Sequence[Row], arguments: argparse.Namespace
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
            some = measure.selected(arguments.sample, selection, arguments.cold)
            found["cold"] = bench.all(selection.category, some, arguments.jobs, False)
            print(line(f"{selection.title} cold", found["cold"]), flush=True)
    starts = process_starts(max(3, len(rows) // _STARTS // arguments.jobs))
    start = statistics.median(starts)
    print(f"| process start | {len(starts)} | {start:.2f} | {max(starts):.2f} | |", flush=True)
    return found, start


def wrong(found: Mapping[str, Sequence[Timed]], known: Known) -> list[str]:
    """Verdicts that contradict known ones."""
    return [
        f"{t.name} {how}: {t.verdict}, known to be {truth}"
        for how, some in found.items()
        for t in some
        if measure.contradict(t.verdict, truth := known.get((t.onnx, t.vnnlib), "unknown"))
    ]


def slow(found: Sequence[Timed], start: float, longest: float, over: float) -> list[str]:
    """What takes longer than it should."""
    out = [f"{t.name} takes {t.seconds:.2f} s" for t in found if t.seconds > longest]
    median = statistics.median(t.seconds for t in found)
    if median > start + over:
        out.append(f"the median is {median:.2f} s, {median - start:.2f} s more than a process start")
    return out


def main(words: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__, sample=False)
    parser.add_argument("sample", type=Path, nargs="?", help="folder of category folders; a trivial instance without")
    parser.add_argument("--rounds", type=int, default=5, help="of the trivial instance")
    parser.add_argument("--onnx", type=Path, default=measure.EXAMPLES / "rings.onnx", help="of the trivial instance")
    parser.add_argument(
        "--vnnlib", type=Path, default=measure.EXAMPLES / "rings_small.vnnlib", help="of the trivial instance"
    )
    parser.add_argument("--categories", default="acasxu", help="comma-separated CATEGORY or CATEGORY:PART")
    parser.add_argument("--limit", type=int, help="at most so many instances per category")
    parser.add_argument("--cold", type=int, default=0, help="run so many also without a resident worker")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--longest", type=float, default=5.0)
    parser.add_argument("--over-start", type=float, default=0.5)
    arguments = parser.parse_args(words)
    chosen: list[tuple[Selection, list[list[str]]]] = []
    for selection in measure.selections(parser, arguments.sample, arguments.categories) if arguments.sample else []:
        rows = measure.selected(arguments.sample, selection, arguments.limit)
        if not rows:
            parser.error(f"no instance of {selection.category} has '{selection.part}' in its network's name")
        chosen.append((selection, rows))
    try:
        return 0 if (categories(arguments, chosen) if chosen else trivial(arguments)) else 1
    except Failed as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
