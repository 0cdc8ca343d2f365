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
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMED = 2


def measure(instances: list[list[str]], device: str, domains: int) -> None:
    """In a process of one tree: a line of JSON for every timed query."""
    from verifier.api import verify

    values = {"device": device, "attack.enabled": False, "bab.max_domains": domains, "seed": 0}
    for onnx, vnnlib, *_ in instances:
        for number in range(TIMED + 1):
            began = time.perf_counter()
            result = verify(onnx, vnnlib, values)
            seconds = time.perf_counter() - began
            counts = [part["domains"] for part in result.statistics.values() if "domains" in part]
            line = {"onnx": onnx, "vnnlib": vnnlib, "seconds": seconds, "phases": result.seconds}
            if number:
                print(json.dumps({**line, "verdict": str(result.verdict), "domains": sum(counts)}), flush=True)


def one(tree: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a fresh process of a tree measures."""
    command = [sys.executable, str(Path(__file__).resolve()), "-", str(arguments.instances), "--measure"]
    command += ["--device", arguments.device, "--domains", str(arguments.domains)]
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True, cwd=tree
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(found: dict[str, list[dict[str, Any]]]) -> bool:
    """Print medians and their ratios; whether both trees did the same work."""
    same, ratios = True, []
    for key in dict.fromkeys((line["onnx"], line["vnnlib"]) for line in found["old"]):
        times, work = {}, {}
        for name, lines in found.items():
            own = [line for line in lines if (line["onnx"], line["vnnlib"]) == key]
            times[name] = statistics.median(line["seconds"] for line in own)
            work[name] = {(line["verdict"], line["domains"]) for line in own}
        ratios.append(times["new"] / times["old"])
        same &= work["old"] == work["new"]
        note = "" if work["old"] == work["new"] else f"  DIFFERENT WORK: {work}"
        names = f"{Path(key[0]).stem[:40]} {Path(key[1]).stem[:30]}"
        domains = max(count for _, count in work["new"])
        print(f"{names:72} {domains:9} {times['old']:8.3f} {times['new']:8.3f} {ratios[-1]:7.3f}{note}")
    print(f"median of {len(ratios)} ratios new/old: {statistics.median(ratios):.3f}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("instances", type=Path)
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--domains", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with arguments.instances.open() as file:
        rows = [row for row in csv.reader(file) if row]
    if arguments.measure:
        measure(rows, arguments.device, arguments.domains)
        return 0
    arguments.instances = arguments.instances.resolve()
    trees = {"old": arguments.old.resolve(), "new": arguments.new.resolve()}
    found: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    for number in range(arguments.rounds):
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            found[name] += one(trees[name], arguments)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"tree": name, **line}) for name, each in found.items() for line in each]
        arguments.out.write_text("\n".join(lines) + "\n")
    return 0 if table(found) else 1


if __name__ == "__main__":
    sys.exit(main())
