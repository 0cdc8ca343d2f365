"""Small networks with smooth nonlinearities and many inputs: what splits of values decide.

    python scripts/bench_splits.py [--seconds 20] [--instances 2] [--families sigmoid,attention]

Every instance asks whether one output of a random network can fall to a threshold that lies a given share of the way
from the smallest sampled value down to the root's alpha-CROWN bound: the root decides none of them, and with few
exceptions they hold. Each is answered with ``bab.value_splits`` off and on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from verifier.api import verify
from verifier.bounding import compute_bounds
from verifier.core.problem import Problem
from verifier.core.result import Result


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Bilinear(nn.Module):
    """Products of two layers, as power-flow equations have them, with sines."""

    def __init__(self, n_in: int, hidden: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(n_in, hidden), nn.Linear(n_in, hidden)
        self.angle, self.out = nn.Linear(n_in, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.left(x)) * self.right(x) * torch.sin(self.angle(x)))


class Gated(nn.Module):
    """ReLUs, a gate of sigmoids and their product."""

    def __init__(self, n_in: int, hidden: int) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Linear(n_in, hidden), nn.Linear(n_in, hidden), nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)) * torch.sigmoid(self.gate(x))
        return self.out(torch.relu(self.second(h)))


class Cell(nn.Module):
    """An LSTM cell written out, unrolled over some steps."""

    def __init__(self, n_in: int, hidden: int, steps: int) -> None:
        super().__init__()
        self.hidden, self.steps, self.width = hidden, steps, n_in // steps
        self.x, self.h = nn.Linear(self.width, 4 * hidden), nn.Linear(hidden, 4 * hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x[:, : self.hidden] * 0
        for step in range(self.steps):
            gates = self.x(x[:, step * self.width : (step + 1) * self.width]) + self.h(h)
            i, f, g, o = gates.split(self.hidden, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


class Attention(nn.Module):
    """One head over a few tokens, with a ReLU layer after it."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.first, self.out = nn.Linear(width, 2 * width), nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        t = x.reshape(1, self.tokens, self.width)
        scores = self.q(t) @ self.k(t).transpose(1, 2) / math.sqrt(self.width)
        t = t + torch.softmax(scores, -1) @ self.v(t)
        return self.out(torch.relu(self.first(t.mean(1))))


def mlp(act: Callable[[], nn.Module], n_in: int, widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(n_in, width), act()]
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, 1))


@dataclass(frozen=True)
class Family:
    """Networks of one kind.

    Attributes:
        make: a network; ``n_in`` inputs, boxes of radius ``eps``; ``gain`` times the default weights.
        share: of the way from the sampled minimum to the root's bound at which the threshold lies.
    """

    make: Callable[[], nn.Module]
    n_in: int
    eps: float
    gain: float
    share: float


FAMILIES = {
    "sigmoid": Family(lambda: mlp(nn.Sigmoid, 784, [40, 40]), 784, 0.03, 3.0, 0.5),
    "tanh": Family(lambda: mlp(nn.Tanh, 784, [30, 30]), 784, 0.01, 3.0, 0.5),
    "sine": Family(lambda: mlp(Sine, 100, [30, 30]), 100, 0.05, 2.0, 0.5),
    "gelu": Family(lambda: mlp(nn.GELU, 784, [40, 40]), 784, 0.02, 3.0, 0.5),
    "bilinear": Family(lambda: Bilinear(60, 20), 60, 0.1, 2.0, 0.5),
    "gated": Family(lambda: Gated(100, 20), 100, 0.1, 2.0, 0.5),
    "lstm": Family(lambda: Cell(60, 12, 3), 60, 0.2, 2.0, 0.5),
    "attention": Family(lambda: Attention(4, 8), 32, 0.1, 2.0, 0.5),
}


@dataclass(frozen=True)
class Instance:
    """One question: whether the only output can be at most ``threshold`` on a box."""

    family: str
    module: nn.Module
    lower: np.ndarray
    upper: np.ndarray
    threshold: float

    @property
    def problem(self) -> Problem:
        low, up = self.lower[None], self.upper[None]
        case = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
        return Problem(low, up, low, up, np.ones((1, 1)), None, np.array([self.threshold]), *case)


def instance(name: str, seed: int) -> Instance:
    family = FAMILIES[name]
    torch.manual_seed(seed)
    module = family.make().eval()
    with torch.no_grad():
        for p in module.parameters():
            p *= family.gain
        x = torch.rand(1, family.n_in)
        lower, upper = (x - family.eps).numpy()[0], (x + family.eps).numpy()[0]
        least = sampled_least(module, torch.tensor(lower)[None], torch.tensor(upper)[None])
        bound = float(compute_bounds(module, lower[None], upper[None], "alpha-crown").lower.reshape(-1)[0])
    return Instance(name, module, lower, upper, least - family.share * (least - bound))


def sampled_least(module: nn.Module, lower: Tensor, upper: Tensor, starts: int = 8, steps: int = 40) -> float:
    """The least value that descent by signs finds."""
    best = math.inf
    for _ in range(starts):
        x = lower + torch.rand_like(lower) * (upper - lower)
        for step in range(steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = module(x).sum()
                (g,) = torch.autograd.grad(y, x)
            best = min(best, float(y))
            x = torch.minimum(torch.maximum(x - (upper - lower) * 0.25 * 0.9**step * g.sign(), lower), upper)
    return best


def instances(names: list[str], count: int) -> Iterator[Instance]:
    for name in names:
        for seed in range(count):
            yield instance(name, seed)


def domains(result: Result) -> int:
    kinds = ("input_split", "relu_split", "value_split")
    return sum(int(result.statistics.get(kind, {}).get("domains", 0)) for kind in kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of a query")
    parser.add_argument("--instances", type=int, default=2, help="of every family")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names with commas between them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | seed | threshold | off | domains | s | on | domains | s |\n|---|---|---|---|---|---|---|---|---|")
    for name in args.families.split(","):
        for seed in range(args.instances):
            found = instance(name, seed)
            cells = []
            for on in (False, True):
                began = time.monotonic()
                result = verify(found.module, found.problem, {"bab.value_splits": on}, timeout=args.seconds)
                cells += [str(result.verdict), str(domains(result)), f"{time.monotonic() - began:.1f}"]
            print(f"| {name} | {seed} | {found.threshold:.4g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
