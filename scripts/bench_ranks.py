"""Verdicts of several ranks against those of one, on instances that one rank solves quickly.

    python scripts/bench_ranks.py SAMPLE [--count 60] [--ranks 2,3] [--out results/ranks] [--jobs N]
                                  [--categories acasxu,mnist_fc,oval21,sri_resnet_a] [--set KEY=VALUE ...]

SAMPLE is laid out as for ``bench_vnncomp.py``. One rank gets ``--first`` seconds per instance; of what it solves in
``--quick`` seconds ``--count`` instances are taken, evenly from all categories and verdicts. They are run again on P
ranks with ``--timeout`` seconds. Exits 1 on a verdict that contradicts another or the known one, on a run that
takes longer than its limit and 5 s, and when more than one instance of a P is left unsolved. Resumable.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_vnncomp import Selection, read_records, selected, truths

Row = Sequence[str]
Record = Mapping[str, Any]
SOLVED = ("sat", "unsat")


def run(rows: Sequence[Row], name: str, out: Path, timeout: float, jobs: int, settings: Sequence[str]) -> list[Record]:
    """Answer the rows with ``verifier run``; their records."""
    out.mkdir(parents=True, exist_ok=True)
    listed = out / f"{name}.csv"
    with listed.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    records = out / f"{name}.jsonl"
    command = [sys.executable, "-m", "verifier", "run", str(listed), "--out", str(records), "--resume"]
    command += ["--timeout", str(timeout), "--jobs", str(jobs)]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_records(records, rows)


def choose(groups: Mapping[Any, Sequence[Row]], count: int) -> list[Row]:
    """About equally many of every group, in turn, spread over its list."""
    spread = {
        key: [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
        for key, rows in groups.items()
    }
    chosen: list[Row] = []
    number = 0
    while len(chosen) < count and any(len(rows) > number for rows in spread.values()):
        chosen += [rows[number] for rows in spread.values() if len(rows) > number]
        number += 1
    return chosen[:count]


def problems(records: Sequence[Record], known: Mapping[tuple[str, str], str], timeout: float) -> list[str]:
    """Contradictions and late ends, one sentence each."""
    out = []
    for r in records:
        truth = known[r["onnx"]["path"], r["vnnlib"]["path"]]
        name = f"{Path(r['onnx']['path']).name} {Path(r['vnnlib']['path']).name}"
        if {r["verdict"], truth} == set(SOLVED):
            out.append(f"{name}: {r['verdict']}, but {truth} is known")
        if r["verdict"] == "error":
            out.append(f"{name}: error: {r['reason']}")
        if r["seconds"]["total"] > timeout + 5:
            out.append(f"{name}: took {r['seconds']['total']:.1f} s")
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--ranks", default="2,3")
    parser.add_argument("--categories", default="acasxu,mnist_fc,oval21,sri_resnet_a")
    parser.add_argument("--first", type=float, default=20.0)
    parser.add_argument("--quick", type=float, default=15.0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/ranks"))
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    settings = ["threads=1", *options.settings]
    known = dict(truths(options.sample))
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for selection in map(Selection.parse, options.categories.split(",")):
        rows = selected(options.sample, selection, None)
        found = run(rows, f"one-{selection.category}", options.out, options.first, options.jobs, settings)
        by_path = {(row[0], row[1]): row for row in rows}
        for record in found:
            if record["verdict"] in SOLVED and record["seconds"]["total"] <= options.quick:
                key = record["onnx"]["path"], record["vnnlib"]["path"]
                groups[selection.category, record["verdict"]].append(by_path[key])
                if known.setdefault(key, record["verdict"]) not in SOLVED:
                    known[key] = record["verdict"]
    chosen = choose(groups, options.count)
    print(
        f"{len(chosen)} instances: "
        + ", ".join(f"{len(r)} {c} {v}" for (c, v), r in groups.items())
        + " to choose from"
    )
    failed = False
    for ranks in options.ranks.split(","):
        with_ranks = [*settings, f"parallel.ranks={ranks}"]
        records = run(
            chosen, f"ranks-{ranks}", options.out, options.timeout, max(1, options.jobs // int(ranks)), with_ranks
        )
        unsolved = [r for r in records if r["verdict"] not in SOLVED]
        wrong = problems(records, known, options.timeout)
        failed |= bool(wrong) or len(unsolved) > 1 or len(records) < len(chosen)
        seconds = statistics.median(r["seconds"]["total"] for r in records)
        solved = f"{len(records) - len(unsolved)} of {len(chosen)} solved"
        print(f"{ranks} ranks: {solved}, median {seconds:.1f} s, {len(wrong)} problems")
        for text in [*wrong, *(f"unsolved: {json.dumps(r['vnnlib']['path'])} {r['reason']}" for r in unsolved)]:
            print(f"  {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
