"""Regenerates the tables of docs/performance.md: search, bounds of one batch, root bounds, start, memory.

    python scripts/bench_performance.py [--device auto|cpu|cuda] [--parts search,bound,root,start,memory] [--seconds 20]
        [--instances FOLDER] [--select CATEGORY:NETWORK:PROPERTY ...] [--out results/performance.json] [--write]

Networks are those of examples/ and seeded random ones that are written when needed; ``--instances`` adds instances of
VNN-COMP, found by patterns in the ``instances.csv`` of their categories. Every part goes into the results file as soon
as it is measured, beside what was measured before on this and other devices. ``--write`` puts all tables of this device
into the document; ``--render`` does so for every device of the results file and measures nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench_search, startup_bench  # noqa: E402
from scripts.measure import (  # noqa: E402
    Counter,
    Rates,
    figure,
    measured,
    name_of,
    put_section,
    roofline,
    table,
    timed,
)
from scripts.networks import ResNet, save_mlp, save_resnet, save_robustness  # noqa: E402
from verifier import api  # noqa: E402
from verifier.bounds.alpha import Schedule, alpha_rows  # noqa: E402
from verifier.bounds.api import Method  # noqa: E402
from verifier.bounds.crown import Specification, crown_hidden, crown_rows, initial_state  # noqa: E402
from verifier.bounds.engine import Engine  # noqa: E402
from verifier.config import Config, load_config  # noqa: E402
from verifier.core.interval import Interval  # noqa: E402
from verifier.core.problem import Problem  # noqa: E402
from verifier.graph.graph import Graph, parameter_bytes  # noqa: E402
from verifier.solver.phases import BoundNetwork  # noqa: E402
from verifier.solver.setup import cpu_threads, device_of, set_up  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
EXAMPLES = ROOT / "examples"
# An MLP and two convolutional networks, one of them residual.
SELECT = ("mnist_fc:*256x4*:prop_7_0.05*", "sri_resnet_a:*:*", "oval21:*base*:*")
# What slopes are usually optimised by: steps of Adam, their rate and its decay.
REFERENCE = Schedule(100, 0.1, decay=0.98)
REACHED = 0.99
# Warm calls of one kind: so many, fewer when they take long.
WARM_CALLS, WARM_SECONDS = 5, 5.0
START_ROUNDS = 3
MIB = 1 << 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Instance:
    """A network and a property."""

    name: str
    onnx: Path
    vnnlib: Path


@dataclass(frozen=True)
class Options:
    """What the parts need.

    Attributes:
        seconds: of each search and of each bound step.
        searched: instances that are searched.
        networks: those whose root bounds are measured.
        sized: those whose memory is.
    """

    device: str
    seconds: float
    rates: Rates
    searched: Sequence[Instance]
    networks: Sequence[Instance]
    sized: Sequence[Instance]

    @property
    def config(self) -> Config:
        return load_config(values={"device": self.device})

    @cached_property
    def ready(self) -> Sequence[tuple[str, bench_search.Ready]]:
        """Root bounds of what is searched, computed once for both parts that start from them."""
        found = [(i.name, bench_search.prepare(i.onnx, i.vnnlib, self.config)) for i in self.searched]
        for name, ready in found:
            if ready is None:
                print(f"{name}: nothing is left after the root bounds", file=sys.stderr)
        return [(name, ready) for name, ready in found if ready is not None]


# ---------------------------------------------------------------------------------------------------------- instances


@dataclass(frozen=True)
class Shape:
    """A network with seeded random weights, and how far the points of its box are from the centre."""

    name: str
    radius: float
    save: Callable[[Path], None]

    def write(self, folder: Path) -> Instance:
        """Write the network, and as its property that the class of a random point stays the same."""
        instance = Instance(self.name, folder / f"{self.name}.onnx", folder / f"{self.name}.vnnlib")
        self.save(instance.onnx)
        network = api.load_any(instance.onnx, ())
        centre = np.random.default_rng(1).random(network.n_in, dtype=np.float32)
        outputs = network.evaluate(centre[None])[0]
        lower, upper = centre - np.float32(self.radius), centre + np.float32(self.radius)
        save_robustness(instance.vnnlib, self.name, lower, upper, int(outputs.argmax()), outputs.size)
        return instance


# Radii at which CROWN leaves some rows open, so that there is something to search.
MLP = Shape("mlp-256x4", 0.008, lambda path: save_mlp(path, (784, 256, 256, 256, 256, 10)))
RESNET = Shape("resnet-8", 0.007, lambda path: save_resnet(ResNet(8, 16, 10).reset(0), path))
WIDE = Shape("mlp-1024x4", 0.002, lambda path: save_mlp(path, (784, 1024, 1024, 1024, 1024, 10)))


def examples() -> list[Instance]:
    """The example that keeps a search busy: it has a counterexample, and searches here accept none."""
    return [Instance("bars_large", EXAMPLES / "bars.onnx", EXAMPLES / "bars_large.vnnlib")]


def select(folder: Path, pattern: str) -> Instance:
    """The first network and property of a category that fit a pattern CATEGORY:NETWORK:PROPERTY (of file names).

    A line of the list that fits as a whole comes first; otherwise the network of one line meets the property of
    another.

    Raises:
        ValueError: nothing fits, or the pattern has not three parts.
    """
    parts = pattern.split(":")
    if len(parts) != 3:
        raise ValueError(f"'{pattern}' is not CATEGORY:NETWORK:PROPERTY; write * for a part that may be anything")
    category, network, prop = parts
    with (folder / category / "instances.csv").open(newline="", encoding="utf-8") as file:
        rows = [(Path(row[0]), Path(row[1])) for row in csv.reader(file) if row]
    networks = [row for row in rows if fnmatch(row[0].name, network)]
    properties = [row for row in rows if fnmatch(row[1].name, prop)]
    if not networks or not properties:
        raise ValueError(f"{folder / category / 'instances.csv'} has nothing that fits '{pattern}'")
    whole = next((row for row in networks if row in properties), None)
    onnx, vnnlib = whole or (networks[0][0], properties[0][1])
    return Instance(f"{category} {onnx.stem} {vnnlib.stem}", folder / category / onnx, folder / category / vnnlib)


# ------------------------------------------------------------------------------------------------- search and bounds


def search(options: Options) -> Iterator[Row]:
    """Children per second of whole searches."""
    return _children(options, "search")


def bound(options: Options) -> Iterator[Row]:
    """Children per second of the bound step alone."""
    return _children(options, "bound only")


def _children(options: Options, mode: str) -> Iterator[Row]:
    for name, ready in options.ready:
        yield {**bench_search.measure(ready, options.rates, mode, options.seconds), "instance": name}


# --------------------------------------------------------------------------------------------------------------- root


def root(options: Options) -> Iterator[Row]:
    """CROWN and alpha-CROWN of the rows of a property, each network in a process of its own: first calls are cold."""
    for i in options.networks:
        yield {"instance": i.name, **apart(root_row, i, options.config, options.rates)}


def root_row(instance: Instance, config: Config, rates: Rates) -> Row:
    """Times and bounds of one network."""
    problem = api.load_problem(instance.vnnlib)
    network = api.load_any(instance.onnx, (1, problem.n_in))
    with cpu_threads(network.graph, config):
        rows = RootRows(network.graph, problem, config)
        alpha = config.bounds.alpha
        ours = Schedule(alpha.iterations, alpha.learning_rate, decay=alpha.decay)
        crown = repeated(rows.device, rows.crown, rates)
        optimised = repeated(rows.device, lambda: rows.alpha(ours), rates)
        seconds, reference = timed(rows.device, lambda: rows.alpha(REFERENCE))
        target = rows.base + REACHED * (reference.plain - rows.base)
        reach, reached = timed(rows.device, lambda: rows.alpha(ours, target))
        return {
            "rows": int(rows.spec.y.shape[1]),
            "steps": ours.iterations,
            "crown": {**crown, "bound": rows.base},
            "alpha": {**optimised, "bound": rows.alpha(ours).certified},
            "reference": {"seconds": seconds, "bound": reference.certified},
            "reached": reach if reached.plain >= target else None,
        }


def repeated(device: torch.device, work: Callable[[], object], rates: Rates) -> Row:
    """Seconds of the first call and the median of later ones, what one call takes, and what that costs at least."""
    cold, warm = timed(device, work)[0], [timed(device, work)[0]]
    while len(warm) < WARM_CALLS and sum(warm) < WARM_SECONDS:
        warm.append(timed(device, work)[0])
    with Counter() as counter:
        work()
    return {
        "cold": cold,
        "warm": statistics.median(warm),
        "work": asdict(counter.work),
        "products": roofline(counter.work, rates, memory=False),
        "roofline": roofline(counter.work, rates),
    }


@dataclass(frozen=True)
class Distances:
    """Mean over the rows of bound minus threshold: as optimised in float32, and certified."""

    plain: float
    certified: float


class RootRows:
    """All rows of the first box of a problem, on a network that is on its device.

    Attributes:
        base: mean over the rows of CROWN's bound minus threshold; set by :meth:`crown`.
    """

    def __init__(self, graph: Graph, problem: Problem, config: Config) -> None:
        setup = set_up(graph, config)
        self.graph, self.backend, self.device = setup.graph, setup.backend, setup.backend.device
        box = int(problem.case_box[0])
        self.box = Interval(
            *(self._tensor(b[box]).reshape(1, *graph.input_shape) for b in (problem.lower, problem.upper))
        )
        used = np.unique(problem.case_rows[problem.case_box == box])
        used = used[used >= 0]
        y, x = problem.row_y[used], None if problem.row_x is None else problem.row_x[used]
        self.spec = Specification(
            self._tensor(y).reshape(1, used.size, *graph.output_shape),
            None if x is None else self._tensor(x).reshape(1, used.size, *graph.input_shape),
        )
        self.thresholds = self._tensor(problem.row_d[used])
        self.base = 0.0

    @property
    def engine(self) -> Engine:
        """In the arithmetic of proofs."""
        return Engine(self.graph, self.backend)

    def crown(self) -> None:
        """Intervals, CROWN of the hidden nodes, CROWN of the rows; certified."""
        self.state = crown_hidden(self.engine, initial_state(self.engine, self.box))
        self.lower, _ = crown_rows(self.engine, self.state, self.spec)
        self.base = self._distance(self.lower)

    def alpha(self, schedule: Schedule, target: float | None = None) -> Distances:
        """Slopes of the rows optimised, then certified; hidden bounds stay CROWN's. Ends early at a target."""
        stop = None if target is None else lambda best: self._distance(best) >= target
        found = alpha_rows(self.engine, self.state, self.spec, replace(schedule, stop=stop))
        sure, _ = crown_rows(self.engine, self.state, self.spec, found.parameters)
        return Distances(self._distance(found.lower), self._distance(torch.fmax(self.lower.double(), sure)))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

    def _distance(self, lower: torch.Tensor) -> float:
        return float((lower[0].double() - self.thresholds).mean())


def apart(work: Callable[..., Row], *arguments: Any) -> Row:
    """Call in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


# --------------------------------------------------------------------------------------------------- start and memory


def start(options: Options) -> Iterator[Row]:
    """A trivial instance, cold and with the resident worker, beside the imports that it cannot do without."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    onnx, vnnlib = EXAMPLES / "rings.onnx", EXAMPLES / "rings_small.vnnlib"
    found = startup_bench.measure(onnx, vnnlib, START_ROUNDS, hidden)
    least = statistics.median(found["imports"])
    for name, values in found.items():
        median = statistics.median(values)
        yield {"command": name, "median": median, "least": min(values), "most": max(values), "imports": median / least}


def memory(options: Options) -> Iterator[Row]:
    """Peak of the bound computation on each network, in a process of its own."""
    for i in options.sized:
        for method in ("crown", "alpha-crown"):
            yield {"network": i.name, "method": method, **apart(memory_row, i, method, options.config)}


def memory_row(instance: Instance, method: Method, config: Config) -> Row:
    """Bytes of the weights, of the budget for coefficients, and the most that was taken at once."""
    problem, network = api.load_problem(instance.vnnlib), api.load_any(instance.onnx, ())
    # More steps take no more memory.
    short = config.bounds.alpha.model_copy(update={"iterations": 2, "intermediate_iterations": 2})
    config = config.model_copy(update={"bounds": config.bounds.model_copy(update={"alpha": short})})
    with api.job(config) as ranks:
        wanted = BoundNetwork(problem.lower[0], problem.upper[0], method)
        found = api.bound_network(ranks, lambda: network, config, wanted)
    (rank,) = found.memory
    return {
        "weights": parameter_bytes(network.graph),
        "resident": rank.weights,
        "budget": config.memory.chunk_bytes,
        "peak": rank.peak,
        "peak_kind": rank.peak_kind,
    }


# ------------------------------------------------------------------------------------------------------------- tables

PARTS: Mapping[str, Callable[[Options], Iterator[Row]]] = {
    "search": search,
    "bound": bound,
    "root": root,
    "start": start,
    "memory": memory,
}


@dataclass(frozen=True)
class Table:
    """How a part is shown: a title, and columns with what they show of a row."""

    title: str
    columns: Mapping[str, Callable[[Row], str]]

    def render(self, rows: Sequence[Row]) -> str:
        return table(list(self.columns), [[show(row) for show in self.columns.values()] for row in rows])


def _rate(row: Row) -> str:
    return figure(row["children_per_s"]) if row["seconds"] else "-"


def _share(row: Row) -> str:
    return f"{100 * row['children_per_s'] / row['roofline_per_s']:.0f} %" if row["seconds"] else "-"


_CHILDREN: Mapping[str, Callable[[Row], str]] = {
    "instance": lambda r: r["instance"],
    "children/s": _rate,
    "roofline/s": lambda r: figure(r["roofline_per_s"]),
    "of it": _share,
    "MFLOP a child": lambda r: figure(r["mflop_per_child"]),
    "MB a child": lambda r: figure(r["mbyte_per_child"]),
    "mean bound": lambda r: figure(r["mean_bound"], 4),
    "steps": lambda r: str(r["steps"]),
    "batch": lambda r: str(r["batch"]),
    "columns": lambda r: str(r["columns"]),
}


def _seconds(method: str) -> dict[str, Callable[[Row], str]]:
    work: Callable[[Row], Mapping[str, float]] = lambda r: r[method]["work"]  # noqa: E731
    return {
        "instance": lambda r: r["instance"],
        "rows": lambda r: str(r["rows"]),
        "cold s": lambda r: figure(r[method]["cold"]),
        "warm s": lambda r: figure(r[method]["warm"]),
        "products s": lambda r: figure(r[method]["products"]),
        "roofline s": lambda r: figure(r[method]["roofline"]),
        "of it": lambda r: f"{100 * r[method]['roofline'] / r[method]['warm']:.0f} %",
        "GFLOP": lambda r: figure(work(r)["flops"] / 1e9),
        "GFLOP float64": lambda r: figure(work(r)["flops64"] / 1e9),
        "GB": lambda r: figure(work(r)["bytes"] / 1e9),
        "bound": lambda r: figure(r[method]["bound"], 5),
    }


def _gain(row: Row) -> str:
    """The part of the reference's gain over CROWN that the default schedule has."""
    whole = row["reference"]["bound"] - row["crown"]["bound"]
    return f"{100 * (row['alpha']['bound'] - row['crown']['bound']) / whole:.1f} %" if whole > 0 else "-"


TABLES: Mapping[str, Sequence[Table]] = {
    "search": [Table("Search", {**_CHILDREN, "closed": lambda r: str(r["statistics"].get("closed", "-"))})],
    "bound": [Table("The bound step alone", _CHILDREN)],
    "root": [
        Table("Root: CROWN", _seconds("crown")),
        Table(
            "Root: alpha-CROWN of the rows, after CROWN",
            {
                **_seconds("alpha"),
                "steps": lambda r: str(r["steps"]),
                "reference s": lambda r: figure(r["reference"]["seconds"]),
                "reference bound": lambda r: figure(r["reference"]["bound"], 5),
                "of its gain": _gain,
                f"s to {REACHED:.0%}": lambda r: figure(r["reached"]),
            },
        ),
    ],
    "start": [
        Table(
            "Start",
            {
                "what": lambda r: r["command"],
                "median s": lambda r: figure(r["median"]),
                "least": lambda r: figure(r["least"]),
                "most": lambda r: figure(r["most"]),
                "of the imports": lambda r: f"{r['imports']:.2f}",
            },
        )
    ],
    "memory": [
        Table(
            "Memory",
            {
                "network": lambda r: r["network"],
                "method": lambda r: r["method"],
                "weights MiB": lambda r: figure(r["weights"] / MIB),
                "with casts MiB": lambda r: figure(r["resident"] / MIB),
                "budget MiB": lambda r: figure(r["budget"] / MIB),
                "peak MiB": lambda r: figure(r["peak"] / MIB),
                "peak / weights": lambda r: figure(r["peak"] / r["weights"]),
                "rest / budget": lambda r: f"{(r['peak'] - r['resident']) / r['budget']:.2f}",
                "counted by": lambda r: r["peak_kind"],
            },
        )
    ],
}


def render(device: str, parts: Mapping[str, Row]) -> str:
    """The section of one device."""
    lines = [f"### {device}"]
    for name, tables in TABLES.items():
        if name in parts:
            found = parts[name]
            for shown in tables:
                lines += ["", f"**{shown.title}**", "", shown.render(found["rows"])]
            lines += ["", f"`{found['command']}`; {found['rates']}; {found['circumstances']}."]
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Row]], page: Path) -> None:
    """Put the tables of the given devices into the document; others' sections stay."""
    text = page.read_text(encoding="utf-8")
    for device, parts in results.items():
        text = put_section(text, device, render(device, parts))
    page.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each search and of each bound step")
    parser.add_argument("--instances", type=Path, metavar="FOLDER", help="categories of VNN-COMP, measured too")
    parser.add_argument("--select", action="append", metavar="CATEGORY:NETWORK:PROPERTY", help=f"default: {SELECT}")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "performance.json")
    parser.add_argument("--write", action="store_true", help="put this device's tables into docs/performance.md")
    parser.add_argument(
        "--render", action="store_true", help="put all tables of the results file there, measure nothing"
    )
    found = parser.parse_args(words)
    found.parts = found.parts.split(",")
    unknown = [part for part in found.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    return found


def main() -> int:
    arguments = arguments_of()
    results = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    if arguments.render:
        write(results, PAGE)
        return 0
    device = device_of(load_config(values={"device": arguments.device}))
    name = name_of(device, threads=False)
    rates = measured(device)
    print(f"{name_of(device)}: {rates}", flush=True)
    mine = results.setdefault(name, {})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        mlp, resnet, wide = (shape.write(Path(folder)) for shape in (MLP, RESNET, WIDE))
        picked = [select(arguments.instances, p) for p in arguments.select or SELECT] if arguments.instances else []
        networks = [mlp, resnet, *picked]
        options = Options(
            device.type, arguments.seconds, rates, [*examples(), *networks], networks, [mlp, wide, resnet]
        )
        for part in arguments.parts:
            mine[part] = measured_part(part, options)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if arguments.write:
                write({name: mine}, PAGE)
    return 0


def measured_part(part: str, options: Options) -> Row:
    """All rows of a part, shown as they come, and under what circumstances they were measured."""
    load = os.getloadavg()[0]
    rows = []
    for row in PARTS[part](options):
        rows.append(row)
        print(f"{part}: {json.dumps(row)}", flush=True)
    return {
        "rows": rows,
        "rates": str(options.rates),
        "circumstances": f"load {load:.1f}, CPU threads {torch.get_num_threads()}, torch {torch.__version__}",
        "command": " ".join(["python", "scripts/bench_performance.py", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    sys.exit(main())
