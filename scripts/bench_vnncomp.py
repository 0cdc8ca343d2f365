"""Runs the verifier over VNN-COMP categories: the table of verdicts, or this commit against another one.

    python scripts/bench_vnncomp.py SAMPLE [--out results/bench] [--timeout 60] [--categories acasxu,nn4sys:lindex]
                                    [--limit N] [--jobs N] [--set KEY=VALUE ...]
    python scripts/bench_vnncomp.py SAMPLE --against OLD [--commit NEW] [--side-by-side] [--under 20]
                                    [--out results/compare] [--timeout 30] [--categories ...] [--limit 4] [--set ...]

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``) and, for the column ``wrong``, a
``verdicts.csv`` (category, onnx, vnnlib, verdict). Every instance is answered by ``verifier run``, every counterexample
is then judged by ``verifier check``. Running the same command again goes on where it stopped. Exits 1 when a verdict
contradicts a known one or a counterexample is rejected.

With ``--against`` two trees answer in turns on the same machine: OLD, a commit, which is checked out in a temporary
work tree, and NEW, another one, or the files as they are here. NEW equal to OLD measures the spread of two runs of one
commit. Now one is first and now the other; ``--side-by-side`` runs both at once, each on cores of its own. One line of
JSON per instance goes to ``pairs.jsonl``. Exits 1 when a verdict contradicts a known one or the other tree's, or when
NEW loses an instance that OLD decided in less than ``--under`` seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import measure
from scripts.measure import Known, Record, Row

# CATEGORY or CATEGORY:PART, where PART must occur in the network's file name.
DEFAULT = (
    "acasxu,rl_benchmarks,reach_prob_density,collins_rul_cnn,tllverifybench,mnist_fc,sri_resnet_a,"
    "metaroom_2023,nn4sys:lindex,dist_shift_2023,oval21"
)
VERDICTS = ("sat", "unsat", "unknown", "timeout", "error")
SUMS = ("instances", "solved", *VERDICTS, "wrong", "bad witness", "s")
COLUMNS = ("category", *SUMS, "median s", "longest s")


# ------------------------------------------------------------------------------------------------ the table of verdicts


def check_witness(record: Record) -> str:
    """``valid``, ``tolerance`` or ``invalid: ...`` for the counterexample of a ``sat`` record."""
    witness = record["witness"]
    if witness is None:
        return "invalid: no witness"
    values = [f"(X_{i} {x!r})" for i, x in enumerate(witness["inputs"])]
    values += [f"(Y_{j} {y!r})" for j, y in enumerate(witness["outputs"])]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("sat\n(" + "\n ".join(values) + ")\n")
        file.flush()
        onnx, vnnlib = measure.key_of(record)
        words = measure.verifier("check", "--onnx", onnx, "--vnnlib", vnnlib, "--results-file", file.name)
        done = measure.call(words, measure.environment())
    return done.out.strip() or f"invalid: verifier check failed: {done.err.strip()}"


def summary(title: str, records: Sequence[Record], known: Known) -> dict[str, Any]:
    """One row of the table; ``problems`` lists every wrong verdict and rejected witness in words."""
    counts = {word: sum(r["verdict"] == word for r in records) for word in VERDICTS}
    wrong, bad = [], []
    for r in records:
        name = f"{title}: {measure.name_of(*measure.key_of(r))}"
        truth = known.get(measure.key_of(r), "unknown")
        if measure.contradict(r["verdict"], truth):
            wrong.append(f"{name}: {r['verdict']}, known to be {truth}")
        if r["verdict"] == "sat" and (judgement := check_witness(r)) != "valid":
            bad.append(f"{name}: witness {judgement}")
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


def markdown(rows: Iterable[Record], known: bool) -> str:
    """The table, with a line of sums."""
    rows = list(rows)
    total: dict[str, Any] = {"category": "all", **{c: sum(r[c] for r in rows) for c in SUMS}, "median s": ""}
    total["longest s"] = max((r["longest s"] for r in rows), default=0)
    lines = [["?" if c == "wrong" and not known else str(row[c]) for c in COLUMNS] for row in [*rows, total]]
    return measure.table(COLUMNS, lines)


def verdicts(arguments: argparse.Namespace, chosen: Mapping[str, Sequence[Row]], options: Sequence[str]) -> bool:
    """Answer everything and write the table; whether nothing is wrong."""
    known = measure.truths(arguments.sample)
    options = [*options, "--jobs", arguments.jobs]
    rows: list[dict[str, Any]] = []
    for title, some in chosen.items():
        category = title.partition(" ")[0]
        listed, records = arguments.out / "lists" / category / "instances.csv", arguments.out / f"{category}.jsonl"
        rows.append(summary(title, measure.answered(some, listed, records, options), known))
        print(f"{title}: {rows[-1]['solved']} of {rows[-1]['instances']} solved", file=sys.stderr)
        for problem in rows[-1]["problems"]:
            print(f"PROBLEM {problem}", file=sys.stderr)
    text = markdown(rows, bool(known))
    (arguments.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return not any(row["problems"] for row in rows)


# ------------------------------------------------------------------------------------------------ two commits in turns


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
        subprocess.run(["git", "-C", measure.ROOT, "worktree", "add", "--detach", path, commit], check=True)
        try:
            yield path
        finally:
            subprocess.run(["git", "-C", measure.ROOT, "worktree", "remove", "--force", path], check=False)


def answer(tree: Tree, row: Row, options: Sequence[str]) -> dict[str, Any]:
    """What the comparison needs of one instance's record, answered by a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure.write_rows(folder / "instances.csv", [row])
        command = measure.verifier("run", "instances.csv", "--out", "records.jsonl", *options)
        if tree.cores is not None:
            command = ["taskset", "-c", ",".join(map(str, sorted(tree.cores))), *command]
        done = measure.call(command, {**measure.environment(tree=tree.path), "PYTHONPATH": str(tree.path)}, cwd=folder)
        records = measure.read_lines(folder / "records.jsonl")
    if not records:
        return {"verdict": "error", "reason": done.err[-500:], "covers": None, "seconds": float("nan")}
    keys = ("verdict", "reason", "covers")
    return {**{key: records[-1].get(key) for key in keys}, "seconds": records[-1]["seconds"]["total"]}


def both(trees: Sequence[Tree], row: Row, options: Sequence[str], turn: int) -> list[dict[str, Any]]:
    """Old and new, in this order; ``turn`` decides who runs first unless they have cores of their own."""
    if all(tree.cores for tree in trees):
        with ThreadPoolExecutor(len(trees)) as pool:
            return list(pool.map(lambda tree: answer(tree, row, options), trees))
    order = (0, 1) if turn % 2 == 0 else (1, 0)
    found = {place: answer(trees[place], row, options) for place in order}
    return [found[0], found[1]]


def comparison(pairs: Sequence[Record], known: Known, under: float) -> tuple[str, bool]:
    """The comparison in words, and whether nothing is wrong or lost."""
    lines, problems = [], []
    ratios, covered, proofs = [], 0, 0
    for pair in pairs:
        old, new = pair["old"], pair["new"]
        truth = known.get((pair["onnx"], pair["vnnlib"]), "unknown")
        name = f"{pair['category']}: {measure.name_of(pair['onnx'], pair['vnnlib'])}"
        if measure.contradict(old["verdict"], new["verdict"], truth):
            problems.append(f"WRONG {name}: old {old['verdict']}, new {new['verdict']}, known {truth}")
        if old["verdict"] in measure.SOLVED and new["verdict"] not in measure.SOLVED:
            word = "LOST" if old["seconds"] < under else "late"
            problems.append(f"{word} {name}: old {old['verdict']} in {old['seconds']:.1f} s, new {new['verdict']}")
        if old["verdict"] == new["verdict"] and old["verdict"] in measure.SOLVED:
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
    counts = [sum(pair[tree]["verdict"] in measure.SOLVED for pair in pairs) for tree in ("old", "new")]
    median = statistics.median(ratios) if ratios else float("nan")
    lines += problems
    lines.append(
        f"{len(pairs)} instances; decided: old {counts[0]}, new {counts[1]}; covers float32: {covered}/{proofs}"
    )
    lines.append(f"seconds, new / old, where both decide: median {median:.3f} of {len(ratios)}")
    return "\n".join(lines), not any(p.startswith(("WRONG", "LOST")) for p in problems)


def compare(
    arguments: argparse.Namespace,
    chosen: Mapping[str, Sequence[Row]],
    options: Sequence[str],
    halves: Sequence[frozenset[int] | None],
) -> bool:
    """Answer everything with both trees and say how they differ; whether nothing is wrong or lost.

    Args:
        halves: the cores of either tree.
    """
    path = arguments.out / "pairs.jsonl"
    pairs = measure.read_lines(path)
    have = {(pair["onnx"], pair["vnnlib"]) for pair in pairs}
    with checked_out(arguments.against) as old, checked_out(arguments.commit or "HEAD") as new:
        places = {"old": old, "new": new if arguments.commit else measure.ROOT}
        trees = [Tree(name, place, half) for (name, place), half in zip(places.items(), halves, strict=True)]
        for title, rows in chosen.items():
            for row in (row for row in rows if (row[0], row[1]) not in have):
                left, right = both(trees, row, options, len(pairs))
                category = title.partition(" ")[0]
                pairs.append({"category": category, "onnx": row[0], "vnnlib": row[1], "old": left, "new": right})
                measure.append_line(path, pairs[-1])
                seconds = f"{left['seconds']:.1f} {right['seconds']:.1f} s"
                print(category, Path(row[1]).name, left["verdict"], right["verdict"], seconds, file=sys.stderr)
    text, good = comparison(pairs, measure.truths(arguments.sample), arguments.under)
    print(text)
    return good


# --------------------------------------------------------------------------------------------------------------- main


def main(words: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__)
    parser.add_argument("--out", type=Path, help="records and table go here; default: results/bench, results/compare")
    parser.add_argument("--timeout", help="cap on every instance's own limit, in seconds; default: 60, against OLD 30")
    parser.add_argument(
        "--categories", help=f"comma-separated CATEGORY or CATEGORY:PART; default: {DEFAULT}; against OLD every one"
    )
    parser.add_argument("--limit", type=int, help="at most so many instances per category")
    measure.add_settings(parser)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--jobs", default="1", help="instances at a time; with more than one add --set threads=1")
    parser.add_argument("--against", metavar="OLD", help="a commit to compare with")
    parser.add_argument("--commit", metavar="NEW", help="another commit; the files here when missing")
    parser.add_argument("--side-by-side", action="store_true", help="both at once, on one half of the cores each")
    parser.add_argument("--under", type=float, default=20.0, help="seconds; later decisions may get lost")
    arguments = parser.parse_args(words)

    every = ",".join(sorted(p.parent.name for p in arguments.sample.glob("*/instances.csv")))
    out, timeout, names = ("results/compare", "30", every) if arguments.against else ("results/bench", "60", DEFAULT)
    arguments.out = arguments.out or Path(out)
    options = ["--timeout", arguments.timeout or timeout, *(w for s in arguments.settings for w in ("--set", s))]
    options += ["--config", str(arguments.config.absolute())] if arguments.config else []
    found = measure.selections(parser, arguments.sample, arguments.categories or names)
    chosen = {s.title: measure.selected(arguments.sample, s, arguments.limit) for s in found}
    if not arguments.against:
        return 0 if verdicts(arguments, chosen, options) else 1
    if arguments.jobs != "1":
        parser.error("--against answers one instance at a time; leave out --jobs")
    halves: list[frozenset[int] | None] = [None, None]
    if arguments.side_by_side:
        cores = sorted(os.sched_getaffinity(0))
        halves = [frozenset(cores[: len(cores) // 2]), frozenset(cores[len(cores) // 2 :])]
        if not halves[0]:
            parser.error("--side-by-side needs two cores")
    return 0 if compare(arguments, chosen, options, halves) else 1


if __name__ == "__main__":
    sys.exit(main())
