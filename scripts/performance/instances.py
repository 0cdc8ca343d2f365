"""Networks and properties that are measured: of examples/, seeded random ones, and those of VNN-COMP by patterns."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from scripts.measure import EXAMPLES
from scripts.networks import ResNet, save_mlp, save_resnet, save_robustness
from verifier import api

# An MLP and two convolutional networks, one of them residual.
SELECT = ("mnist_fc:*256x4*:prop_7_0.05*", "sri_resnet_a:*:*", "oval21:*base*:*")


@dataclass(frozen=True)
class Instance:
    """A network and a property."""

    name: str
    onnx: Path
    vnnlib: Path


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
# Small: autograd through all rows of all hidden nodes takes gigabytes on larger ones.
SMALL_RESNET = Shape("resnet-4", 0.01, lambda path: save_resnet(ResNet(4, 8, 10).reset(0), path))


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
