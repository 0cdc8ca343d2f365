"""Measures how much faster several ranks search than one: branch and bound on queries that end in ``unsat``.

    python scripts/bench_domains.py SAMPLE [--categories acasxu,mnist_fc | --generate 4] [--least 5000] [--count 8]
                                    [--ranks 2] [--timeout 100] [--repeats 1] [--ceiling] [--set KEY=VALUE ...]

SAMPLE holds one folder per category (``instances.csv``, ``onnx/``, ``vnnlib/``). A first run of every instance with one
rank of one thread finds those that are proved with at least ``--least`` domains; its records are kept in ``--out`` and
used again. These are then searched with one rank and with ``--ranks`` ranks of one thread each, in turn, ``--repeats``
times, and the median times from the first split on are compared. ``--ceiling`` also runs as many searches of one rank
side by side: what they lose to each other is the machine's, not the search's. ``--generate N`` first writes N random
networks to each of SAMPLE/neurons and SAMPLE/inputs, with thresholds somewhat below the least value that descent finds,
and takes these categories. Exits 1 when the median speed-up is below ``--target``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# The search alone is measured; queries that an attack settles are not looked for.
SETTINGS = ("device=cpu", "threads=1", "attack.enabled=false")


@dataclass(frozen=True)
class Instance:
    """A query by its absolute paths."""

    category: str
    onnx: Path
    vnnlib: Path

    @property
    def name(self) -> str:
        return f"{self.category} {self.onnx.stem} {self.vnnlib.stem}"


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


def instances(sample: Path, category: str) -> list[Instance]:
    """All queries of a category, in order."""
    folder = (sample / category).resolve()
    with (folder / "instances.csv").open(newline="", encoding="utf-8") as file:
        return [Instance(category, folder / row[0], folder / row[1]) for row in csv.reader(file) if row]


def read(record: dict[str, Any]) -> Search:
    """From the JSON record of one query."""
    seconds = sum(v for name, v in record["seconds"].items() if name.startswith("branch and bound"))
    parts = [p for p in record["statistics"].values() if isinstance(p, dict) and "domains" in p]
    groups = [g for p in parts for g in p.get("groups", [])]
    size = max((len(p.get("groups", [])) for p in parts), default=0)
    shares = tuple(sum(p["groups"][i]["domains"] for p in parts if p.get("groups")) for i in range(size))
    return Search(record["verdict"], seconds, record["domains"] or 0, shares, sum(g["received"] for g in groups))


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
    import torch

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
        save_onnx(folder / "onnx" / f"{name}.onnx", layers)
        threshold = below_least(layers, family, noise)
        lines = [f"(declare-const X_{i} Real)" for i in range(family.inputs)] + ["(declare-const Y_0 Real)"]
        for i in range(family.inputs):
            lines += [f"(assert (>= X_{i} {-family.radius}))", f"(assert (<= X_{i} {family.radius}))"]
        lines.append(f"(assert (<= Y_0 {threshold:.6f}))")
        (folder / "vnnlib" / f"{name}.vnnlib").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [f"onnx/{name}.onnx,vnnlib/{name}.vnnlib,{timeout}\n" for name in names]
    (folder / "instances.csv").write_text("".join(rows), encoding="utf-8")


def save_onnx(path: Path, layers: Sequence[tuple[Any, Any]]) -> None:
    """Linear layers (weight, bias) with ReLUs between them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, tensors, value = [], [], "x"
    for i, (weight, bias) in enumerate(layers):
        tensors += [numpy_helper.from_array(weight.numpy(), f"w{i}"), numpy_helper.from_array(bias.numpy(), f"b{i}")]
        last = i == len(layers) - 1
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], ["y" if last else f"z{i}"], transB=1))
        if not last:
            nodes.append(helper.make_node("Relu", [f"z{i}"], [value := f"a{i}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", layers[0][0].shape[1]), ("y", layers[-1][0].shape[0]))
    ]
    graph = helper.make_graph(nodes, path.stem, ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))


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


def start(
    instance: Instance, ranks: int, timeout: float, settings: Sequence[str], path: Path
) -> subprocess.Popen[bytes]:
    """Start a query; its record goes to ``path``."""
    path.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "verifier",
        "verify",
        "--onnx",
        str(instance.onnx),
        "--vnnlib",
        str(instance.vnnlib),
    ]
    command += ["--timeout", str(timeout), "--json", str(path), "--set", f"parallel.ranks={ranks}"]
    command += [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes], path: Path) -> Search:
    process.wait()
    return read(json.loads(path.read_text(encoding="utf-8")))


def side_by_side(count: int, instance: Instance, timeout: float, settings: Sequence[str], out: Path) -> float:
    """Mean seconds of as many searches of one rank at a time."""
    paths = [out / f"beside{i}.json" for i in range(count)]
    running = [start(instance, 1, timeout, settings, path) for path in paths]
    return statistics.mean(finish(p, path).seconds for p, path in zip(running, paths, strict=True))


def suitable(found: Sequence[Instance], arguments: argparse.Namespace) -> list[Instance]:
    """Those that one rank proves with enough domains, by rising time; ends early once there are enough."""
    chosen: list[tuple[float, Instance]] = []
    for instance in found:
        path = arguments.out / f"{instance.name.replace(' ', '_')}.json"
        if path.is_file():
            first = read(json.loads(path.read_text(encoding="utf-8")))
        else:
            first = finish(start(instance, 1, arguments.timeout, arguments.settings, path), path)
        fits = first.verdict == "unsat" and first.domains >= arguments.least
        print(f"{'+' if fits else '-'} {instance.name}: {first.verdict}, {first.domains} domains", file=sys.stderr)
        if fits:
            chosen.append((first.seconds, instance))
        if len(chosen) == arguments.count:
            break
    return [instance for _, instance in sorted(chosen, key=lambda pair: pair[0])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="folder of category folders")
    parser.add_argument("--categories", default="acasxu,mnist_fc")
    parser.add_argument("--least", type=int, default=5000, help="domains that one rank needs")
    parser.add_argument("--count", type=int, default=8, help="instances to measure")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--target", type=float, default=1.7)
    parser.add_argument("--ceiling", action="store_true", help="also measure what the machine allows")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("results/domains"), help="records of the first runs")
    parser.add_argument("--generate", type=int, metavar="N", help="write and use N random networks of each kind")
    arguments = parser.parse_args()
    if arguments.generate:
        arguments.categories = ",".join(f.name for f in FAMILIES)
        for family in FAMILIES:
            write(family, arguments.sample / family.name, arguments.generate, arguments.timeout)
    arguments.out.mkdir(parents=True, exist_ok=True)

    found = [i for c in arguments.categories.split(",") for i in instances(arguments.sample, c.strip())]
    chosen = suitable(found, arguments)
    if not chosen:
        print(f"no instance is proved with {arguments.least} domains in {arguments.timeout:g} s", file=sys.stderr)
        return 1
    columns = [
        "instance",
        "domains",
        f"domains x{arguments.ranks}",
        "of each rank",
        "moved",
        "s",
        f"s x{arguments.ranks}",
    ]
    columns += ["speed-up", *(["ceiling"] if arguments.ceiling else [])]
    print("| " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) - 1) + "|")
    gains: dict[str, list[float]] = {}
    for instance in chosen:
        one, many, ceiling = measure(instance, arguments)
        gain = statistics.median(s.seconds for s in one) / statistics.median(s.seconds for s in many)
        last = many[-1]
        cells = [instance.name, one[-1].domains, last.domains, "/".join(map(str, last.shares)), last.moved]
        cells += [f"{statistics.median(s.seconds for s in runs):.2f}" for runs in (one, many)]
        cells += [f"{gain:.2f}", *([f"{ceiling:.2f}"] if arguments.ceiling else [])]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        if any(s.verdict != "unsat" for s in (*one, *many)):
            print(f"PROBLEM {instance.name}: {sorted({s.verdict for s in (*one, *many)})}", file=sys.stderr)
            return 1
        gains.setdefault(instance.category, []).append(gain)
    for category, some in gains.items():
        print(f"{category}: median {statistics.median(some):.2f} of {len(some)}")
    found_gains = [gain for some in gains.values() for gain in some]
    median, load = statistics.median(found_gains), os.getloadavg()[0]
    print(f"median speed-up of {arguments.ranks} ranks, {len(found_gains)} instances: {median:.2f}; load {load:.1f}")
    return 0 if median >= arguments.target else 1


def measure(instance: Instance, arguments: argparse.Namespace) -> tuple[list[Search], list[Search], float]:
    """Searches of one rank and of many, in turn, and the speed-up that the machine allows (1.0 when not measured)."""
    one: list[Search] = []
    many: list[Search] = []
    beside: list[float] = []
    for _ in range(arguments.repeats):
        for ranks, runs in ((1, one), (arguments.ranks, many)):
            path = arguments.out / f"ranks{ranks}.json"
            runs.append(finish(start(instance, ranks, arguments.timeout, arguments.settings, path), path))
        if arguments.ceiling:
            beside.append(side_by_side(arguments.ranks, instance, arguments.timeout, arguments.settings, arguments.out))
    alone = statistics.median(s.seconds for s in one)
    return one, many, arguments.ranks * alone / statistics.median(beside) if beside else 1.0


if __name__ == "__main__":
    sys.exit(main())
