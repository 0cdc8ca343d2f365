"""Two trees of this repository over the same fixed work, in turns: seconds a query, and whether the work was equal.

    python scripts/compare_speed.py OLD INSTANCES [--new TREE] [--device cuda] [--domains 20000] [--rounds 3]
                                    [--out results/speed.jsonl]

OLD is the folder of another checkout, INSTANCES a CSV file of ``onnx,vnnlib`` lines (a third column is not read).
Every round starts one process per tree, now the old one first and now the new one. It answers each query once to warm
up and then twice, without attacks and without a deadline, with a limit on domains: equal trees do equal work, so that
the ratio of the medians is the ratio of the code's speeds. With ``--new`` equal to OLD it is the spread of one tree.

Exits 1 when the trees bounded different numbers of domains or answered differently.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Only for this import: a process that measures takes the verifier from the tree that PYTHONPATH names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts import measure

del sys.path[0]

TIMED = 2

Line = Mapping[str, Any]


def timed(instances: Iterable[Sequence[str]], device: str, domains: int) -> Iterable[dict[str, Any]]:
    """In a process of one tree: what every timed query took and did."""
    from verifier.api import verify

    values = {"device": device, "attack.enabled": False, "bab.max_domains": domains, "seed": 0}
    for onnx, vnnlib, *_ in instances:
        for number in range(TIMED + 1):
            began = time.perf_counter()
            result = verify(onnx, vnnlib, values)
            seconds = time.perf_counter() - began
            counts = [part["domains"] for part in result.statistics.values() if "domains" in part]
            if number:
                work = {"verdict": str(result.verdict), "domains": sum(counts)}
                yield {"onnx": onnx, "vnnlib": vnnlib, "seconds": seconds, "phases": result.seconds, **work}


def one(tree: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a fresh process of a tree measures.

    Raises:
        measure.Failed: it did not end well.
    """
    words = [sys.executable, __file__, tree, arguments.instances, "--measure"]
    words += ["--device", arguments.device, "--domains", str(arguments.domains)]
    done = measure.call(words, measure.environment(tree=tree), cwd=tree)
    if done.code:
        raise measure.Failed(f"{tree}: {done.complaint}")
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


def compared(found: Mapping[str, Sequence[Line]]) -> tuple[str, bool]:
    """A table of medians and their ratios, and whether both trees did the same work."""
    same, ratios, rows = True, [], []
    for key in dict.fromkeys((line["onnx"], line["vnnlib"]) for line in found["old"]):
        own = {name: [x for x in lines if (x["onnx"], x["vnnlib"]) == key] for name, lines in found.items()}
        old, new = (statistics.median(x["seconds"] for x in own[name]) for name in ("old", "new"))
        before, after = ({(x["verdict"], x["domains"]) for x in own[name]} for name in ("old", "new"))
        same &= before == after
        ratios.append(new / old)
        work = ", ".join(f"{verdict} {count}" for verdict, count in sorted(before | after))
        rows.append([measure.name_of(*key), work, *(f"{value:.3f}" for value in (old, new, new / old))])
    text = measure.table(["query", "verdict and domains", "old, s", "new, s", "new/old"], rows)
    return f"{text}\n\nmedian of {len(ratios)} ratios: {statistics.median(ratios):.3f}", same


def main(words: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__, sample=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("instances", type=Path)
    parser.add_argument("--new", type=Path, default=measure.ROOT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--domains", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.instances = arguments.instances.resolve()
    if arguments.measure:
        with arguments.instances.open(newline="", encoding="utf-8") as file:
            for line in timed((row for row in csv.reader(file) if row), arguments.device, arguments.domains):
                print(json.dumps(line), flush=True)
        return 0
    trees = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    found: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    try:
        for number in range(arguments.rounds):
            for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
                lines = one(trees[name], arguments)
                found[name] += lines
                for line in lines if arguments.out else ():
                    measure.append_line(arguments.out, {"tree": name, **line})
    except measure.Failed as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    text, same = compared(found)
    print(text if same else f"{text}\nthe trees did different work")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
