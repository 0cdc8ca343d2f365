"""Measures search, bounds of one batch, root bounds, start and memory, and regenerates docs/performance.md.

    python scripts/bench_performance.py [--device auto|cpu|cuda] [--parts search,bound,root,start,memory] [--seconds 20]
        [--instances FOLDER] [--select CATEGORY:NETWORK:PROPERTY ...] [--out results/performance.json] [--write]
    python scripts/bench_performance.py --query NETWORK.onnx PROPERTY.vnnlib [--query ...] [--parts search] [--batch N]
        [--steps N] [--threads N] [--root-seconds 60] [--set KEY=VALUE ...] [--out FILE]
    python scripts/bench_performance.py --parts modes [--mode-steps 5,10,20,40]

Networks are those of examples/ and seeded random ones that are written when needed; ``--instances`` adds instances of
VNN-COMP, found by patterns in the ``instances.csv`` of their categories. Every part goes into the results file as soon
as it is measured, beside what was measured before on this and other devices. ``--write`` puts all tables of this device
into the document; ``--render`` does so for every device of the results file and measures nothing.

With ``--query`` these networks and properties are measured instead; the results go to a file only if one is named.
``modes``, which is measured only when asked for, compares what can be optimised at the root: slopes of the rows alone,
hidden bounds layer by layer, or everything jointly.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_instances
from scripts.measure import EXAMPLES, ROOT, add_settings, parser_of
from scripts.performance import modes as root_modes
from scripts.performance import search as searches
from scripts.performance.instances import MLP, RESNET, SELECT, SMALL_RESNET, WIDE, Instance, examples, select
from scripts.performance.root import root_row
from scripts.performance.tables import TABLES, Row, write
from scripts.roofline import Rates, device_name, measured
from verifier import api
from verifier.bounds.api import Method
from verifier.config import Config, load_config
from verifier.core.device import default_chunk_bytes
from verifier.graph.graph import parameter_bytes
from verifier.solver.phases import BoundNetwork, BoundsReport
from verifier.solver.setup import device_of

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "results" / "performance.json"
START_ROUNDS = 3


@dataclass(frozen=True)
class Options:
    """What the parts need.

    Attributes:
        seconds: of each search and of each bound step.
        root_seconds: the time limit that the root of a search is planned for.
        searched: instances that are searched.
        networks: those whose root bounds are measured.
        sized: those whose memory is.
        optimised: those on which the modes of optimisation are compared, with ``mode_steps`` steps each.
    """

    config: Config
    seconds: float
    root_seconds: float
    rates: Rates
    searched: Sequence[Instance]
    networks: Sequence[Instance]
    sized: Sequence[Instance]
    optimised: Sequence[Instance]
    mode_steps: Sequence[int]

    @cached_property
    def ready(self) -> Sequence[tuple[str, searches.Ready]]:
        """Root bounds of what is searched, computed once for both parts that start from them."""
        found = [(i.name, searches.prepare(i.onnx, i.vnnlib, self.config, self.root_seconds)) for i in self.searched]
        for name, ready in found:
            if ready is None:
                print(f"{name}: nothing is left after the root bounds", file=sys.stderr)
        return [(name, ready) for name, ready in found if ready is not None]


# -------------------------------------------------------------------------------------------------------------- parts


def search(options: Options) -> Iterator[Row]:
    """Children per second of whole searches."""
    return _children(options, "search")


def bound(options: Options) -> Iterator[Row]:
    """Children per second of the bound step alone."""
    return _children(options, "bound only")


def _children(options: Options, mode: str) -> Iterator[Row]:
    for name, ready in options.ready:
        yield {"instance": name, **searches.measure(ready, options.rates, mode, options.seconds)}


def root(options: Options) -> Iterator[Row]:
    """CROWN and alpha-CROWN of the rows of a property, each network in a process of its own: first calls are cold."""
    for i in options.networks:
        yield {"instance": i.name, **apart(root_row, i, options.config, options.rates)}


def modes(options: Options) -> Iterator[Row]:
    """What time at the root buys in every mode."""
    for i in options.optimised:
        for row in root_modes.measure(i, options.config, options.mode_steps):
            yield {"instance": i.name, **row}


def start(options: Options) -> Iterator[Row]:
    """A trivial instance, cold and with the resident worker, beside the imports that it cannot do without."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.config.device == "cpu" else {}
    onnx, vnnlib = EXAMPLES / "rings.onnx", EXAMPLES / "rings_small.vnnlib"
    found = bench_instances.take_turns(onnx, vnnlib, START_ROUNDS, hidden)
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
        found = api.bound_network(ranks, lambda: network, config, wanted, BoundsReport)
    (rank,) = found.memory
    chunk = config.memory.chunk_bytes
    return {
        "weights": parameter_bytes(network.graph),
        "resident": rank.weights,
        "budget": default_chunk_bytes(device_of(config)) if chunk == "auto" else chunk,
        "peak": rank.peak,
        "peak_kind": rank.peak_kind,
    }


def apart(work: Callable[..., Row], *arguments: Any) -> Row:
    """Call in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


PARTS: Mapping[str, Callable[[Options], Iterator[Row]]] = {
    "search": search,
    "bound": bound,
    "root": root,
    "modes": modes,
    "start": start,
    "memory": memory,
}
USUAL = [part for part in PARTS if part != "modes"]


# --------------------------------------------------------------------------------------------------------------- main


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, sample=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parts", default=",".join(USUAL), help=f"of {', '.join(PARTS)}; default: all but modes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each search and of each bound step")
    parser.add_argument("--instances", type=Path, metavar="FOLDER", help="categories of VNN-COMP, measured too")
    parser.add_argument("--select", action="append", metavar="CATEGORY:NETWORK:PROPERTY", help=f"default: {SELECT}")
    parser.add_argument(
        "--query", nargs=2, action="append", type=Path, metavar=("ONNX", "VNNLIB"), help="measure this and no others"
    )
    parser.add_argument("--root-seconds", type=float, default=60.0, help="the time limit that roots are planned for")
    parser.add_argument("--batch", type=int, help="domains bounded at once")
    parser.add_argument("--steps", type=int, help="of the optimiser, per batch of domains")
    parser.add_argument("--mode-steps", default="5,10,20,40", help="of the optimiser, in the part modes")
    parser.add_argument("--threads", type=int, help="of the CPU, for what is not measured in a process of its own")
    add_settings(parser)
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}, with --query none")
    parser.add_argument("--write", action="store_true", help="put this device's tables into docs/performance.md")
    parser.add_argument(
        "--render", action="store_true", help="put all tables of the results file there, measure nothing"
    )
    found = parser.parse_args(words)
    found.parts = found.parts.split(",")
    unknown = [part for part in found.parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {','.join(unknown)}: there are {', '.join(PARTS)}")
    if found.query and (found.write or found.render):
        parser.error("--query does not go with --write and --render: the document shows the usual networks")
    if found.out is None and not found.query:
        found.out = RESULTS
    return found


def config_of(arguments: argparse.Namespace) -> Config:
    """The settings that the options say."""
    named = {"bab.batch_size": arguments.batch, "bab.iterations": arguments.steps}
    words = [f"{key}={value}" for key, value in named.items() if value is not None]
    config = load_config(assignments=[f"device={arguments.device}", *words, *arguments.settings])
    return config.model_copy(update={"device": device_of(config).type})


def options_of(arguments: argparse.Namespace, config: Config, rates: Rates, folder: Path) -> Options:
    """What is measured; random networks are written to the folder."""
    if arguments.query:
        queries = [Instance(f"{onnx.stem} {vnnlib.stem}", onnx, vnnlib) for onnx, vnnlib in arguments.query]
        searched = networks = sized = optimised = queries
    else:
        mlp, resnet, small, wide = (shape.write(folder) for shape in (MLP, RESNET, SMALL_RESNET, WIDE))
        patterns = (arguments.select or SELECT) if arguments.instances else ()
        networks = [mlp, resnet, *(select(arguments.instances, pattern) for pattern in patterns)]
        searched, sized = [*examples(), *networks], [mlp, wide, resnet]
        # The modes take too much memory on what is selected by default.
        optimised = [mlp, small, *(networks[2:] if arguments.select else [])]
    steps = [int(n) for n in arguments.mode_steps.split(",")]
    return Options(
        config, arguments.seconds, arguments.root_seconds, rates, searched, networks, sized, optimised, steps
    )


def main(words: Sequence[str] | None = None) -> int:
    arguments = arguments_of(words)
    path: Path | None = arguments.out
    results = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    if arguments.render:
        write(results, PAGE)
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = config_of(arguments)
    device = device_of(config)
    name = device_name(device, threads=False)
    rates = measured(device)
    print(f"{device_name(device)}: {rates}", flush=True)
    mine = results.setdefault(name, {})
    with tempfile.TemporaryDirectory() as folder:
        options = options_of(arguments, config, rates, Path(folder))
        for part in arguments.parts:
            mine[part] = measured_part(part, options)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if arguments.write:
                write({name: mine}, PAGE)
    return 0


def measured_part(part: str, options: Options) -> Row:
    """All rows of a part, shown as they come and as tables, and under what circumstances they were measured."""
    load = os.getloadavg()[0]
    rows = []
    for row in PARTS[part](options):
        rows.append(row)
        print(f"{part}: {json.dumps(row)}", flush=True)
    for shown in TABLES[part]:
        print(f"\n{shown.title}\n\n{shown.render(rows)}\n", flush=True)
    return {
        "rows": rows,
        "rates": str(options.rates),
        "circumstances": f"load {load:.1f}, CPU threads {torch.get_num_threads()}, torch {torch.__version__}",
        "command": " ".join(["python", "scripts/bench_performance.py", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    sys.exit(main())
