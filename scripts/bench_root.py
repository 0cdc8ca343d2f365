"""Measures the bounds at the root: seconds of every phase, and what the slopes gain.

    python scripts/bench_root.py NETWORK.onnx PROPERTY.vnnlib [NETWORK.onnx PROPERTY.vnnlib ...]
        [--repeat 2] [--reference-steps 100] [--reference-rate 0.1] [--device auto|cpu|cuda] [--threads N]
        [--set KEY=VALUE ...] [--json FILE]

Every phase is done ``--repeat`` times from the start, so that the first figure contains what the process loads and sets
up. The rows' slopes are optimised as configured (without the early end that comes when all cases are refuted) and by
the reference schedule without decay; the bounds of both are given as the mean gap to the thresholds, with the share of
the reference's gain over CROWN that the configured one reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from verifier.api import load_any, load_problem
from verifier.bounds.alpha import Optimised, Schedule, alpha_rows
from verifier.bounds.crown import crown_hidden, crown_rows, initial_state
from verifier.config import load_config
from verifier.core.deadline import Deadline
from verifier.solver import root
from verifier.solver.place import place
from verifier.solver.strategy import open_boxes

T = TypeVar("T")


def timed(device: torch.device, into: dict[str, list[float]], name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    out = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    into.setdefault(name, []).append(time.perf_counter() - start)
    return out


def measure(onnx: str, prop: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config = load_config(assignments=[f"device={arguments.device}", *arguments.settings])
    problem = load_problem(prop)
    graph = load_any(onnx, (1, problem.n_in)).graph
    seconds: dict[str, list[float]] = {}
    started = time.perf_counter()
    placed = place(graph, config)
    backend = placed.backend
    device = backend.device
    box = root._box(graph, backend, problem, 0)
    table = root._RowTable(graph, problem, next(iter(open_boxes(problem, np.arange(problem.n_cases)))), device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds["place"] = [time.perf_counter() - started]
    alpha = config.bounds.alpha
    schedules = {
        "configured": Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay),
        "reference": Schedule(arguments.reference_steps, arguments.reference_rate, decay=1.0),
    }
    gaps: dict[str, Tensor] = {}
    for _ in range(arguments.repeat):
        state = timed(device, seconds, "IBP", lambda: initial_state(graph, backend, box))
        state = timed(device, seconds, "CROWN of hidden nodes", lambda: crown_hidden(graph, backend, state, Deadline()))  # noqa: B023
        lower, _ = timed(device, seconds, "CROWN of rows", lambda: crown_rows(graph, backend, state, table.spec))  # noqa: B023
        gaps["CROWN"] = lower[0] - table.thresholds
        for name, schedule in schedules.items():

            def climb(schedule: Schedule = schedule, state: Any = state) -> Optimised:
                return alpha_rows(graph, backend, state, table.spec, schedule, Deadline())

            found = timed(device, seconds, f"slopes, {name}", climb)
            gaps[name] = found.lower[0].double() - table.thresholds
    gain, reached = (float((gaps[k] - gaps["CROWN"]).sum()) for k in ("reference", "configured"))
    return {
        "instance": f"{Path(onnx).stem} {Path(prop).stem}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        "seconds": seconds,
        "mean_gap": {k: float(v.mean()) for k, v in gaps.items()},
        "share_of_gain": reached / gain if gain else 1.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="pairs of a network and a property")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--reference-steps", type=int, default=100)
    parser.add_argument("--reference-rate", type=float, default=0.1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(arguments.files) % 2:
        parser.error("give a property for every network")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    records = [measure(o, p, arguments) for o, p in zip(arguments.files[::2], arguments.files[1::2], strict=True)]
    for record in records:
        print(f"{record['instance']}: {record['device']}")
        for name, spent in record["seconds"].items():
            print(f"  {name}: " + ", ".join(f"{s:.3f}" for s in spent) + " s")
        mean = ", ".join(f"{k} {v:.5g}" for k, v in record["mean_gap"].items())
        print(f"  mean gap: {mean}; {100 * record['share_of_gain']:.2f} % of the reference's gain", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
