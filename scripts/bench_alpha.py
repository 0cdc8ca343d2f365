"""What optimising slopes gains and costs on small networks of several kinds.

    python scripts/bench_alpha.py [--only vit,lstm] [--method alpha-crown] [--limit 60]

Every network is made from a fixed seed. One line each: the mean width of its outputs by CROWN and by alpha-CROWN, by
how much the second is smaller, the steps of the optimisation (backward walks that keep coefficients) and their rows,
seconds on one thread, and the verdict and the seconds of a query whose threshold lies between both bounds and the
smallest value that sampling finds. Counted work is the same on every machine, seconds are not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from verifier import api
from verifier.bounding import Method, compute_bounds
from verifier.bounds import climb
from verifier.spec.build import from_box


class Vit(nn.Module):
    """One block with attention over patches, layer norm and a GELU layer, and a classifier."""

    def __init__(self, tokens: int = 10, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.tokens, self.width, self.heads = tokens, width, heads
        self.embed = nn.Linear(12, width)
        self.norm, self.norm2 = nn.BatchNorm1d(tokens), nn.BatchNorm1d(tokens)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.reshape(1, self.tokens, 12))
        q, k, v = self.qkv(self.norm(h)).reshape(1, self.tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.transpose(-1, -2) / (self.width // self.heads) ** 0.5, -1)
        h = h + self.out((a @ v).transpose(1, 2).reshape(1, self.tokens, self.width))
        h = h + self.down(torch.relu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


class Loop(nn.Module):
    """A unicycle that a small network steers for some steps."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.policy = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, s: Tensor) -> Tensor:
        for _ in range(self.steps):
            u = self.policy(s)
            x, y, angle, v = (s[:, i : i + 1] for i in range(4))
            s = torch.cat(
                [
                    x + 0.1 * v * torch.cos(angle),
                    y + 0.1 * v * torch.sin(angle),
                    angle + 0.1 * u[:, :1],
                    v + 0.1 * u[:, 1:],
                ],
                1,
            )
        return s


class Lstm(nn.Module):
    """A recurrent cell over some steps, written out."""

    def __init__(self, steps: int = 4, inputs: int = 4, width: int = 16) -> None:
        super().__init__()
        self.steps, self.inputs, self.width = steps, inputs, width
        self.gates, self.head = nn.Linear(inputs + width, 4 * width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(1, self.width)
        for t in range(self.steps):
            i, f, g, o = self.gates(torch.cat([x[:, t * self.inputs : (t + 1) * self.inputs], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 5)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 7 * 7, 60), nn.ReLU(), nn.Linear(60, 5)),
    )


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Sigmoid(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4)
    )


# Network, shape of a sample, radius of the box.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "perceptron": (perceptron, (1, 30), 0.08),
    "convolutions": (convolutions, (1, 1, 28, 28), 0.03),
    "smooth": (smooth, (1, 20), 0.15),
    "vit": (Vit, (1, 120), 0.03),
    "loop": (Loop, (1, 4), 0.1),
    "lstm": (Lstm, (1, 16), 0.1),
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Steps of optimisations, and rows times steps."""
    totals, own = [0, 0], climb.backward

    def backward(*args: object, **options: object) -> object:
        walk = own(*args, **options)  # type: ignore[arg-type]
        totals[0] += 1
        totals[1] += int(next(iter(walk.kept.values())).shape[1]) if walk.kept else 0
        return walk

    climb.backward = backward  # type: ignore[assignment]
    try:
        yield totals
    finally:
        climb.backward = own


def row(name: str, method: api.Method, limit: float) -> dict[str, object]:
    """One line of the table."""
    make, shape, radius = NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    centre = torch.rand(shape)
    low, up = (centre - radius).numpy(), (centre + radius).numpy()
    settings = {"device": "cpu", "threads": 1}

    def width(kind: Method) -> float:
        found = compute_bounds(module, low, up, kind, config=settings)
        return float((found.upper - found.lower).mean())

    plain = width("crown")
    with counted() as steps:
        start = time.monotonic()
        tight = width(method)
        seconds = time.monotonic() - start
    out: dict[str, object] = {
        "network": name,
        "CROWN": round(plain, 5),
        "alpha": round(tight, 5),
        "gain %": round(100 * (1 - tight / plain), 2),
        "steps": steps[0],
        "row steps": steps[1],
        "seconds": round(seconds, 1),
    }
    return {**out, **query(module, low, up, settings, limit)}


def query(
    module: nn.Module, low: np.ndarray, up: np.ndarray, settings: dict[str, object], limit: float
) -> dict[str, object]:
    """A property that holds by half of what CROWN lacks: y_0 stays above a number."""
    bounds = compute_bounds(module, low, up, "crown", config=settings)
    with torch.no_grad():
        points = torch.from_numpy(low + np.random.default_rng(0).random((2000, *low.shape[1:])) * (up - low)).float()
        least = min(float(module(p[None])[0, 0]) for p in points[:400])
    threshold = 0.6 * float(bounds.lower.flatten()[0]) + 0.4 * least
    row = [1.0] + [0.0] * (bounds.lower.numel() - 1)
    problem = from_box(low, up, [[(row, threshold)]], len(row))
    with counted() as steps:
        start = time.monotonic()
        result = api.verify(module, problem, settings, limit, input_shape=low.shape)
    return {
        "verdict": result.verdict.value,
        "root": round(result.seconds.get("root bounds", 0.0), 1),
        "query steps": steps[0],
        "query seconds": round(time.monotonic() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, commas between")
    parser.add_argument("--method", default="alpha-crown", choices=("crown", "alpha-crown"))
    parser.add_argument("--limit", type=float, default=40.0, help="seconds of a query")
    given = parser.parse_args()
    torch.set_num_threads(1)
    header = False
    for name in given.only.split(","):
        line = row(name, given.method, given.limit)
        if not header:
            print(" | ".join(line), flush=True)
            header = True
        print(" | ".join(str(v) for v in line.values()), flush=True)


if __name__ == "__main__":
    main()
