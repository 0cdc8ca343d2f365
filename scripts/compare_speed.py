"""Two trees of this repository over the same fixed work, in turns: seconds a query, and whether the work was equal.

    python scripts/compare_speed.py OLD INSTANCES [--new TREE] [--device cuda] [--domains 20000] [--rounds 3]
                                    [--timeout 60] [--phase "root bounds"] [--busy] [--set KEY=VALUE ...]
                                    [--out results/speed.jsonl]

OLD is the folder of another checkout, INSTANCES a CSV file of ``onnx,vnnlib`` lines (a third column is not read).
Every round starts one process per tree, now the old one first and now the new one. It answers each query once to warm
up and then twice, without attacks and without a deadline, with a limit on domains: equal trees do equal work, so that
the ratio of the medians is the ratio of the code's speeds. With ``--new`` equal to OLD it is the spread of one tree.

Exits 1 when the trees answered differently or, without ``--timeout``, bounded different numbers of domains.
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
from scripts.performance.busy import kernel_share

del sys.path[0]

TIMED = 2

Line = Mapping[str, Any]


def timed(instances: Iterable[Sequence[str]], arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """In a process of one tree: what every timed query took and did."""
    from verifier.api import verify

    values: dict[str, Any] = {"device": arguments.device, "attack.enabled": False, "seed": 0}
    values |= {} if arguments.timeout else {"bab.max_domains": arguments.domains}
    values |= dict(word.split("=", 1) for word in arguments.set)
    limits = {"timeout": arguments.timeout} if arguments.timeout else {}
    for onnx, vnnlib, *_ in instances:
        for number in range(TIMED + 1):
            began = time.perf_counter()
            result = verify(onnx, vnnlib, values, **limits)
            seconds = time.perf_counter() - began
            counts = [part["domains"] for part in result.statistics.values() if "domains" in part]
            if number:
                work = {"verdict": str(result.verdict), "domains": sum(counts)}
                yield {"onnx": onnx, "vnnlib": vnnlib, "seconds": seconds, "phases": result.seconds, **work}
        if arguments.busy:
            share = kernel_share(lambda o=onnx, v=vnnlib: verify(o, v, values, **limits))
            yield {"onnx": onnx, "vnnlib": vnnlib, "busy": share}


def one(tree: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a fresh process of a tree measures.

    Raises:
        measure.Failed: it did not end well.
    """
    words = [sys.executable, __file__, tree, arguments.instances, "--measure"]
    words += ["--device", arguments.device, "--domains", str(arguments.domains)]
    words += ["--timeout", str(arguments.timeout)] if arguments.timeout else []
    words += ["--busy"] if arguments.busy else []
    words += [word for setting in arguments.set for word in ("--set", setting)]
    done = measure.call(words, measure.environment(tree=tree), cwd=tree)
    if done.code:
        raise measure.Failed(f"{tree}: {done.complaint}")
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


def compared(found: Mapping[str, Sequence[Line]], phase: str | None, counted: bool) -> tuple[str, bool]:
    """A table of medians and their ratios, and whether both trees did the same work.

    Args:
        phase: whose seconds are compared; None: the whole query's.
        counted: equal work means equal numbers of domains, not only equal verdicts.
    """
    same, ratios, rows = True, [], []
    busy = any("busy" in line for line in found["new"])
    for key in dict.fromkeys((line["onnx"], line["vnnlib"]) for line in found["old"]):
        own = {name: [x for x in lines if (x["onnx"], x["vnnlib"]) == key] for name, lines in found.items()}
        queries = {name: [x for x in lines if "seconds" in x] for name, lines in own.items()}
        seconds = {
            n: [x["seconds"] if phase is None else x["phases"].get(phase, 0.0) for x in q] for n, q in queries.items()
        }
        old, new = (statistics.median(seconds[name]) for name in ("old", "new"))
        before, after = ({(x["verdict"], x["domains"]) for x in queries[name]} for name in ("old", "new"))
        same &= before == after if counted else {v for v, _ in before} == {v for v, _ in after}
        ratios.append(new / max(old, 1e-9))
        work = ", ".join(f"{verdict} {count}" for verdict, count in sorted(before | after))
        shares = [_share([x["busy"] for x in own[name] if "busy" in x]) for name in ("old", "new")] if busy else []
        rows.append([measure.name_of(*key), work, *(f"{value:.3f}" for value in (old, new, ratios[-1])), *shares])
    head = ["query", "verdict and domains", "old, s", "new, s", "new/old"]
    text = measure.table(head + (["old: kernels run", "new: kernels run"] if busy else []), rows)
    return f"{text}\n\nmedian of {len(ratios)} ratios: {statistics.median(ratios):.3f}", same


def _share(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{100 * statistics.median(known):.0f} %" if known else "no GPU"


def main(words: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__, sample=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("instances", type=Path)
    parser.add_argument("--new", type=Path, default=measure.ROOT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--domains", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--phase")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.instances = arguments.instances.resolve()
    if arguments.measure:
        with arguments.instances.open(newline="", encoding="utf-8") as file:
            for line in timed((row for row in csv.reader(file) if row), arguments):
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
    text, same = compared(found, arguments.phase, arguments.timeout is None)
    print(text if same else f"{text}\nthe trees did different work")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
