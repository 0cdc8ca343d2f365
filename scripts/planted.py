"""Networks with a planted counterexample that attacks by gradients do not find, and what the verifier makes of them.

    python scripts/planted.py make FOLDER [--count 40] [--seed 0] [--jobs 2]
    python scripts/planted.py verify FOLDER [--timeout 100] [--set KEY=VALUE ...]

``make`` trains small networks (MLPs and CNNs in turn, seeded) on random pictures. One of them has a second label at a
point near the border of its box; everywhere else in the box the network is trained to keep the first, most of all
where recent attacks have been (Zhou et al., *SoundnessBench*, 2024). A network is written once 100 restarts of
projected gradient descent do not find a counterexample, though the planted one is wrong by a margin.

``verify`` answers every instance in a process of its own and prints a table. Every instance is ``sat``: it exits 1 when
one is answered ``unsat``, or when fewer than ``--least`` are found.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.train_examples import save_onnx, save_property

RESTARTS = 100
_CLASSES = 2
_MARGIN = 0.05  # by which every point is wanted on its side
_STEEPNESS = 25.0  # of the first layer, by the radius
_ROUGHNESS = 1.5  # of the other hidden layers, by what torch begins with
_RATE, _EVERY, _LOOK = 2e-3, 5, 250  # learning rate; training steps between two attacks, and between two checks
_WINDOW, _NEW, _BATCH = 8192, 32, 256  # attacked points that are remembered, made each time, trained on
_STEPS = (1.0, 0.25, 0.05)  # of the attacks that a counterexample has to escape, as shares of the radius
_SPARED = 0.1  # of the radius: nearer to the planted point nothing is asked


@dataclass(frozen=True)
class Shape:
    """One kind of network: its input, and its layers."""

    name: str
    inputs: tuple[int, ...]
    epsilon: float
    steps: int = 2500

    def network(self) -> nn.Sequential:
        n = int(np.prod(self.inputs))
        if self.name.startswith("mlp"):
            hidden, width = (4, 48) if self.name == "mlp4" else (5, 48)
            sizes = [n, *[width] * hidden]
            layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, _CLASSES))
        side, channels = self.inputs[1], self.inputs[0]
        layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU()]
        if self.name == "cnn2":
            layers += [nn.Conv2d(6, 6, 3), nn.ReLU()]
            side -= 2
        tail = [6 * side * side, 64, 64, 48]
        dense = [m for a, b in itertools.pairwise(tail) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(48, _CLASSES))


SHAPES = (
    Shape("mlp4", (1, 5, 5), 0.2),
    Shape("cnn1", (1, 5, 5), 0.2),
    Shape("mlp4", (1, 6, 6), 0.5),
    Shape("cnn2", (1, 6, 6), 0.5),
    Shape("mlp5", (1, 5, 5), 0.1),
)


@dataclass(frozen=True)
class Planted:
    """A trained network with its box; ``point`` (1, *inputs) lies inside and is classified as 1, the centre as 0."""

    network: nn.Sequential
    centre: Tensor
    epsilon: float
    point: Tensor

    def margin(self, x: Tensor) -> Tensor:
        """(P,): how far the wrong label is ahead."""
        y = self.network(x)
        return y[:, 1] - y[:, 0]


def descend(found: Planted, restarts: int, steps: int, generator: torch.Generator, step: float) -> Tensor:
    """Points (restarts, *inputs) of projected gradient descent (Madry et al., ICLR 2018) from uniform starts, with
    sign steps from a share ``step`` of the radius down to a hundredth; each is the best its run has seen."""
    low, up = found.centre - found.epsilon, found.centre + found.epsilon
    x = low + (up - low) * torch.rand((restarts, *low.shape[1:]), generator=generator)
    best, top = x.clone(), torch.full((restarts,), -torch.inf)
    for k in range(steps + 1):
        x.requires_grad_()
        margin = found.margin(x)
        (slope,) = torch.autograd.grad(margin.sum(), x)
        better = margin.detach() > top
        top = torch.where(better, margin.detach(), top)
        best[better] = x.detach()[better]
        share = step * (1 - k / (steps + 1)) + 0.01
        x = (x.detach() + share * found.epsilon * slope.sign()).clamp(low, up)
    return best


def escapes(found: Planted, generator: torch.Generator, restarts: int = RESTARTS) -> bool:
    """Whether no run of an attack from random starts finds a counterexample, whatever its steps."""
    ends = (descend(found, restarts, 100, generator, step) for step in _STEPS)
    return all(bool((found.margin(x) < 0).all()) for x in ends)


def _steepen(network: nn.Sequential, scale: float) -> None:
    """Make hidden functions bend within the box, and often: a smooth network has no room for a narrow peak."""
    first, *others = (m for m in network if isinstance(m, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        first.weight.mul_(scale)
        if first.bias is not None:
            first.bias.mul_(5.0)
        for layer in others[:-1]:
            layer.weight.mul_(_ROUGHNESS)


def _raise_peak(network: nn.Sequential, point: Tensor, side: Tensor, epsilon: float) -> None:
    """Give a CNN a narrow peak at the point to start from, which training alone takes too long to make.

    One channel hands the input on, one neuron of the first linear layer is positive where the sum of all distances to
    the point is less than three radii, and one neuron of every later layer hands that on.
    """
    convs = [m for m in network if isinstance(m, nn.Conv2d)]
    linears = [m for m in network if isinstance(m, nn.Linear)]
    level, x = 4 * epsilon, point
    with torch.no_grad():
        for number, conv in enumerate(convs):
            conv.weight[0].zero_()
            conv.weight[0, 0, 1, 1] = 1.0
            assert conv.bias is not None
            conv.bias[0] = 0.0 if number else level
            if conv.padding[0] == 0:
                x, side = x[..., 1:-1, 1:-1], side[..., 1:-1, 1:-1]
        pixels = side.numel()
        first = linears[0]
        first.weight[0].zero_()
        first.weight[0, 0:pixels] = side.flatten() / epsilon
        first.bias[0] = 3.0 - ((x + level) * side).sum() / epsilon
        for layer in linears[1:-1]:
            layer.weight[0].zero_()
            layer.weight[0, 0], layer.bias[0] = 1.0, 0.0
        linears[-1].weight[:, 0] = torch.tensor([-1.0, 1.0])


def plant(seed: int, shape: Shape) -> Planted | None:
    """Train one network; None where no counterexample stays hidden within the steps there are."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    centre = (shape.epsilon * (torch.rand((1, *shape.inputs), generator=generator) * 2 - 1)).mul(1e3).round() / 1e3
    side = torch.randint(0, 2, centre.shape, generator=generator) * 2 - 1
    share = 0.98 + 0.02 * torch.rand(centre.shape, generator=generator)
    found = Planted(shape.network(), centre, shape.epsilon, centre + 0.999 * shape.epsilon * share * side)
    _steepen(found.network, _STEEPNESS / shape.epsilon)
    if shape.name.startswith("cnn"):
        _raise_peak(found.network, found.point, side, shape.epsilon)
    optimiser = torch.optim.Adam(found.network.parameters(), lr=_RATE)
    window = centre.clone()
    for k in range(1, shape.steps + 1):
        if k % _EVERY == 1:
            steps = int(torch.randint(5, 60, (1,), generator=generator))
            step = 2.0 * 0.02 ** float(torch.rand(1, generator=generator))
            new = descend(found, _NEW, steps, generator, step)
            far = (new - found.point).abs().flatten(1).amax(1) > _SPARED * shape.epsilon
            window = torch.cat([new[far], window])[:_WINDOW]
        some = window[torch.randint(0, len(window), (_BATCH,), generator=generator)]
        wrong = torch.relu(found.margin(torch.cat([centre, window[:_NEW], some])) + _MARGIN)
        loss = wrong.sum() / (wrong > 0).sum().clamp(min=1) + 0.2 * wrong.max()
        loss = loss + torch.relu(_MARGIN - found.margin(found.point)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        optimiser.param_groups[0]["lr"] = _RATE * (1 - 0.95 * k / shape.steps)
        if k % _LOOK == 0 and _hidden(found, torch.Generator().manual_seed(seed + k)):
            return found
    return None


def _hidden(found: Planted, generator: torch.Generator) -> bool:
    """Whether the planted point is a counterexample by a margin, the centre is none, and no attack finds one."""
    with torch.no_grad():
        holds = found.margin(found.point).item() > _MARGIN / 5 and found.margin(found.centre).item() < 0
    return holds and escapes(found, generator)


def _make_one(number: int, seed: int, folder: Path) -> str:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shape = SHAPES[number % len(SHAPES)]
    began = time.monotonic()
    for attempt in range(5):
        found = plant(seed + 1000 * number + attempt, shape)
        if found is not None:
            break
    else:
        return f"{number}: no counterexample stays hidden in a {shape.name}"
    name = f"{number:02d}_{shape.name}_{shape.inputs[0]}x{shape.inputs[1]}"
    save_onnx(found.network.eval(), shape.inputs, folder / f"{name}.onnx")
    low, up = (found.centre.numpy().astype(np.float64) + s * shape.epsilon for s in (-1, 1))
    save_property(folder / f"{name}.vnnlib", "A counterexample is planted here.", low, up, 0, _CLASSES)
    np.save(folder / f"{name}.npy", found.point.numpy())
    margin, spent = found.margin(found.point).item(), time.monotonic() - began
    return f"{name}: attempt {attempt + 1}, {spent:.0f} s, margin {margin:.3f}"


def make(folder: Path, count: int, seed: int, jobs: int) -> None:
    """Write the instances and their list."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs) as pool:
        for line in pool.map(partial(_make_one, seed=seed, folder=folder), range(count)):
            print(line, flush=True)
    with (folder / "instances.csv").open("w", newline="", encoding="utf-8") as file:
        names = sorted(p.stem for p in folder.glob("*.onnx"))
        csv.writer(file, lineterminator="\n").writerows([f"{n}.onnx", f"{n}.vnnlib", "100"] for n in names)


def verify(folder: Path, timeout: float, settings: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Verdict and seconds by instance, printed as they come."""
    answers: dict[str, tuple[str, float]] = {}
    extra = [word for setting in settings for word in ("--set", setting)]
    for onnx in sorted(folder.glob("*.onnx")):
        began = time.monotonic()
        files = ["--onnx", str(onnx), "--vnnlib", str(onnx.with_suffix(".vnnlib"))]
        command = [sys.executable, "-m", "verifier", "verify", *files, "--timeout", f"{timeout:g}", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        verdict = (done.stdout.split() or ["error"])[0]
        answers[onnx.stem] = verdict, time.monotonic() - began
        print(f"| {onnx.stem} | {verdict} | {answers[onnx.stem][1]:.1f} |", flush=True)
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker, checker = commands.add_parser("make"), commands.add_parser("verify")
    for each in (maker, checker):
        each.add_argument("folder", type=Path)
    maker.add_argument("--count", type=int, default=40)
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--jobs", type=int, default=1)
    checker.add_argument("--timeout", type=float, default=100.0)
    checker.add_argument("--least", type=int, default=24, help="instances that have to be found")
    checker.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, arguments.count, arguments.seed, arguments.jobs)
        return 0
    print("| instance | verdict | seconds |\n|---|---|---:|")
    answers = verify(arguments.folder, arguments.timeout, arguments.set)
    verdicts = [verdict for verdict, _ in answers.values()]
    found, wrong = verdicts.count("sat"), verdicts.count("unsat")
    print(f"\n{found} of {len(verdicts)} found, {wrong} answered unsat")
    return int(wrong > 0 or found < arguments.least)


if __name__ == "__main__":
    sys.exit(main())
