"""Trains a residual network of 15 million parameters; finds a property that CROWN leaves open and alpha-CROWN proves.

    python scripts/train_resnet.py --out FOLDER [--width 64] [--size 32] [--steps 900] [--seed 0]

The images are made here: every class is a smooth colour pattern, an image is its class's pattern with another
contrast, a shift and noise. Training adds interval bounds of the logits to the loss, since without it no bound of a
network this deep says anything. The property is L-infinity robustness at 1/255 of a mixture of two images, which is
moved towards the decision boundary until CROWN no longer proves it. Written: ``resnet.onnx``, ``resnet.vnnlib``,
``resnet.json``. Same seed, same device, same torch, same files. Exit status 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.networks import Block, ResNet, save_resnet, save_robustness  # noqa: E402

if TYPE_CHECKING:
    from verifier.bounds.crown import BoundState

RADIUS = 1 / 255
ACCURACY = 0.9


@dataclass(frozen=True)
class Images:
    """A family of pictures, (3, size, size) in [0, 1], by class."""

    patterns: Tensor  # (classes, 3, size, size)

    @classmethod
    def make(cls, classes: int, size: int, seed: int, device: torch.device) -> Images:
        """Patterns are low frequencies with random phases, scaled to [0.15, 0.85]."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn((classes, 3, 5, 5), generator=generator)
        smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        low, high = smooth.amin((1, 2, 3), keepdim=True), smooth.amax((1, 2, 3), keepdim=True)
        return cls((0.15 + 0.7 * (smooth - low) / (high - low)).to(device))

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (count, 3, size, size) and labels; drawn on the CPU, so that every device sees the same ones."""
        classes, _, size, _ = self.patterns.shape
        device = self.patterns.device
        label = torch.randint(classes, (count,), generator=generator)
        contrast = 0.6 + 0.4 * torch.rand((count, 1, 1, 1), generator=generator)
        shift = torch.randint(-2, 3, (count, 2), generator=generator)
        noise = 0.05 * torch.randn((count, 3, size, size), generator=generator)
        x = self.patterns[label.to(device)]
        rows = (torch.arange(size)[None] + shift[:, :1]).clamp(0, size - 1).to(device)
        columns = (torch.arange(size)[None] + shift[:, 1:]).clamp(0, size - 1).to(device)
        index = torch.arange(count, device=device)[:, None, None]
        x = x.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        x = 0.5 + (x - 0.5) * contrast.to(device) + noise.to(device)
        return x.clamp(0, 1), label.to(device)


# ------------------------------------------------------------------------------------------------------- training


def intervals(network: ResNet, centre: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Centre and radius of interval bounds of the logits."""
    c, r = centre, torch.full_like(centre, radius)

    def affine(layer: nn.Module, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(layer, nn.Linear):
            return layer(c), F.linear(r, layer.weight.abs())
        assert isinstance(layer, nn.Conv2d)
        return layer(c), F.conv2d(r, layer.weight.abs(), None, layer.stride, layer.padding)

    def relu(c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (c - r).relu(), (c + r).relu()
        return (low + high) / 2, (high - low) / 2

    c, r = relu(*affine(network.stem, c, r))
    for block in network.blocks:
        assert isinstance(block, Block)
        skip = (c, r) if block.skip is None else affine(block.skip, c, r)
        branch = affine(block.second, *relu(*affine(block.first, c, r)))
        c, r = relu(skip[0] + branch[0], skip[1] + branch[1])
    return affine(network.head, *relu(*affine(network.hidden, c.flatten(1), r.flatten(1))))


def worst_logits(centre: Tensor, radius: Tensor, label: Tensor) -> Tensor:
    """Logits of the worst case that intervals allow: the label's smallest, all others' largest."""
    own = F.one_hot(label, centre.shape[1]).bool()
    return torch.where(own, centre - radius, centre + radius)


@dataclass(frozen=True)
class Training:
    """How long and how robustly to train.

    Attributes:
        robust: radius of the interval term at the end, in units of 1/255. Much less than 1 is enough: CROWN is that
            much tighter than intervals.
        weight: share of the interval term in the loss at the end.
    """

    steps: int
    batch: int
    rate: float
    robust: float
    weight: float


def train(network: ResNet, images: Images, how: Training, seed: int) -> None:
    """Adam, first on clean images; from a third of the steps on radius and weight of the interval term grow."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=how.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, how.rate, total_steps=how.steps, pct_start=0.2)
    for step in range(how.steps):
        x, label = images.sample(how.batch, generator)
        grown = min(1.0, max(0.0, (step / how.steps - 0.35) / 0.5))
        clean = loss = F.cross_entropy(network(x), label)
        if grown > 0:
            # A geometric ramp: the bounds of a deep network shrink by orders of magnitude on the way.
            radius = how.robust * RADIUS * 1e-3 ** (1 - grown)
            worst = F.cross_entropy(worst_logits(*intervals(network, x, radius), label), label)
            loss = torch.lerp(clean, worst, how.weight * grown)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == how.steps - 1:
            print(f"step {step}: loss {clean.item():.4f}, with intervals {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(network: ResNet, images: Images, seed: int, count: int = 2000) -> float:
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for _ in range(0, count, 250):
        x, label = images.sample(250, generator)
        right += int((network(x).argmax(1) == label).sum())
    return right / count


# ------------------------------------------------------------------------------------------------------- property


@dataclass(frozen=True)
class Found:
    """A property and what was seen of it.

    Attributes:
        mix: share of the other image.
        crown, alpha: lower bounds of the smallest margin over all other classes.
        unstable: neurons that CROWN leaves undecided.
    """

    mix: float
    label: int
    crown: float
    alpha: float
    unstable: int


def box(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The L-infinity ball of an image inside [0, 1], float32 (n,)."""
    flat = x.detach().cpu().numpy().astype(np.float32).ravel()
    return (flat - np.float32(RADIUS)).clip(0, 1), (flat + np.float32(RADIUS)).clip(0, 1)


class Searcher:
    """Bounds the margins of one network around many inputs."""

    def __init__(self, path: Path, device: str) -> None:
        from verifier import api
        from verifier.config import load_config
        from verifier.solver.setup import set_up

        self.network = api.load_any(path, ())
        self.config = load_config(values={"device": device, "memory.chunk_bytes": 1 << 30})
        self.backend = set_up(self.network.graph, self.config).backend

    def state(self, x: Tensor, certified: bool) -> tuple[BoundState, int]:
        """Bounds of all neurons of a box by CROWN, and how many are unstable."""
        from verifier.bounds.crown import crown_hidden, initial_state, preactivations, undecided
        from verifier.bounds.engine import PLAIN, ROUNDED_64, Engine
        from verifier.core.interval import Interval

        graph, ends = self.network.graph, box(x)
        shape = (1, *graph.input_shape)
        given = Interval(*(torch.from_numpy(end).reshape(shape).to(self.backend.device) for end in ends))
        engine = Engine(graph, self.backend, arithmetic=ROUNDED_64 if certified else PLAIN)
        state = crown_hidden(engine, initial_state(engine, given))
        count = sum(int(undecided(graph, i, state.bounds[i]).sum()) for i in preactivations(graph))
        return state, count

    def margin(self, state: BoundState, label: int, steps: int) -> float:
        """The smallest bound of a margin over all other classes: CROWN, or alpha-CROWN with so many steps."""
        from verifier.bounds.alpha import Schedule, alpha_rows
        from verifier.bounds.crown import Specification, crown_rows
        from verifier.bounds.engine import PLAIN, ROUNDED_64, Engine

        graph = self.network.graph
        engine = Engine(graph, self.backend, arithmetic=ROUNDED_64 if state.certified else PLAIN)
        classes = graph.nodes[graph.output].size
        rows = -torch.eye(classes, dtype=torch.float64)
        rows[:, label] += 1
        rows = rows[torch.arange(classes) != label].reshape(1, classes - 1, *graph.output_shape)
        spec = Specification(rows.to(self.backend.device))
        slopes = None
        if steps:
            slopes = alpha_rows(engine, state, spec, Schedule(steps)).parameters
        lower, _ = crown_rows(engine, state, spec, slopes)
        return float(lower.min())

    def look(self, x: Tensor, mix: float, label: int, certified: bool) -> Found:
        """Everything that is asked of one image."""
        state, unstable = self.state(x, certified)
        steps = self.config.bounds.alpha.iterations
        crown, alpha = self.margin(state, label, 0), self.margin(state, label, steps)
        kind = "certified" if certified else "float32"
        print(f"mix {mix:.4f}: CROWN {crown:.4f}, alpha-CROWN {alpha:.4f}, {unstable} unstable ({kind})", flush=True)
        return Found(mix, label, crown, alpha, unstable)


def find(
    searcher: Searcher, network: ResNet, images: Images, unstable: int, seed: int, until: float
) -> tuple[Tensor, Found] | None:
    """An image that CROWN does not prove and alpha-CROWN does, with enough unstable neurons; None when time is over.

    An image of one class is mixed with one of another: its margin falls, and with it both bounds. The share is chosen
    so that zero comes to lie between them, supposing that margin and bound fall alike, and corrected a few times. The
    class of the larger share is the right one.
    """
    generator = torch.Generator().manual_seed(seed)
    while time.monotonic() < until:
        x, labels = images.sample(2, generator)
        own, mix = int(labels[0]), 0.0
        for _ in range(5):
            image = (1 - mix) * x[0] + mix * x[1]
            clean = _margin(network, image, own)
            if clean <= 0 or mix >= 0.5 or time.monotonic() > until:
                break
            seen = searcher.look(image, mix, own, certified=False)
            if seen.unstable < unstable or (mix == 0.0 and seen.alpha <= 0):
                break
            if seen.crown <= 0 < seen.alpha:
                sure = searcher.look(image, mix, own, certified=True)
                if sure.crown <= 0 < sure.alpha and sure.unstable >= unstable:
                    return image, sure
            # The clean margin at which the middle of the two bounds should be zero.
            wanted = clean - (seen.crown + seen.alpha) / 2
            low, high = 0.0, 1.0
            for _ in range(20):
                mix = (low + high) / 2
                low, high = (mix, high) if _margin(network, (1 - mix) * x[0] + mix * x[1], own) > wanted else (low, mix)
    return None


@torch.no_grad()
def _margin(network: ResNet, image: Tensor, label: int) -> float:
    """How far the label's logit is above all others."""
    logits = network(image[None])[0]
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return float(logits[label] - others.max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--robust", type=float, default=0.1, help="radius of the interval term in units of 1/255")
    parser.add_argument("--weight", type=float, default=0.1, help="share of the interval term in the loss")
    parser.add_argument("--unstable", type=int, default=1000, help="unstable neurons that the property must have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search-seconds", type=float, default=100)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True  # the search turns it off
    start = time.monotonic()
    images = Images.make(arguments.classes, arguments.size, arguments.seed, device)
    network = ResNet(arguments.width, arguments.size, arguments.classes).reset(arguments.seed).to(device)
    how = Training(arguments.steps, arguments.batch, arguments.rate, arguments.robust, arguments.weight)
    train(network, images, how, arguments.seed)
    trained = time.monotonic()
    right = accuracy(network, images, arguments.seed + 1)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"accuracy {right:.3f}, {parameters / 1e6:.1f} M parameters, {trained - start:.0f} s", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_resnet(network, arguments.out / "resnet.onnx")
    searcher = Searcher(arguments.out / "resnet.onnx", device.type)
    until = time.monotonic() + arguments.search_seconds
    found = find(searcher, network, images, arguments.unstable, arguments.seed + 2, until)
    record = {
        "accuracy": right,
        "parameters": parameters,
        "seconds": {"train": round(trained - start, 1), "search": round(time.monotonic() - trained, 1)},
        "found": None if found is None else asdict(found[1]),
    }
    if found is not None:
        image, what = found
        title = f"A mixture of two images stays class {what.label} when every pixel changes by at most 1/255."
        lower, upper = box(image)
        save_robustness(arguments.out / "resnet.vnnlib", title, lower, upper, what.label, arguments.classes)
    (arguments.out / "resnet.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)
    return 0 if found is not None and right >= ACCURACY else 1


if __name__ == "__main__":
    raise SystemExit(main())
