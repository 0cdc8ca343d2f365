"""Measures branch and bound on neurons: children bounded per second, and the bound step alone.

    python scripts/bench_search.py NETWORK.onnx PROPERTY.vnnlib [NETWORK.onnx PROPERTY.vnnlib ...]
        [--seconds 20] [--bound-only] [--batch N] [--steps N] [--device auto|cpu|cuda] [--threads N] [--root-seconds 60]
        [--set KEY=VALUE ...] [--json FILE]

Root bounds are computed first and not counted. A search then runs for the given time, branching and certification
included, and one line per instance says how many children per second were bounded and closed, the mean bound of a child
(its gap to the threshold, what is proved counted as 0), the steps, the batch and the device. With ``--bound-only`` the
children of one full batch are bounded again and again instead; nothing else is timed.

The last columns compare with what the device could do: operations and bytes of the passes, counted, over the rates of a
large matrix product and a large copy, measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verifier.api import load_any, load_problem
from verifier.bab import relu_split
from verifier.bab.bounder import Bounded, Domains
from verifier.bab.kernel import Kernel
from verifier.bounds.alpha import Schedule
from verifier.config import Config, load_config
from verifier.core.deadline import Deadline
from verifier.core.progress import SilentProgress
from verifier.parallel.group import Solo
from verifier.solver.place import Placed, place
from verifier.solver.root import Root, bound_root
from verifier.solver.strategy import node_flops, open_boxes

# Passes over a column's numbers in one optimiser step, read or written; of an input's numbers.
_COLUMN_TRAFFIC, _INPUT_TRAFFIC = 60, 5


@dataclass
class Rates:
    """What the device does per second: float32 operations of a product, bytes of a copy."""

    flops: float
    bytes: float


@dataclass
class Watch:
    """A bounder that counts what passes through another one."""

    inner: Any
    count: int = 0
    total: torch.Tensor | None = None
    seconds: float = 0.0
    widest: int = field(init=False)

    def __post_init__(self) -> None:
        self.widest = self.inner.widest

    def optimise(self, domains: Domains, schedule: Schedule, deadline: Deadline) -> Bounded:
        found = self.inner.optimise(domains, schedule, deadline)
        gap = found.gap.amax(1).clamp(max=0).double().sum()
        self.total = gap if self.total is None else self.total + gap
        self.count += domains.count
        return found

    def evaluate(self, domains: Domains) -> torch.Tensor:
        return self.inner.evaluate(domains)

    def close(self) -> None:
        self.inner.close()

    @property
    def mean(self) -> float:
        return float(self.total) / self.count if self.total is not None else 0.0


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"


def measured(device: torch.device) -> Rates:
    """Rates of a product of square matrices and of a copy, the best of a few."""
    n, size = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 25)
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    return Rates(
        2.0 * n**3 / best_of(5, device, lambda: torch.mm(a, b)),
        8.0 * size / best_of(5, device, lambda: target.copy_(source)),
    )


def best_of(times: int, device: torch.device, work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(times + 1):  # the first one warms up
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


def roots(network: Any, problem: Any, config: Config, seconds: float) -> tuple[Placed, Root | None]:
    """The root of the first box that is left open."""
    placed = place(network.graph, config)
    for cases in open_boxes(problem, np.arange(problem.n_cases)):
        root = bound_root(
            network.graph, placed.backend, problem, cases, config, seconds, Deadline(None), lambda name: None
        )
        if root.open.size and root.rows is not None:
            return placed, root
    return placed, None


def searcher(network: Any, placed: Placed, root: Root, config: Config, deadline: Deadline) -> Any:
    """A search that has not started."""
    assert root.rows is not None
    return relu_split._Search(
        network.graph,
        placed.backend,
        root.state,
        root.rows,
        config.bab,
        deadline,
        SilentProgress(),
        lambda x: None,
        placed.pool_bytes,
        Solo(),
    )


def per_child(search: Any, steps: int) -> tuple[float, float]:
    """Operations and bytes of the optimiser's passes for one child."""
    inner = search.bounder.inner
    passes = (steps + 1) * search.rows
    if isinstance(inner, Kernel):
        net = inner.net
        traffic = 4.0 * (_COLUMN_TRAFFIC * net.size + _INPUT_TRAFFIC * net.free.shape[0])
        return 4.0 * net.multiplications * passes, traffic * passes
    flops = 2.0 * sum(map(node_flops, search.graph.nodes))
    return flops * passes, 4.0 * _COLUMN_TRAFFIC * sum(n.size for n in search.graph.nodes) * passes


def sustained(search: Any, device: torch.device, seconds: float) -> tuple[float, float, dict[str, float]]:
    """A search for some time: (children per second, seconds, statistics)."""
    search.deadline = search.team.deadline = Deadline(seconds)
    synchronise(device)
    start = time.perf_counter()
    result = search.run()
    synchronise(device)
    spent = time.perf_counter() - start
    return result.statistics["domains"] / spent, spent, result.statistics | {"reason": result.reason or "finished"}


def bound_only(search: Any, device: torch.device, seconds: float) -> tuple[float, float, dict[str, float]]:
    """The optimiser alone on one full batch of children that a search met."""
    search.deadline = Deadline(None)
    search._push_roots()
    while search.pool.count and search.pool.count < search.batch // 2:
        search._bound(search._children(search.pool.pop(search._take()))[0])
    if not search.pool.count:
        return 0.0, 0.0, {}
    parents = search.pool.pop(search.batch // 2)
    children = search._children({k: v[: search.batch // 2] for k, v in parents.items()})[0]
    domains = relu_split._domains({k: v[: search.batch] for k, v in children.items()})
    bab = search.config
    schedule = Schedule(bab.iterations, bab.learning_rate_alpha, bab.learning_rate_beta, 0.98)
    search.bounder.optimise(domains, schedule, search.deadline)
    synchronise(device)
    search.bounder.count, search.bounder.total, count = 0, None, 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        search.bounder.optimise(domains, schedule, search.deadline)
        count += domains.count
        synchronise(device)
    spent = time.perf_counter() - start
    return count / spent, spent, {"batch": domains.count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="pairs of a network and a property")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--root-seconds", type=float, default=60.0, help="the time limit that the root is planned for")
    parser.add_argument("--bound-only", action="store_true")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if len(arguments.files) % 2:
        parser.error("give a property for every network")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = [f"device={arguments.device}", f"bab.iterations={arguments.steps}", *arguments.settings]
    if arguments.batch:
        settings.append(f"bab.batch_size={arguments.batch}")
    config = load_config(assignments=settings)
    rates: Rates | None = None
    records: list[dict[str, Any]] = []
    for onnx, prop in zip(arguments.files[::2], arguments.files[1::2], strict=True):
        problem = load_problem(prop)
        network = load_any(onnx, (1, problem.n_in))
        name = f"{Path(onnx).stem} {Path(prop).stem}"
        start = time.perf_counter()
        placed, root = roots(network, problem, config, arguments.root_seconds)
        device = placed.backend.device
        rates = rates or measured(device)
        if root is None:
            print(f"{name}: nothing is left after the root bounds", flush=True)
            continue
        at_root = time.perf_counter() - start
        search = searcher(network, placed, root, config, Deadline(None))
        search.bounder = watch = Watch(search.bounder)
        measure = bound_only if arguments.bound_only else sustained
        rate, spent, statistics = measure(search, device, arguments.seconds)
        flops, size = per_child(search, arguments.steps)
        # On a CPU the batch is made to stay in the caches, so that memory is no limit.
        roof = 1 / max(flops / rates.flops, size / rates.bytes if device.type == "cuda" else 0.0)
        record = {
            "instance": name,
            "mode": "bound only" if arguments.bound_only else "search",
            "children_per_s": rate,
            "mean_bound": watch.mean,
            "seconds": spent,
            "root_seconds": at_root,
            "columns": int(search.space.size),
            "steps": arguments.steps,
            "batch": search.batch,
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"cpu x {torch.get_num_threads()}",
            "mflop_per_child": flops / 1e6,
            "mbyte_per_child": size / 1e6,
            "roofline_per_s": roof,
            "device_tflops": rates.flops / 1e12,
            "device_gb_per_s": rates.bytes / 1e9,
            "replays": watch.inner.recordings.replays if isinstance(watch.inner, Kernel) else 0,
            "statistics": statistics,
        }
        records.append(record)
        print(
            f"{name}: {record['mode']}: {rate:.0f} children/s, mean bound {watch.mean:.5g}, {spent:.1f} s, "
            f"{arguments.steps} steps, batch {search.batch}, {record['device']}; {flops / 1e6:.1f} MFLOP and "
            f"{size / 1e6:.2f} MB a child, roofline {roof:.0f}/s ({rates.flops / 1e12:.2f} TFLOP/s, "
            f"{rates.bytes / 1e9:.0f} GB/s), {record['replays']} replays; {statistics}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
