"""Trains the networks in ``examples/`` and writes their properties.

    python scripts/train_examples.py [--out examples] [--steps 1500]

Two networks on data made here: ``rings`` (a point of the plane: inner disc or outer ring) and ``bars`` (an 8x8 picture:
horizontal bar, vertical bar or neither). Same seed, same torch, same files.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

RINGS_RADII = {"small": 0.25, "inner": 0.9, "outer": 1.3}
BARS_RADII = {"small": 0.02, "medium": 0.11, "large": 0.3}


def rings_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (count, 2) and labels: 0 within radius 1.1, 1 between 1.5 and 2.5."""
    label = torch.randint(2, (count,), generator=generator)
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    t = torch.rand(count, generator=generator)
    radius = torch.where(label == 0, 1.1 * t.sqrt(), 1.5 + t)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


def bars_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (count, 1, 8, 8) in [0, 1] and labels: 0 horizontal bar, 1 vertical bar, 2 noise only."""
    label = torch.randint(3, (count,), generator=generator)
    place = torch.randint(8, (count,), generator=generator)
    image = 0.3 * torch.rand((count, 1, 8, 8), generator=generator)
    for i in range(count):
        if label[i] == 0:
            image[i, 0, place[i], :] += 0.6
        elif label[i] == 1:
            image[i, 0, :, place[i]] += 0.6
    return image.clamp(0, 1), label


def rings_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))


def bars_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def train(
    network: nn.Sequential, inputs: Tensor, labels: Tensor, steps: int, generator: torch.Generator, radius: float = 0.0
) -> float:
    """Adam on cross-entropy in batches of 256; the accuracy on the data at the end.

    With a ``radius`` every input is first moved that far along the sign of its gradient: the network becomes robust.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (256,), generator=generator)
        x = inputs[batch].requires_grad_()
        loss = nn.functional.cross_entropy(network(x), labels[batch])
        if radius > 0:
            x = x.detach() + radius * torch.autograd.grad(loss, x)[0].sign()
            loss = nn.functional.cross_entropy(network(x), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return float((network(inputs).argmax(1) == labels).float().mean())


def save_onnx(network: nn.Sequential, input_shape: Sequence[int], path: Path) -> None:
    """Write the network as ONNX, opset 13, input ``X`` and output ``Y`` with a batch axis of 1."""
    nodes, tensors, value = [], [], "X"
    for i, layer in enumerate(network):
        out = "Y" if i == len(network) - 1 else f"value{i}"
        names = [f"{i}.{name}" for name, _ in layer.named_parameters()]
        tensors += [
            numpy_helper.from_array(p.detach().numpy(), n) for n, p in zip(names, layer.parameters(), strict=True)
        ]
        if isinstance(layer, nn.Linear):
            nodes.append(helper.make_node("Gemm", [value, *names], [out], transB=1))
        elif isinstance(layer, nn.Conv2d):
            pads = [int(p) for p in layer.padding] * 2
            nodes.append(helper.make_node("Conv", [value, *names], [out], strides=list(layer.stride), pads=pads))
        else:
            nodes.append(helper.make_node(type(layer).__name__.replace("ReLU", "Relu"), [value], [out]))
        value = out
    n_out = [layer for layer in network if isinstance(layer, nn.Linear)][-1].out_features
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, *input_shape])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, n_out])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def save_property(path: Path, title: str, lower: np.ndarray, upper: np.ndarray, label: int, classes: int) -> None:
    """Write "some input of the box is not classified as ``label``" as VNN-LIB 1.0."""
    lines = [f"; {title}"]
    lines += [f"(declare-const X_{i} Real)" for i in range(lower.size)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (lo, hi) in enumerate(zip(lower.ravel(), upper.ravel(), strict=True)):
        lines += [f"(assert (>= X_{i} {lo:.6f}))", f"(assert (<= X_{i} {hi:.6f}))"]
    others = [f"(and (<= Y_{label} Y_{j}))" for j in range(classes) if j != label]
    lines.append(f"(assert (or {' '.join(others)}))")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_rings(out: Path, steps: int) -> None:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    network = rings_network()
    accuracy = train(network, *rings_data(4000, generator), steps, generator)
    save_onnx(network.eval(), (2,), out / "rings.onnx")
    for name, radius in RINGS_RADII.items():
        title = f"Every point with both coordinates within {radius:g} of 0 belongs to the inner disc."
        side = np.full(2, radius)
        save_property(out / f"rings_{name}.vnnlib", title, -side, side, label=0, classes=2)
    print(f"rings: accuracy {accuracy:.3f}")


def make_bars(out: Path, steps: int) -> None:
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(2)
    network = bars_network()
    accuracy = train(network, *bars_data(4000, generator), steps, generator, radius=0.1)
    save_onnx(network.eval(), (1, 8, 8), out / "bars.onnx")
    images, labels = bars_data(100, torch.Generator().manual_seed(3))
    image = images[int((labels == 0).nonzero()[0])].numpy().round(3)
    for name, radius in BARS_RADII.items():
        title = f"A picture stays a horizontal bar when every pixel changes by at most {radius:g}."
        lower, upper = (image - radius).clip(0, 1), (image + radius).clip(0, 1)
        save_property(out / f"bars_{name}.vnnlib", title, lower, upper, label=0, classes=3)
    print(f"bars: accuracy {accuracy:.3f}")


def save_instances(out: Path, seconds: float = 30.0) -> None:
    """The list that ``verifier run`` reads."""
    names = [("rings", name) for name in RINGS_RADII] + [("bars", name) for name in BARS_RADII]
    with (out / "instances.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([f"{network}.onnx", f"{network}_{name}.vnnlib", f"{seconds:g}"] for network, name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "examples")
    parser.add_argument("--steps", type=int, default=1500, help="training steps per network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_rings(arguments.out, arguments.steps)
    make_bars(arguments.out, arguments.steps)
    save_instances(arguments.out)


if __name__ == "__main__":
    main()
