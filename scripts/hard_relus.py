"""Small hard ReLU networks with known verdicts: makes them, answers them, prints the table.

    python scripts/hard_relus.py OUT [--disguise SAMPLE:CATEGORY] [--timeout 100] [--seconds 120] [--only-make]
                                 [--seed 0] [--set KEY=VALUE ...]

OUT becomes a folder as ``bench_vnncomp.py`` takes it. ``real_relu`` has networks of one and two hidden layers with
random and with trained weights; a mixed-integer program (HiGHS) finds the least value of an output where the others
keep their limits, and the threshold lies a little below it (``unsat``) or above it (``sat``). With ``--disguise`` the
networks of a category that are chains of Gemm and Relu come again as ``disguised``: hidden units permuted, and rows
scaled by positive factors that the next layer undoes. Factors are powers of two where the verdict is ``sat``, since
rounding could take a counterexample away.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.networks import OnnxWriter

Layers = list[tuple[np.ndarray, np.ndarray]]

# (free inputs, widths of hidden layers, trained, rows)
SHAPES: tuple[tuple[int, tuple[int, ...], bool, int], ...] = (
    (24, (40,), False, 1),
    (20, (36,), False, 2),
    (12, (40,), True, 1),
    (20, (36,), True, 2),
    (12, (20, 20), False, 1),
    (24, (24, 16), False, 2),
    (24, (24, 24), True, 1),
    (24, (20, 20), True, 2),
)
# The share of an output's spread that lies between the least value and a threshold.
GAPS = {"unsat": (0.02, 0.1), "sat": (0.02, 0.02)}


@dataclass(frozen=True)
class Instance:
    """One query; ``name`` has no suffix."""

    name: str
    layers: Layers
    property: str
    verdict: str


# ------------------------------------------------------------------------------------------------------ real weights


def random_layers(shape: Sequence[int], rng: np.random.Generator) -> Layers:
    """Weights of the usual size, biases that leave units undecided on [-1, 1]."""
    return [
        (rng.normal(0, (2 / n) ** 0.5, (m, n)).astype(np.float32), rng.normal(0, 0.3, m).astype(np.float32))
        for n, m in itertools.pairwise(shape)
    ]


def trained_layers(shape: Sequence[int], seed: int) -> Layers:
    """A regression of products and waves of the inputs."""
    torch.manual_seed(seed)
    x = torch.rand(2000, shape[0]) * 2 - 1
    mixed = x @ torch.randn(shape[0], 2 * shape[-1])
    y = torch.sin(2 * mixed[:, : shape[-1]]) + mixed[:, shape[-1] :] * x[:, :1]
    modules = [m for n, k in itertools.pairwise(shape) for m in (nn.Linear(n, k), nn.ReLU())][:-1]
    net = nn.Sequential(*modules)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(400):
        optimiser.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimiser.step()
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in modules if isinstance(m, nn.Linear)]


def values(layers: Layers, x: np.ndarray) -> np.ndarray:
    """Outputs at points (N, n)."""
    for k, (w, b) in enumerate(layers):
        x = x @ w.T.astype(np.float64) + b
        x = x if k == len(layers) - 1 else np.maximum(x, 0)
    return x


def least(layers: Layers, limits: np.ndarray, seconds: float) -> float | None:
    """Least first output on [-1, 1]^n where the others are at most ``limits``; None when it takes too long."""
    n, hidden = layers[0][0].shape[1], sum(w.shape[0] for w, _ in layers[:-1])
    size = n + 2 * hidden
    matrix: list[np.ndarray] = []
    most: list[float] = []
    low, high = np.full(n, -1.0), np.ones(n)
    before, at = slice(0, n), n
    upper = np.concatenate([np.ones(n), np.full(hidden, np.inf), np.ones(hidden)])
    for w, b in layers[:-1]:
        middle, radius = w @ ((low + high) / 2) + b, np.abs(w) @ ((high - low) / 2) + 1e-6
        bottom, top = np.minimum(middle - radius, 0), np.maximum(middle + radius, 0)
        for k in range(len(b)):
            for of_z, of_h, of_phase, limit in (
                (1, -1, 0.0, -b[k]),
                (-1, 1, -bottom[k], b[k] - bottom[k]),
                (0, 1, -top[k], 0.0),
            ):
                line = np.zeros(size)
                line[before] = of_z * w[k]
                line[at + k], line[at + hidden + k] = of_h, of_phase
                matrix.append(line)
                most.append(limit)
        before, low, high = slice(at, at + len(b)), np.zeros(len(b)), top
        at += len(b)
    w, b = layers[-1]
    for row, limit, shift in zip(w[1:], limits, b[1:], strict=True):
        line = np.zeros(size)
        line[before] = row
        matrix.append(line)
        most.append(limit - shift)
    cost, whole = np.zeros(size), np.zeros(size)
    cost[before], whole[n + hidden :] = w[0], 1
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(matrix), -np.inf, np.array(most)),  # pyright: ignore[reportArgumentType]
        integrality=whole,
        bounds=Bounds(np.concatenate([np.full(n, -1.0), np.zeros(2 * hidden)]), upper),  # pyright: ignore[reportArgumentType]
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    return float(found.fun + b[0]) if found.status == 0 else None


def real(seed: int, seconds: float) -> Iterator[Instance]:
    """Networks whose least value a program finds in time."""
    for number, (inputs, widths, trained, rows) in enumerate(SHAPES):
        rng = np.random.default_rng((seed, number))
        shape = (inputs, *widths, rows)
        layers = trained_layers(shape, seed + number) if trained else random_layers(shape, rng)
        sample = values(layers, rng.uniform(-1, 1, (4096, inputs)))
        limits = np.quantile(sample[:, 1:], 0.2, axis=0)
        minimum = least(layers, limits, seconds)
        if minimum is None:
            print(f"{shape}: no least value in {seconds:g} s")
            continue
        spread = float(np.quantile(sample[:, 0], 0.5) - minimum)
        for verdict, gaps in GAPS.items():
            for gap in gaps[: 1 if verdict == "sat" else 2]:
                threshold = minimum + gap * spread * (1 if verdict == "sat" else -1)
                kind = "trained" if trained else "random"
                name = f"{kind}_{'x'.join(map(str, shape))}_{verdict}_{round(100 * gap)}"
                yield Instance(name, layers, property_of(inputs, [threshold, *limits]), verdict)


def property_of(inputs: int, thresholds: Sequence[float]) -> str:
    """Every output is at most its threshold, for some input of [-1, 1]^n."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(len(thresholds))]
    lines += [f"(assert (>= X_{i} -1.0))\n(assert (<= X_{i} 1.0))" for i in range(inputs)]
    lines += [f"(assert (<= Y_{j} {t:.9f}))" for j, t in enumerate(thresholds)]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- disguises


def chain(path: Path) -> Layers | None:
    """The layers of a chain of Gemm and Relu; None for another network."""
    graph = onnx.load(path).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    kinds = [n.op_type for n in graph.node]
    if kinds != ["Gemm", "Relu"] * (len(kinds) // 2) + ["Gemm"]:
        return None
    layers: Layers = []
    for node in graph.node[::2]:
        options = {a.name: a for a in node.attribute}
        weight = stored[node.input[1]]
        layers.append((weight if "transB" in options and options["transB"].i else weight.T, stored[node.input[2]]))
    return layers


def disguise(layers: Layers, rng: np.random.Generator, exact: bool) -> Layers:
    """The same function with its hidden units in another order and of another size.

    Args:
        exact: factors are powers of two.
    """
    out = [(w.copy(), b.copy()) for w, b in layers]
    for k in range(len(out) - 1):
        (w, b), (after, shift) = out[k], out[k + 1]
        order, factor = rng.permutation(len(b)), np.exp2(rng.uniform(-2, 2, len(b)))
        factor = (np.exp2(np.round(np.log2(factor))) if exact else factor).astype(np.float32)
        out[k] = (w[order] * factor[:, None], b[order] * factor)
        out[k + 1] = (after[:, order] / factor, shift)
    return out


def disguised(sample: Path, category: str, seed: int) -> Iterator[Instance]:
    """The instances of a category with a known verdict."""
    with (sample / "verdicts.csv").open(encoding="utf-8", newline="") as file:
        known = [row for row in csv.DictReader(file) if row["category"] == category]
    for number, row in enumerate(known):
        layers = chain(sample / row["onnx"])
        if layers is None or row["verdict"] not in ("sat", "unsat"):
            continue
        changed = disguise(layers, np.random.default_rng((seed, number)), row["verdict"] == "sat")
        text = (sample / row["vnnlib"]).read_text(encoding="utf-8")
        yield Instance(Path(row["onnx"]).stem, changed, text, row["verdict"])


# ------------------------------------------------------------------------------------------------------------ files


def write(out: Path, category: str, instances: Sequence[Instance], timeout: float) -> list[list[str]]:
    """One category; its lines of ``verdicts.csv``."""
    folder, lines, verdicts = out / category, [], []
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("onnx", "vnnlib"):
        (folder / part).mkdir(parents=True)
    for one in instances:
        net, text = f"onnx/{one.name}.onnx", f"vnnlib/{one.name}.vnnlib"
        writer = OnnxWriter((one.layers[0][0].shape[1],))
        x = "X"
        for k, (w, b) in enumerate(one.layers):
            x = writer.linear(x if k == 0 else writer.relu(x), np.ascontiguousarray(w), b)
        writer.save(folder / net, len(one.layers[-1][1]))
        (folder / text).write_text(one.property, encoding="utf-8")
        lines.append(f"{net},{text},{timeout:g}\n")
        verdicts.append([category, f"{category}/{net}", f"{category}/{text}", one.verdict])
    (folder / "instances.csv").write_text("".join(lines), encoding="utf-8")
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    text = __doc__ or ""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--disguise", metavar="SAMPLE:CATEGORY")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds of every query")
    parser.add_argument("--seconds", type=float, default=120.0, help="of a mixed-integer program")
    parser.add_argument("--only-make", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    made = {"real_relu": list(real(given.seed, given.seconds))}
    if given.disguise:
        sample, category = given.disguise.rsplit(":", 1)
        made["disguised"] = list(disguised(Path(sample), category, given.seed))
    verdicts = [["category", "onnx", "vnnlib", "verdict"]]
    for category, instances in made.items():
        verdicts += write(given.out, category, instances, given.timeout)
    with (given.out / "verdicts.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(verdicts)
    if given.only_make:
        return 0
    bench = [sys.executable, str(Path(__file__).with_name("bench_vnncomp.py")), str(given.out)]
    bench += ["--categories", ",".join(made), "--timeout", f"{given.timeout:g}", "--out", str(given.out / "results")]
    return subprocess.run([*bench, *(word for value in given.set for word in ("--set", value))], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
