"""Tries to catch the verifier with a wrong answer, for as long as it is given.

    python scripts/fuzz.py [--minutes 10] [--seed 0] [--device cpu] [--jobs 2] [--only search,numerics] [--tests DIR]

Random networks over all ops, boxes, properties near the least value that a search of its own finds, under all settings
that choose a path; single nodes against onnxruntime; properties in odd spellings against an evaluator in rationals;
broken files; several ranks; magnitudes from the smallest numbers to the largest; a resident worker with many queries;
parts by themselves.

Wrong is: an `unsat` with a point that violates in exact arithmetic (or in onnxruntime, where the record covers
float32), a `sat` whose printed witness does not replay, a bound that a real value leaves, a crash, an answer later
than the limit and a second. What is found is made small and written as a test into DIR. Every case depends on the
seed and its number alone, up to time limits. Exits 1 when something was found.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.fuzzing.runner import KINDS, Tally, fuzz  # noqa: E402


def kinds_of(text: str) -> list[str]:
    """The kinds in a list with commas."""
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"no kind '{', '.join(unknown)}'; there are {', '.join(KINDS)}")
    return names


def write(tally: Tally, seed: int, folder: Path) -> list[Path]:
    """One file per finding."""
    paths = []
    for n, found in enumerate(tally.findings):
        if found["test"]:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"test_{found['kind']}_{seed}_{found['index']}_{n}.py"
            paths.append(folder / name)
            paths[-1].write_text(found["test"], encoding="utf-8")
    return paths


def report(tally: Tally, seconds: float) -> str:
    """Cases by kind and findings by sort."""
    lines = [
        f"{kind:10} {tally.cases[kind]:7} cases {tally.seconds[kind]:8.0f} s" for kind in KINDS if tally.cases[kind]
    ]
    lines.append(f"{'total':10} {sum(tally.cases.values()):7} cases in {seconds:.0f} s; {len(tally.findings)} findings")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", type=kinds_of, default=list(KINDS), help=f"some of {','.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--tests", type=Path, default=ROOT / "fuzzed", help="folder for what is found")
    parser.add_argument("--ignore", default="", help="a pattern of findings that are known")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    tally = fuzz(
        options.only,
        options.seed,
        options.minutes,
        options.device,
        max(1, options.jobs),
        options.ignore,
        lambda line: print(line, flush=True),
    )
    for path in write(tally, options.seed, options.tests):
        print(f"written: {path}")
    print(report(tally, time.monotonic() - began))
    return 1 if tally.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
