"""Several ranks against one: how much faster they search, and whether they say the same.

    python scripts/bench_ranks.py speed SAMPLE [--categories acasxu,mnist_fc | --generate 4] [--least 5000] [--count 8]
        [--ranks 2] [--timeout 100] [--repeats 1] [--target 1.7] [--ceiling] [--out results/domains] [--set KEY=VALUE]
    python scripts/bench_ranks.py verdicts SAMPLE [--categories acasxu,mnist_fc,oval21,sri_resnet_a] [--count 60]
        [--ranks 2,3] [--first 20] [--quick 15] [--timeout 60] [--jobs N] [--out results/ranks] [--set KEY=VALUE ...]
    python scripts/bench_ranks.py stress [--count 200] [--jobs 1] [--device cpu] [--seed 0]

*speed* measures branch and bound on queries that end in ``unsat``. A first run of every instance with one rank of one
thread finds those that are proved with at least ``--least`` domains; its records are kept in ``--out`` and used again.
These are then searched with one rank and with ``--ranks`` ranks of one thread each, in turn, ``--repeats`` times, and
the median times from the first split on are compared. ``--ceiling`` also runs as many searches of one rank side by
side: what they lose to each other is the machine's, not the search's. ``--generate N`` first writes N random networks
to each of SAMPLE/neurons and SAMPLE/inputs, with thresholds somewhat below the least value that descent finds, and
takes these categories. Exits 1 when the median speed-up is below ``--target``.

*verdicts* compares answers on instances that one rank solves quickly. One rank gets ``--first`` seconds per instance;
of what it solves in ``--quick`` seconds ``--count`` instances are taken, evenly from all categories and verdicts. They
are run again on P ranks with ``--timeout`` seconds. Exits 1 on a verdict that contradicts another or the known one, on
a run that takes longer than its limit and 5 s, and when more than one instance of a P is left unsolved. Resumable.

*stress* runs small queries many times over, each an example with a number of ranks (2 to 4), a backend and a number of
groups at random. One rank answers each example first. Exits 1 when a run hangs (longer than the time limit and ten
seconds), ends in an error, is not solved, or has another verdict.

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``) and perhaps a ``verdicts.csv``.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import measure
from scripts.measure import Known, Query, Record, Row, Selection

# The search alone is measured; queries that an attack settles are not looked for.
SEARCH_ALONE = ("device=cpu", "threads=1", "attack.enabled=false")
STRESS_SECONDS = 90.0


# ----------------------------------------------------------------------------------------------------- random networks


@dataclass(frozen=True)
class Family:
    """Random networks of one shape, and how hard their questions are.

    Attributes:
        inputs, width, layers: of the network.
        radius: the box is so large around zero.
        margin: the threshold lies so many standard deviations of the output below the least value found.
    """

    name: str
    inputs: int
    width: int
    layers: int
    radius: float
    margin: float


# Many inputs are not split, few are: see verifier/solver/strategy.py.
FAMILIES = (Family("neurons", 24, 36, 3, 0.1, 2.0), Family("inputs", 8, 40, 2, 0.65, 0.5))


def write(family: Family, folder: Path, count: int, timeout: float) -> None:
    """Networks, properties and the list of a category."""
    import numpy as np
    import torch

    from scripts.networks import OnnxWriter, save_box

    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "vnnlib").mkdir(exist_ok=True)
    names = [f"{family.name}{seed}" for seed in range(count)]
    for seed, name in enumerate(names):
        noise = torch.Generator().manual_seed(seed)
        sizes = [family.inputs, *[family.width] * family.layers, 1]
        layers = [
            (torch.randn(n, m, generator=noise) * 1.4 / m**0.5, torch.randn(n, generator=noise) * 0.3)
            for m, n in pairwise(sizes)
        ]
        writer, value = OnnxWriter(sizes[:1]), "X"
        for i, (weight, bias) in enumerate(layers):
            value = writer.linear(writer.relu(value) if i else value, weight.numpy(), bias.numpy())
        writer.save(folder / "onnx" / f"{name}.onnx", 1)
        threshold, box = round(below_least(layers, family, noise), 6), np.full(family.inputs, family.radius)
        save_box(folder / "vnnlib" / f"{name}.vnnlib", -box, box, 1, threshold, "<=")
    rows = [(f"onnx/{name}.onnx", f"vnnlib/{name}.vnnlib", str(timeout)) for name in names]
    measure.write_rows(folder / "instances.csv", rows)


def below_least(layers: Sequence[tuple[Any, Any]], family: Family, noise: Any) -> float:
    """A threshold below the least output that descent from many points finds."""
    import torch

    def forward(x: Any) -> Any:
        for weight, bias in layers[:-1]:
            x = torch.relu(x @ weight.T + bias)
        return (x @ layers[-1][0].T + layers[-1][1])[:, 0]

    x = (2 * torch.rand(20000, family.inputs, generator=noise) - 1) * family.radius
    spread = float(forward(x).std())
    x = x[forward(x).topk(200, largest=False).indices]
    for step in range(200):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(forward(x).sum(), x)
        size = 0.02 * 0.98**step * family.radius
        x = (x.detach() - size * gradient.sign()).clamp(-family.radius, family.radius)
    return float(forward(x).min()) - family.margin * spread


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Search:
    """What a run says of its searches.

    Attributes:
        seconds: in branch and bound, from the first split on; ``domains``: bounded there by all ranks.
        shares: domains of each rank; ``moved``: domains that changed ranks.
    """

    verdict: str
    seconds: float
    domains: int
    shares: tuple[int, ...] = ()
    moved: int = 0


def read(record: Record) -> Search:
    """From the JSON record of one query."""
    seconds = sum(v for name, v in record["seconds"].items() if name.startswith("branch and bound"))
    parts = [p for p in record["statistics"].values() if isinstance(p, dict) and "domains" in p]
    groups = [g for p in parts for g in p.get("groups", [])]
    size = max((len(p.get("groups", [])) for p in parts), default=0)
    shares = tuple(sum(p["groups"][i]["domains"] for p in parts if p.get("groups")) for i in range(size))
    return Search(record["verdict"], seconds, record["domains"] or 0, shares, sum(g["received"] for g in groups))


def start(query: Query, ranks: int, timeout: float, settings: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
    """Start a query; its record goes to ``path``."""
    path.unlink(missing_ok=True)
    words = ["verify", "--onnx", query.onnx, "--vnnlib", query.vnnlib, "--timeout", str(timeout), "--json", path]
    command = measure.verifier(*words, settings=[f"parallel.ranks={ranks}", *SEARCH_ALONE, *settings])
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, env=measure.environment(), stdout=silent, stderr=silent)


def finish(process: subprocess.Popen[bytes], path: Path) -> Search:
    process.wait()
    return read(json.loads(path.read_text(encoding="utf-8")))


def side_by_side(count: int, query: Query, timeout: float, settings: Sequence[str], out: Path) -> float:
    """Mean seconds of as many searches of one rank at a time."""
    paths = [out / f"beside{i}.json" for i in range(count)]
    running = [start(query, 1, timeout, settings, path) for path in paths]
    return statistics.mean(finish(p, path).seconds for p, path in zip(running, paths, strict=True))


def suitable(found: Sequence[Query], arguments: argparse.Namespace) -> list[Query]:
    """Those that one rank proves with enough domains, by rising time; ends early once there are enough."""
    chosen: list[tuple[float, Query]] = []
    for query in found:
        path = arguments.out / f"{query.title.replace(' ', '_')}.json"
        if path.is_file():
            first = read(json.loads(path.read_text(encoding="utf-8")))
        else:
            first = finish(start(query, 1, arguments.timeout, arguments.settings, path), path)
        fits = first.verdict == "unsat" and first.domains >= arguments.least
        print(f"{'+' if fits else '-'} {query.title}: {first.verdict}, {first.domains} domains", file=sys.stderr)
        if fits:
            chosen.append((first.seconds, query))
        if len(chosen) == arguments.count:
            break
    return [query for _, query in sorted(chosen, key=lambda pair: pair[0])]


def turns(query: Query, arguments: argparse.Namespace) -> tuple[list[Search], list[Search], float]:
    """Searches of one rank and of many, in turn, and the speed-up that the machine allows (1.0 when not measured)."""
    one: list[Search] = []
    many: list[Search] = []
    beside: list[float] = []
    for _ in range(arguments.repeats):
        for ranks, runs in ((1, one), (arguments.ranks, many)):
            path = arguments.out / f"ranks{ranks}.json"
            runs.append(finish(start(query, ranks, arguments.timeout, arguments.settings, path), path))
        if arguments.ceiling:
            beside.append(side_by_side(arguments.ranks, query, arguments.timeout, arguments.settings, arguments.out))
    alone = statistics.median(s.seconds for s in one)
    return one, many, arguments.ranks * alone / statistics.median(beside) if beside else 1.0


def measured_gain(query: Query, arguments: argparse.Namespace) -> float | None:
    """The speed-up on one query, whose row is printed; None when a search did not end in ``unsat``."""
    one, many, ceiling = turns(query, arguments)
    gain = statistics.median(s.seconds for s in one) / statistics.median(s.seconds for s in many)
    last = many[-1]
    cells = [query.title, one[-1].domains, last.domains, "/".join(map(str, last.shares)), last.moved]
    cells += [f"{statistics.median(s.seconds for s in runs):.2f}" for runs in (one, many)]
    cells += [f"{gain:.2f}", *([f"{ceiling:.2f}"] if arguments.ceiling else [])]
    print(measure.table_row(cells), flush=True)
    found = {s.verdict for s in (*one, *many)}
    if found != {"unsat"}:
        print(f"PROBLEM {query.title}: {sorted(found)}", file=sys.stderr)
        return None
    return gain


def speed(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Whether several ranks are as much faster as they should."""
    if arguments.generate:
        arguments.categories = ",".join(f.name for f in FAMILIES)
        for family in FAMILIES:
            write(family, arguments.sample / family.name, arguments.generate, arguments.timeout)
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = suitable([*queries(parser, arguments.sample, arguments.categories)], arguments)
    if not chosen:
        print(f"no instance is proved with {arguments.least} domains in {arguments.timeout:g} s", file=sys.stderr)
        return False
    p = arguments.ranks
    columns = ["instance", "domains", f"domains x{p}", "of each rank", "moved", "s", f"s x{p}", "speed-up"]
    columns += ["ceiling"] if arguments.ceiling else []
    print(measure.table_row(columns) + "\n|---" + "|---:" * (len(columns) - 1) + "|")
    gains: dict[str, list[float]] = defaultdict(list)
    for query in chosen:
        gain = measured_gain(query, arguments)
        if gain is None:
            return False
        gains[query.category].append(gain)
    for category, some in gains.items():
        print(f"{category}: median {statistics.median(some):.2f} of {len(some)}")
    every = [gain for some in gains.values() for gain in some]
    median, load = statistics.median(every), os.getloadavg()[0]
    print(f"median speed-up of {p} ranks, {len(every)} instances: {median:.2f}; load {load:.1f}")
    return median >= arguments.target


def queries(parser: argparse.ArgumentParser, sample: Path, categories: str) -> Iterator[Query]:
    """All of some categories, in order."""
    for selection in measure.selections(parser, sample, categories):
        for row in measure.selected(sample, selection):
            yield Query(selection.category, Path(row[0]), Path(row[1]))


# ------------------------------------------------------------------------------------------------------------ verdicts


def run(rows: Sequence[Row], name: str, arguments: argparse.Namespace, timeout: float, ranks: int) -> list[Record]:
    """Answer the rows with so many ranks of one thread; their records."""
    options = ["--timeout", str(timeout), "--jobs", str(max(1, arguments.jobs // ranks))]
    settings = ["threads=1", *arguments.settings, *([f"parallel.ranks={ranks}"] if ranks > 1 else [])]
    options += [word for setting in settings for word in ("--set", setting)]
    return [*measure.answered(rows, arguments.out / f"{name}.csv", arguments.out / f"{name}.jsonl", options)]


def choose(groups: Mapping[Any, Sequence[Row]], count: int) -> list[Row]:
    """About equally many of every group, in turn, spread over its list."""
    spread = {
        key: [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
        for key, rows in groups.items()
    }
    chosen: list[Row] = []
    number = 0
    while len(chosen) < count and any(len(rows) > number for rows in spread.values()):
        chosen += [rows[number] for rows in spread.values() if len(rows) > number]
        number += 1
    return chosen[:count]


def problems(records: Sequence[Record], known: Known, timeout: float) -> list[str]:
    """Contradictions and late ends, one sentence each."""
    out = []
    for r in records:
        truth, name = known[measure.key_of(r)], measure.name_of(*measure.key_of(r))
        if measure.contradict(r["verdict"], truth):
            out.append(f"{name}: {r['verdict']}, but {truth} is known")
        if r["verdict"] == "error":
            out.append(f"{name}: error: {r['reason']}")
        if r["seconds"]["total"] > timeout + 5:
            out.append(f"{name}: took {r['seconds']['total']:.1f} s")
    return out


def solved_alone(
    found: Sequence[Selection], arguments: argparse.Namespace, known: dict[tuple[str, str], str]
) -> dict[tuple[str, str], list[Row]]:
    """What one rank solves quickly, by category and verdict; these verdicts are known from then on."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for selection in found:
        rows = measure.selected(arguments.sample, selection)
        by_path = {(row[0], row[1]): row for row in rows}
        for record in run(rows, f"one-{selection.category}", arguments, arguments.first, 1):
            if record["verdict"] in measure.SOLVED and record["seconds"]["total"] <= arguments.quick:
                key = measure.key_of(record)
                groups[selection.category, record["verdict"]].append(by_path[key])
                if known.setdefault(key, record["verdict"]) not in measure.SOLVED:
                    known[key] = record["verdict"]
    return groups


def verdicts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> bool:
    """Whether several ranks answer as one does."""
    known = measure.truths(arguments.sample)
    groups = solved_alone(measure.selections(parser, arguments.sample, arguments.categories), arguments, known)
    chosen = choose(groups, arguments.count)
    print(f"{len(chosen)} instances: {', '.join(f'{len(r)} {c} {v}' for (c, v), r in groups.items())} to choose from")
    failed = False
    for ranks in map(int, arguments.ranks.split(",")):
        records = run(chosen, f"ranks-{ranks}", arguments, arguments.timeout, ranks)
        unsolved = [r for r in records if r["verdict"] not in measure.SOLVED]
        wrong = problems(records, known, arguments.timeout)
        failed |= bool(wrong) or len(unsolved) > 1 or len(records) < len(chosen)
        seconds = statistics.median(r["seconds"]["total"] for r in records)
        solved = f"{len(records) - len(unsolved)} of {len(chosen)} solved"
        print(f"{ranks} ranks: {solved}, median {seconds:.1f} s, {len(wrong)} problems")
        for text in [*wrong, *(f"unsolved: {json.dumps(r['vnnlib']['path'])} {r['reason']}" for r in unsolved)]:
            print(f"  {text}")
    return not failed


# -------------------------------------------------------------------------------------------------------------- stress


@dataclass(frozen=True)
class Run:
    """One query and how it is shared."""

    onnx: Path
    vnnlib: Path
    settings: tuple[str, ...] = ()

    def command(self, device: str) -> list[str]:
        words = ["verify", "--onnx", self.onnx, "--vnnlib", self.vnnlib, "--timeout", str(STRESS_SECONDS)]
        return measure.verifier(*words, "--device", device, settings=("threads=1", *self.settings))

    @property
    def label(self) -> str:
        return f"{self.vnnlib.name} {' '.join(s.removeprefix('parallel.') for s in self.settings)}"


def examples() -> list[Run]:
    """The queries in ``examples/instances.csv``."""
    with (measure.EXAMPLES / "instances.csv").open() as stream:
        return [Run(measure.EXAMPLES / row[0], measure.EXAMPLES / row[1]) for row in csv.reader(stream) if row]


def shared(run: Run, rng: random.Random) -> Run:
    """The same query on several ranks."""
    ranks = rng.choice([2, 3, 4])
    backend = rng.choice(["single", "fsdp", "tp"])
    groups = rng.choice([d for d in range(1, ranks + 1) if ranks % d == 0 and not (backend == "tp" and d == ranks)])
    settings = [f"parallel.ranks={ranks}", f"parallel.backend={backend}", f"parallel.domains={groups}"]
    # Every kind of search that can decide the query, also where the strategy would do without.
    kinds = ["auto", "kfsb", "input"] if run.onnx.name.startswith("rings") else ["auto", "kfsb"]
    settings.append(f"bab.branching={rng.choice(kinds)}")
    if rng.random() < 0.5:
        settings.append("attack.enabled=false")
    return Run(run.onnx, run.vnnlib, tuple(settings))


def answer(run: Run, device: str) -> tuple[str, float]:
    """Verdict (``hang`` when it had to be ended), and seconds."""
    ended = measure.call(run.command(device), measure.environment({"OMP_NUM_THREADS": "1"}), STRESS_SECONDS + 10)
    if ended.code is None:
        return "hang", ended.seconds
    return (f"error: {ended.complaint}" if ended.code else ended.out.strip() or "error"), ended.seconds


def stress(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether no run hangs, fails or contradicts one rank."""
    rng = random.Random(options.seed)
    every = examples()
    known = {q.vnnlib: answer(q, options.device)[0] for q in every}
    for vnnlib, verdict in known.items():
        if verdict not in measure.SOLVED:
            parser.exit(1, f"{vnnlib.name}: one rank alone answers {verdict}\n")
    runs = [shared(rng.choice(every), rng) for _ in range(options.count)]
    bad, found, slowest = [], collections.Counter[str](), 0.0
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, (verdict, seconds) in zip(runs, pool.map(lambda r: answer(r, options.device), runs), strict=True):
            found[verdict.split(":")[0]] += 1
            slowest = max(slowest, seconds)
            if verdict != known[run.vnnlib]:
                bad.append(run)
                print(f"{run.label}: {verdict}, alone {known[run.vnnlib]} ({seconds:.1f} s)", flush=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(found.items()))
    print(f"{len(runs)} runs: {counts}; slowest {slowest:.1f} s; {len(bad)} problems")
    return not bad


# ---------------------------------------------------------------------------------------------------------------- main


def parser_of_all() -> argparse.ArgumentParser:
    parser = measure.parser_of(__doc__, sample=False)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("speed", help="how much faster several ranks search")
    one.add_argument("sample", type=Path, help="folder of category folders")
    one.add_argument("--categories", default="acasxu,mnist_fc")
    one.add_argument("--least", type=int, default=5000, help="domains that one rank needs")
    one.add_argument("--count", type=int, default=8, help="instances to measure")
    one.add_argument("--ranks", type=int, default=2)
    one.add_argument("--timeout", type=float, default=100.0)
    one.add_argument("--repeats", type=int, default=1)
    one.add_argument("--target", type=float, default=1.7)
    one.add_argument("--ceiling", action="store_true", help="also measure what the machine allows")
    one.add_argument("--out", type=Path, default=Path("results/domains"), help="records of the first runs")
    one.add_argument("--generate", type=int, metavar="N", help="write and use N random networks of each kind")
    one.set_defaults(work=speed)
    two = kinds.add_parser("verdicts", help="whether several ranks answer as one does")
    two.add_argument("sample", type=Path, help="folder of category folders")
    two.add_argument("--count", type=int, default=60)
    two.add_argument("--ranks", default="2,3")
    two.add_argument("--categories", default="acasxu,mnist_fc,oval21,sri_resnet_a")
    two.add_argument("--first", type=float, default=20.0)
    two.add_argument("--quick", type=float, default=15.0)
    two.add_argument("--timeout", type=float, default=60.0)
    two.add_argument("--jobs", type=int, default=1)
    two.add_argument("--out", type=Path, default=Path("results/ranks"))
    two.set_defaults(work=verdicts)
    for each in (one, two):
        measure.add_settings(each)
    many = kinds.add_parser("stress", help="small queries many times over")
    many.add_argument("--count", type=int, default=200)
    many.add_argument("--jobs", type=int, default=1, help="runs at a time")
    many.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    many.add_argument("--seed", type=int, default=0)
    many.set_defaults(work=stress)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    parser = parser_of_all()
    arguments = parser.parse_args(words)
    return 0 if arguments.work(parser, arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
