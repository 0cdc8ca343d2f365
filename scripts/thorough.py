"""Runs everything that tests the project, hours of it included, and prints one summary line per part.

    python scripts/thorough.py [--only tests,fuzz] [--skip image] [--minutes 60] [--list]

Every part is a command that any developer can run alone; ``--list`` shows them. Parts run one after the other, a
failure does not stop the rest, and all output of each goes to ``results/thorough/PART.log``. Exits 1 when a part
failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "results" / "thorough"


@dataclass(frozen=True)
class Part:
    """One command of the run.

    Attributes:
        purpose: what it tests, for ``--list``.
        environment: variables on top of the caller's.
    """

    name: str
    purpose: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(self.command)])


@dataclass(frozen=True)
class Outcome:
    """How a part ended; ``last`` is the last line that it printed."""

    name: str
    code: int
    seconds: float
    last: str

    def line(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        return f"{self.name:<10} {'ok' if self.code == 0 else 'FAILED':<7} {minutes:>4}:{seconds:02d}  {self.last}"


def parts(python: str, minutes: float, image: Path) -> list[Part]:
    """All parts, quick ones first.

    Args:
        minutes: of fuzzing.
        image: folder in which the container image's installation is tried.
    """
    pytest = [python, "-m", "pytest", "-q"]
    script = [python, "-u"]
    return [
        Part("lint", "ruff", ["make", "lint"]),
        Part("types", "type check", ["make", "types"]),
        Part("layers", "which folder may import which", ["make", "layers"]),
        Part("docs", "the site builds without a warning", ["make", "docs"]),
        Part(
            "tests",
            "all tests but those that measure time, with every case",
            [*pytest, "-n", "auto", "--thorough", "-m", "not timing and not thorough"],
        ),
        Part("timing", "tests that measure time, alone", [*pytest, "-m", "timing"]),
        Part("opsets", "every ONNX op at all its versions", [*pytest, "-n", "auto", "--thorough", "-m", "thorough"]),
        Part(
            "explore",
            "property-based tests with 1000 fresh examples each",
            [*pytest, "-n", "auto", "-m", "not timing", "--timeout", "3600", *hypothesis_tests()],
            {"HYPOTHESIS_PROFILE": "explore"},
        ),
        Part("mutants", "planted faults are noticed", [*script, "scripts/mutants.py", "--count", "40"]),
        Part("runs", "claims about float32 runs", [*script, "scripts/check_runs.py", "--count", "500"]),
        Part(
            "ranks",
            "many small queries on several ranks",
            [*script, "scripts/bench_ranks.py", "stress", "--count", "100"],
        ),
        Part("image", "the container image's installation", ["bash", "scripts/image.sh", "cuda", str(image)]),
        Part("fuzz", "random queries", [*script, "scripts/fuzz.py", "--minutes", f"{minutes:g}"]),
    ]


def hypothesis_tests() -> list[str]:
    """Test files that draw examples by hypothesis."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [file for file in files if "from hypothesis import" in file.read_text(encoding="utf-8")]
    return [file.relative_to(ROOT).as_posix() for file in found]


def run(part: Part, logs: Path = LOGS) -> Outcome:
    """Run a part to its end, its output in a file of its own."""
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{part.name}.log"
    begin = time.monotonic()
    with path.open("wb") as log:
        try:
            code = subprocess.run(
                part.command, cwd=ROOT, env={**os.environ, **part.environment}, stdout=log, stderr=log, check=False
            ).returncode
        except OSError as error:
            log.write(f"{error}\n".encode())
            code = 127
    return Outcome(part.name, code, time.monotonic() - begin, last_line(path))


def last_line(path: Path) -> str:
    """The last line of a log that is not empty, without pytest's rulers."""
    lines = [line.strip(" =") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def chosen(all_parts: Sequence[Part], only: Sequence[str], skip: Sequence[str]) -> Iterator[Part]:
    """The parts that are asked for.

    Raises:
        ValueError: naming a part that does not exist.
    """
    names = [part.name for part in all_parts]
    unknown = [name for name in (*only, *skip) if name not in names]
    if unknown:
        raise ValueError(f"no part '{', '.join(unknown)}'; there are {', '.join(names)}")
    return (part for part in all_parts if (not only or part.name in only) and part.name not in skip)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="PART,...", help="run these parts")
    parser.add_argument("--skip", default="", metavar="PART,...", help="leave these parts out")
    parser.add_argument("--minutes", type=float, default=60.0, help="of fuzzing (default 60)")
    parser.add_argument("--list", action="store_true", help="show the parts and their commands, run nothing")
    options = parser.parse_args(arguments)
    every = parts(sys.executable, options.minutes, ROOT / "results" / "thorough" / "image")
    try:
        wanted = list(chosen(every, *(list(filter(None, text.split(","))) for text in (options.only, options.skip))))
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for part in wanted:
            print(f"{part.name:<10} {part.purpose}\n           {part.shown()}")
        return 0
    outcomes = []
    for part in wanted:
        print(f"{part.name}: {part.purpose}", flush=True)
        outcomes.append(run(part))
        print(outcomes[-1].line(), flush=True)
    print(f"\nlogs in {LOGS}")
    for outcome in outcomes:
        print(outcome.line())
    return int(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
