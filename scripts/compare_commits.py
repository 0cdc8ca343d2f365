"""Two commits of this repository over VNN-COMP categories, in turns on the same machine: verdicts, times, claims.

    python scripts/compare_commits.py SAMPLE OLD [NEW] [--limit 4] [--timeout 30] [--categories acasxu,nn4sys]
                                      [--out results/compare] [--side-by-side] [--set KEY=VALUE ...]

SAMPLE is what ``bench_vnncomp.py`` takes. OLD is a commit, which is checked out in a temporary work tree; NEW is
another, or the files as they are here. ``NEW`` equal to ``OLD`` measures the spread of two runs of one commit. Each
instance is answered by ``verifier run`` of either tree, now one first and now the other; ``--side-by-side`` runs both
at once, each on cores of its own. One line of JSON per instance and tree goes to ``pairs.jsonl``; the same command goes
on where it stopped.

Exits 1 when a verdict contradicts a known one or the other tree's, or when NEW loses an instance that OLD decided in
less than ``--under`` seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.bench_vnncomp import Selection, selected, truths  # noqa: E402

DECIDED = ("sat", "unsat")


@dataclass(frozen=True)
class Tree:
    """One of the two: ``old`` or ``new``, its files, and the cores that its processes may use (None: all)."""

    name: str
    path: Path
    cores: frozenset[int] | None = None


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary work tree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", path, commit], check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", path], check=False)


def answer(tree: Tree, row: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """The record of one instance, answered by a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "instances.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        command = [sys.executable, "-m", "verifier", "run", "instances.csv", "--out", "records.jsonl", *options]
        if tree.cores is not None:
            command = ["taskset", "-c", ",".join(map(str, sorted(tree.cores))), *command]
        environment = {**os.environ, "PYTHONPATH": str(tree.path), "ORT_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        try:
            return json.loads((folder / "records.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        except (OSError, IndexError):
            return {"verdict": "error", "reason": done.stderr[-500:], "seconds": {"total": float("nan")}}


def short(record: dict[str, Any]) -> dict[str, Any]:
    """What the comparison needs of a record."""
    keys = ("verdict", "reason", "covers")
    return {**{key: record.get(key) for key in keys}, "seconds": record["seconds"]["total"]}


def both(trees: Sequence[Tree], row: Sequence[str], options: Sequence[str], turn: int) -> list[dict[str, Any]]:
    """Old and new, in this order; ``turn`` decides who runs first unless they have cores of their own."""
    if all(tree.cores for tree in trees):
        with ThreadPoolExecutor(len(trees)) as pool:
            return list(pool.map(lambda tree: short(answer(tree, row, options)), trees))
    order = (0, 1) if turn % 2 == 0 else (1, 0)
    found = {place: short(answer(trees[place], row, options)) for place in order}
    return [found[0], found[1]]


def report(pairs: Sequence[dict[str, Any]], known: dict[tuple[str, str], str], under: float) -> tuple[str, bool]:
    """The comparison in words, and whether nothing is wrong or lost."""
    lines, problems = [], []
    ratios, covered, proofs = [], 0, 0
    for pair in pairs:
        old, new = pair["old"], pair["new"]
        truth = known.get((pair["onnx"], pair["vnnlib"]), "unknown")
        name = f"{pair['category']}: {Path(pair['onnx']).name} {Path(pair['vnnlib']).name}"
        verdicts = {old["verdict"], new["verdict"], truth}
        if set(DECIDED) <= verdicts:
            problems.append(f"WRONG {name}: old {old['verdict']}, new {new['verdict']}, known {truth}")
        if old["verdict"] in DECIDED and new["verdict"] not in DECIDED:
            word = "LOST" if old["seconds"] < under else "late"
            problems.append(f"{word} {name}: old {old['verdict']} in {old['seconds']:.1f} s, new {new['verdict']}")
        if old["verdict"] == new["verdict"] and old["verdict"] in DECIDED:
            ratios.append(new["seconds"] / old["seconds"])
            if not 0.67 < ratios[-1] < 1.5 and max(new["seconds"], old["seconds"]) > 5:
                lines.append(f"{name}: {old['seconds']:.1f} -> {new['seconds']:.1f} s")
        if new["verdict"] == "unsat":
            proofs += 1
            covers = new["covers"] or {}
            covered += bool(covers.get("float32"))
            if not covers.get("float32"):
                shown = {key: covers.get(key) for key in ("reason", "margin", "error")}
                lines.append(f"only real: {name}: {shown}")
    counts = [sum(pair[tree]["verdict"] in DECIDED for pair in pairs) for tree in ("old", "new")]
    median = statistics.median(ratios) if ratios else float("nan")
    lines += problems
    lines.append(
        f"{len(pairs)} instances; decided: old {counts[0]}, new {counts[1]}; covers float32: {covered}/{proofs}"
    )
    lines.append(f"seconds, new / old, where both decide: median {median:.3f} of {len(ratios)}")
    return "\n".join(lines), not any(p.startswith(("WRONG", "LOST")) for p in problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="folder of category folders")
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="another; the files here when missing")
    parser.add_argument("--limit", type=int, help="at most so many instances per category")
    parser.add_argument("--timeout", default="30", help="cap on every instance's own limit, in seconds")
    parser.add_argument("--categories", help="comma-separated CATEGORY or CATEGORY:PART; default: every one")
    parser.add_argument("--out", type=Path, default=Path("results/compare"))
    parser.add_argument("--side-by-side", action="store_true", help="both at once, on one half of the cores each")
    parser.add_argument("--under", type=float, default=20.0, help="seconds; later decisions may get lost")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()

    names = arguments.categories or ",".join(sorted(p.parent.name for p in arguments.sample.glob("*/instances.csv")))
    options = ["--timeout", arguments.timeout]
    options += [part for setting in arguments.settings for part in ("--set", setting)]
    cores = sorted(os.sched_getaffinity(0))
    halves = (cores[: len(cores) // 2], cores[len(cores) // 2 :])
    if arguments.side_by_side and not halves[0]:
        parser.error("--side-by-side needs two cores")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "pairs.jsonl"
    pairs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    have = {(pair["onnx"], pair["vnnlib"]) for pair in pairs}
    with checked_out(arguments.old) as old, checked_out(arguments.new or "HEAD") as new:
        trees = [Tree("old", old), Tree("new", new if arguments.new else ROOT)]
        if arguments.side_by_side:
            trees = [Tree(t.name, t.path, frozenset(half)) for t, half in zip(trees, halves, strict=True)]
        for selection in map(Selection.parse, names.split(",")):
            for row in selected(arguments.sample, selection, arguments.limit):
                if (row[0], row[1]) in have:
                    continue
                left, right = both(trees, row, options, len(pairs))
                pair = {"category": selection.category, "onnx": row[0], "vnnlib": row[1], "old": left, "new": right}
                pairs.append(pair)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(pair) + "\n")
                seconds = f"{left['seconds']:.1f} {right['seconds']:.1f} s"
                print(
                    selection.category, Path(row[1]).name, left["verdict"], right["verdict"], seconds, file=sys.stderr
                )
    text, good = report(pairs, truths(arguments.sample), arguments.under)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
