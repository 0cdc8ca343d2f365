"""Runs the verifier over VNN-COMP categories and writes the table of verdicts.

    python scripts/bench_vnncomp.py SAMPLE [--out results/bench] [--timeout 60] [--categories acasxu,nn4sys:lindex]
                                    [--limit N] [--jobs N] [--set KEY=VALUE ...]

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``) and, for the column ``wrong``, a
``verdicts.csv`` (category, onnx, vnnlib, verdict). Every instance is answered by ``verifier run``, every counterexample
is then judged by ``verifier check``. Running the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# CATEGORY or CATEGORY:PART, where PART must occur in the network's file name.
DEFAULT = (
    "acasxu,rl_benchmarks,reach_prob_density,collins_rul_cnn,tllverifybench,mnist_fc,sri_resnet_a,"
    "metaroom_2023,nn4sys:lindex,dist_shift_2023,oval21"
)
VERDICTS = ("sat", "unsat", "unknown", "timeout", "error")
SUMS = ("instances", "solved", *VERDICTS, "wrong", "bad witness", "s")
COLUMNS = ("category", *SUMS, "median s", "longest s")


@dataclass(frozen=True)
class Selection:
    """Which instances of a category run."""

    category: str
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> Selection:
        category, _, part = text.strip().partition(":")
        return cls(category, part)

    @property
    def title(self) -> str:
        return f"{self.category} {self.part}".strip()


def selected(sample: Path, selection: Selection, limit: int | None) -> list[list[str]]:
    """Rows (onnx, vnnlib, timeout) with absolute paths; with ``limit`` evenly spread over the list."""
    folder = sample / selection.category
    with (folder / "instances.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and selection.part in Path(row[0]).name]
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [[str((folder / r[0]).resolve()), str((folder / r[1]).resolve()), r[2]] for r in rows]


def truths(sample: Path) -> dict[tuple[str, str], str]:
    """Known verdicts by absolute paths; empty without a ``verdicts.csv``."""
    path = sample / "verdicts.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (str((sample / row["onnx"]).resolve()), str((sample / row["vnnlib"]).resolve())): row["verdict"]
            for row in csv.DictReader(file)
        }


def run_category(rows: Sequence[Sequence[str]], category: str, out: Path, options: Sequence[str]) -> Path:
    """Answer the rows with ``verifier run``; the file of records."""
    lists = out / "lists" / category
    lists.mkdir(parents=True, exist_ok=True)
    with (lists / "instances.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    records = out / f"{category}.jsonl"
    command = [sys.executable, "-m", "verifier", "run", str(lists / "instances.csv"), "--out", str(records), "--resume"]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
    return records


def read_records(path: Path, rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The newest record of each of these rows."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    newest = {(r["onnx"]["path"], r["vnnlib"]["path"]): r for r in records}
    return [newest[row[0], row[1]] for row in rows if (row[0], row[1]) in newest]


def check_witness(record: Mapping[str, Any]) -> str:
    """``valid``, ``tolerance`` or ``invalid: ...`` for the counterexample of a ``sat`` record."""
    witness = record["witness"]
    if witness is None:
        return "invalid: no witness"
    values = [f"(X_{i} {x!r})" for i, x in enumerate(witness["inputs"])]
    values += [f"(Y_{j} {y!r})" for j, y in enumerate(witness["outputs"])]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("sat\n(" + "\n ".join(values) + ")\n")
        file.flush()
        command = [sys.executable, "-m", "verifier", "check", "--onnx", record["onnx"]["path"]]
        command += ["--vnnlib", record["vnnlib"]["path"], "--results-file", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or f"invalid: verifier check failed: {done.stderr.strip()}"


def summary(title: str, records: Sequence[Mapping[str, Any]], known: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """One row of the table; ``problems`` lists every wrong verdict and rejected witness in words."""
    counts = {word: sum(r["verdict"] == word for r in records) for word in VERDICTS}
    wrong, bad = [], []
    for r in records:
        name = f"{Path(r['onnx']['path']).name} {Path(r['vnnlib']['path']).name}"
        truth = known.get((r["onnx"]["path"], r["vnnlib"]["path"]), "unknown")
        if {r["verdict"], truth} == {"sat", "unsat"}:
            wrong.append(f"{title}: {name}: {r['verdict']}, known to be {truth}")
        if r["verdict"] == "sat" and (judgement := check_witness(r)) != "valid":
            bad.append(f"{title}: {name}: witness {judgement}")
    seconds = [r["seconds"]["total"] for r in records] or [0.0]
    return {
        "category": title,
        "instances": len(records),
        "solved": counts["sat"] + counts["unsat"],
        **counts,
        "wrong": len(wrong),
        "bad witness": len(bad),
        "s": round(sum(seconds)),
        "median s": round(statistics.median(seconds), 2),
        "longest s": round(max(seconds), 2),
        "problems": wrong + bad,
    }


def markdown(rows: Iterable[Mapping[str, Any]], known: bool) -> str:
    """The table, with a line of sums."""
    rows = list(rows)
    total: dict[str, Any] = {"category": "all", **{c: sum(r[c] for r in rows) for c in SUMS}, "median s": ""}
    total["longest s"] = max((r["longest s"] for r in rows), default=0)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for row in [*rows, total]:
        cells = ["?" if c == "wrong" and not known else str(row[c]) for c in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="folder of category folders")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="records and table go here")
    parser.add_argument("--timeout", default="60", help="cap on every instance's own limit, in seconds")
    parser.add_argument("--categories", default=DEFAULT, help="comma-separated CATEGORY or CATEGORY:PART")
    parser.add_argument("--limit", type=int, help="at most so many instances per category")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", default="1", help="instances at a time; with more than one add --set threads=1")
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args()

    options = ["--timeout", arguments.timeout, "--jobs", arguments.jobs]
    options += [part for setting in arguments.settings for part in ("--set", setting)]
    options += ["--config", str(arguments.config)] if arguments.config else []
    known = truths(arguments.sample)
    table: list[dict[str, Any]] = []
    for selection in map(Selection.parse, arguments.categories.split(",")):
        if not (arguments.sample / selection.category / "instances.csv").is_file():
            parser.error(f"{arguments.sample / selection.category} has no instances.csv")
        rows = selected(arguments.sample, selection, arguments.limit)
        records = run_category(rows, selection.category, arguments.out, options)
        table.append(summary(selection.title, read_records(records, rows), known))
        print(f"{selection.title}: {table[-1]['solved']} of {table[-1]['instances']} solved", file=sys.stderr)
        for problem in table[-1]["problems"]:
            print(f"PROBLEM {problem}", file=sys.stderr)
    text = markdown(table, bool(known))
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(row["problems"] for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
