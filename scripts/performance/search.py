"""Branch and bound on neurons: children bounded per second, and the bound step alone.

Root bounds are computed first and not counted. A search then runs for the given time, branching and certification
included: how many children per second were bounded and closed, the mean bound of a child (its gap to the threshold,
what is proved counted as 0), the steps and the batch. The bound step alone bounds the children of one full batch again
and again; nothing else is timed. Both are compared with what the device could do: operations and bytes of the passes,
counted, over the rates of a large matrix product and a large copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.roofline import Rates, Work, device_name, roofline, synchronise, timed
from verifier.api import load_any, load_problem
from verifier.bab.bounder import Bounded
from verifier.bab.context import SearchContext
from verifier.bab.domains import NeuronDomains, OpenNeuronDomains
from verifier.bab.exchange import Exchange
from verifier.bab.kernel import Kernel
from verifier.bab.relu_split import NeuronSplitting, Refutation
from verifier.bab.search import branch_and_bound, step
from verifier.bounds.alpha import Schedule
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.graph.graph import Graph
from verifier.solver.root import Root, RootContext, bound_root
from verifier.solver.setup import Setup, cpu_threads, set_up
from verifier.solver.strategy import open_boxes

# Passes over a column's numbers in one optimiser step, read or written; of an input's numbers.
_COLUMN_TRAFFIC, _INPUT_TRAFFIC = 60, 5


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

    def optimise(self, domains: NeuronDomains, schedule: Schedule, deadline: Deadline) -> Bounded:
        found = self.inner.optimise(domains, schedule, deadline)
        gap = found.gap.amax(1).clamp(max=0).double().sum()
        self.total = gap if self.total is None else self.total + gap
        self.count += domains.count
        return found

    def evaluate(self, domains: NeuronDomains) -> torch.Tensor:
        return self.inner.evaluate(domains)

    def close(self) -> None:
        self.inner.close()

    @property
    def mean(self) -> float:
        return float(self.total) / self.count if self.total is not None else 0.0


def roots(network: Any, problem: Any, config: Config, seconds: float) -> tuple[Setup, Root | None]:
    """The root of the first box that is left open."""
    setup = set_up(network.graph, config)
    context = RootContext(setup.graph, setup.backend, setup.search, config, seconds, Deadline(None))
    for cases in open_boxes(problem, np.arange(problem.n_cases)):
        root = bound_root(context, problem, cases)
        if root.open.size and root.rows is not None:
            return setup, root
    return setup, None


@dataclass
class Search:
    """A search that has not started."""

    splitting: NeuronSplitting
    exchange: Exchange[OpenNeuronDomains]


def searcher(setup: Setup, root: Root, config: Config, seconds: float) -> Search:
    """A search for some time."""
    assert root.rows is not None
    deadline = Deadline(seconds)
    context = SearchContext(setup.graph, setup.search, config.bab, deadline, memory_limit=setup.pool_bytes)
    exchange: Exchange[OpenNeuronDomains] = Exchange(context)
    goal = Refutation(context, exchange.offer)
    return Search(NeuronSplitting(context, root.state, root.rows, exchange.deadline, goal), exchange)


def per_child(splitting: NeuronSplitting, inner: Any) -> Work:
    """What the optimiser's passes take for one child.

    Args:
        inner: what bounds it.
    """
    passes = (splitting.config.iterations + 1) * splitting.cases.rows
    if isinstance(inner, Kernel):
        net = inner.net
        traffic = 4.0 * (_COLUMN_TRAFFIC * net.size + _INPUT_TRAFFIC * net.free.shape[0])
        return Work(4.0 * net.multiplications * passes, bytes=traffic * passes)
    nodes = splitting.graph.nodes
    flops = 2.0 * sum(node.flops for node in nodes)
    return Work(flops * passes, bytes=4.0 * _COLUMN_TRAFFIC * sum(n.size for n in nodes) * passes)


def sustained(search: Search, device: torch.device, seconds: float) -> tuple[float, float, dict[str, float]]:
    """A search for some time: (children per second, seconds, statistics)."""
    spent, ending = timed(device, lambda: branch_and_bound(search.splitting, search.exchange))
    total = ending.totals.statistics
    statistics = {"domains": total.bounded, "closed": total.closed, "open": total.open + total.stuck}
    return total.bounded / spent, spent, {**statistics, "rounds": total.rounds, "worst": total.worst}


def bound_only(search: Search, device: torch.device, seconds: float) -> tuple[float, float, dict[str, float]]:
    """The optimiser alone on one full batch of children that a search met."""
    splitting = search.splitting
    splitting.deadline = Deadline(None)
    splitting.start()
    half = splitting.batch // 2
    while splitting.pool.count and splitting.pool.count < half:
        step(splitting)
    if not splitting.pool.count:
        return 0.0, 0.0, {}
    domains = splitting.branch(splitting.pool.by_gap(half))[: splitting.batch]
    bounder: Any = splitting.bounder
    bounder.optimise(domains, splitting.schedule, splitting.deadline)
    synchronise(device)
    bounder.count, bounder.total, count = 0, None, 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        bounder.optimise(domains, splitting.schedule, splitting.deadline)
        count += domains.count
        synchronise(device)
    spent = time.perf_counter() - start
    return count / spent, spent, {"batch": domains.count}


MODES: Mapping[str, Callable[[Search, torch.device, float], tuple[float, float, dict[str, float]]]] = {
    "search": sustained,
    "bound only": bound_only,
}


@dataclass(frozen=True)
class Ready:
    """An instance whose root bounds are known and leave something open.

    Attributes:
        seconds: what the root took.
    """

    graph: Graph
    setup: Setup
    root: Root
    config: Config
    seconds: float


def prepare(onnx: str | Path, vnnlib: str | Path, config: Config, root_seconds: float = 60.0) -> Ready | None:
    """Root bounds; None when these leave nothing open.

    Args:
        root_seconds: the time limit that the root is planned for.
    """
    problem = load_problem(vnnlib)
    network = load_any(onnx, (1, problem.n_in))
    with cpu_threads(network.graph, config):
        start = time.perf_counter()
        setup, root = roots(network, problem, config, root_seconds)
        spent = time.perf_counter() - start
    return None if root is None else Ready(network.graph, setup, root, config, spent)


def measure(ready: Ready, rates: Rates, mode: str = "search", seconds: float = 20.0) -> dict[str, Any]:
    """Search for some time, or bound for some time; the record.

    Args:
        mode: a key of ``MODES``.
    """
    device = ready.setup.backend.device
    with cpu_threads(ready.graph, ready.config):
        search = searcher(ready.setup, ready.root, ready.config, seconds)
        splitting = search.splitting
        splitting.bounder = splitting.brancher.bounder = watch = Watch(splitting.bounder)
        rate, spent, statistics = MODES[mode](search, device, seconds)
        splitting.bounder.close()
        name = device_name(device)
    child = per_child(splitting, watch.inner)
    return {
        "mode": mode,
        "children_per_s": rate,
        "mean_bound": watch.mean,
        "seconds": spent,
        "root_seconds": ready.seconds,
        "columns": int(splitting.space.size),
        "steps": ready.config.bab.iterations,
        "batch": splitting.batch,
        "device": name,
        "mflop_per_child": child.flops / 1e6,
        "mbyte_per_child": child.bytes / 1e6,
        # On a CPU the batch is made to stay in the caches, so that memory is no limit.
        "roofline_per_s": 1 / roofline(child, rates, memory=device.type == "cuda"),
        "device_tflops": rates.flops / 1e12,
        "device_gb_per_s": rates.bytes / 1e9,
        "replays": watch.inner.recordings.replays if isinstance(watch.inner, Kernel) else 0,
        "statistics": statistics,
    }
