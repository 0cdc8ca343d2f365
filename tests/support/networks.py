"""Random small networks as torch modules that know their own graph.

A :class:`Dag` is an ordinary ``torch.nn.Module`` (so the verifier can capture it like a user's network) whose steps can
also be read by the exact solver and the ONNX writer. Shapes in steps are those of one sample, without the batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One value of a network: ``kind`` is ``affine`` (``module`` applied), ``relu`` or ``add``; inputs by index."""

    kind: str
    inputs: tuple[int, ...]
    module: str = ""


class Dag(nn.Module):
    """A network of affine modules, ReLUs and additions; value 0 is the input, the last step is the output."""

    def __init__(self, input_shape: Shape, steps: Sequence[Step], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.steps = tuple(steps)
        self.parts = nn.ModuleDict(modules)

    def values(self, x: Tensor) -> list[Tensor]:
        """Every value of the network for inputs (N, *input_shape)."""
        out = [x]
        for step in self.steps:
            if step.kind == "affine":
                out.append(self.parts[step.module](out[step.inputs[0]]))
            elif step.kind == "relu":
                out.append(torch.relu(out[step.inputs[0]]))
            else:
                out.append(out[step.inputs[0]] + out[step.inputs[1]])
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x)[-1]

    @property
    def shapes(self) -> list[Shape]:
        """Shape of every value, without the batch axis."""
        dtype = next(self.parameters()).dtype
        with torch.no_grad():
            return [tuple(v.shape[1:]) for v in self.values(torch.zeros(1, *self.input_shape, dtype=dtype))]

    @property
    def n_in(self) -> int:
        return int(torch.tensor(self.input_shape).prod())


class Builder:
    """Collects steps; each method returns the index of the new value."""

    def __init__(self, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.steps: list[Step] = []
        self.modules: dict[str, nn.Module] = {}

    def affine(self, x: int, module: nn.Module) -> int:
        name = f"m{len(self.modules)}"
        self.modules[name] = module
        return self.reuse(x, name)

    def reuse(self, x: int, name: str) -> int:
        """Apply a module that exists already: shared weights."""
        return self._add(Step("affine", (x,), name))

    def relu(self, x: int) -> int:
        return self._add(Step("relu", (x,)))

    def add(self, x: int, y: int) -> int:
        return self._add(Step("add", (x, y)))

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps)

    def build(self) -> Dag:
        return Dag(self.input_shape, self.steps, self.modules).eval().requires_grad_(False)


def from_sequential(module: nn.Sequential, input_shape: Shape) -> Dag:
    """A Dag with the layers (and the very parameters) of a plain feed-forward network."""
    builder, x = Builder(input_shape), 0
    for layer in module:
        x = builder.relu(x) if isinstance(layer, nn.ReLU) else builder.affine(x, layer)
    return builder.build()


def mlp(n_in: int = 3, hidden: Sequence[int] = (6, 5), n_out: int = 2) -> Dag:
    builder, x, width = Builder((n_in,)), 0, n_in
    for h in hidden:
        x = builder.relu(builder.affine(x, nn.Linear(width, h)))
        width = h
    builder.affine(x, nn.Linear(width, n_out))
    return builder.build()


def conv(padding: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1, n_out: int = 2) -> Dag:
    """Two convolutions and a linear head on a 2x5x4 image (not square, so that swapped axes show)."""
    builder = Builder((2, 5, 4))
    x = builder.relu(
        builder.affine(0, nn.Conv2d(2, 4, (3, 2), padding=padding, stride=stride, groups=groups, dilation=dilation))
    )
    x = builder.relu(builder.affine(x, nn.Conv2d(4, 3, 2, padding=1, stride=2)))
    return _head(builder, x, n_out)


def residual(n_out: int = 2) -> Dag:
    """conv - relu - [conv - relu - conv] + skip - relu - linear, with a convolution on the second skip."""
    builder = Builder((1, 4, 4))
    x = builder.relu(builder.affine(0, nn.Conv2d(1, 2, 3, padding=1)))
    y = builder.relu(builder.affine(x, nn.Conv2d(2, 2, 3, padding=1)))
    x = builder.relu(builder.add(builder.affine(y, nn.Conv2d(2, 2, 3, padding=1)), x))
    y = builder.affine(x, nn.Conv2d(2, 3, 3, stride=2, padding=1))
    x = builder.relu(builder.add(y, builder.affine(x, nn.Conv2d(2, 3, 1, stride=2))))
    return _head(builder, x, n_out)


def preactivation(n_out: int = 2) -> Dag:
    """Batch norm and ReLU come before each convolution; the skip carries the value before them."""
    builder = Builder((2, 3, 3))
    x = builder.affine(0, nn.Conv2d(2, 3, 3, padding=1))
    for _ in range(2):
        y = builder.relu(builder.affine(x, nn.BatchNorm2d(3)))
        y = builder.affine(y, nn.Conv2d(3, 3, 3, padding=1))
        x = builder.add(x, y)
    return _head(builder, builder.relu(builder.affine(x, nn.BatchNorm2d(3))), n_out)


def shared(n_in: int = 3, n_out: int = 2) -> Dag:
    """One linear layer used three times and one hidden value read by three consumers."""
    builder = Builder((n_in,))
    x = builder.relu(builder.affine(0, nn.Linear(n_in, 4)))
    y = builder.relu(builder.affine(x, nn.Linear(4, 4)))
    name = builder.steps[-2].module
    z = builder.relu(builder.reuse(y, name))
    out = builder.add(builder.add(x, y), builder.reuse(z, name))
    builder.affine(builder.relu(out), nn.Linear(4, n_out))
    return builder.build()


def pooled(n_out: int = 2) -> Dag:
    """Average pooling with padding between convolutions."""
    builder = Builder((1, 5, 5))
    x = builder.relu(builder.affine(0, nn.Conv2d(1, 3, 3)))
    x = builder.affine(x, nn.AvgPool2d(2, stride=1, padding=1))
    x = builder.relu(builder.affine(x, nn.Conv2d(3, 2, 2, stride=2)))
    return _head(builder, x, n_out)


KINDS: dict[str, Callable[[], Dag]] = {
    "mlp": mlp,
    "deep-mlp": lambda: mlp(2, (5, 5, 5, 4)),
    "conv": conv,
    "conv-unpadded": lambda: conv(padding=0),
    "conv-strided": lambda: conv(padding=1, stride=2),
    "conv-grouped": lambda: conv(groups=2),
    "conv-dilated": lambda: conv(padding=2, dilation=2),
    "residual": residual,
    "preactivation": preactivation,
    "shared": shared,
    "pooled": pooled,
}


def random_network(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Dag:
    """A network of one of :data:`KINDS` with weights drawn from ``seed``; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KINDS[kind]()
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    assert module.running_mean is not None and module.running_var is not None
                    module.running_mean.uniform_(-0.5, 0.5)
                    module.running_var.uniform_(0.3, 2.0)
                    module.weight.uniform_(-1.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
            for name, parameter in network.named_parameters():
                if name.endswith("weight") and parameter.dim() > 1:
                    parameter.mul_(1.5)  # torch's defaults are so small that few neurons are unstable
    return network.to(dtype)


def random_box(network: Dag, seed: int, radius: float = 0.5) -> tuple[Tensor, Tensor]:
    """A float32 box (*input_shape) around a random centre; a tenth of its sides are degenerate."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(network.input_shape, generator=generator)
    half = radius * torch.rand(network.input_shape, generator=generator)
    half = torch.where(torch.rand(network.input_shape, generator=generator) < 0.1, torch.zeros_like(half), half)
    return centre - half, centre + half


def random_points(lower: Tensor, upper: Tensor, count: int, seed: int) -> Tensor:
    """Points (count, *shape) of the box: half uniform, half corners, all exactly inside."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand((count, *lower.shape), generator=generator, dtype=lower.dtype)
    t[count // 2 :] = t[count // 2 :].round()
    return torch.minimum(torch.maximum(lower + t * (upper - lower), lower), upper)


def _head(builder: Builder, x: int, n_out: int) -> Dag:
    """Flatten and a linear layer that fits."""
    width = int(torch.tensor(builder.build().shapes[x]).prod())
    x = builder.affine(x, nn.Flatten(1))
    builder.affine(x, nn.Linear(width, n_out))
    return builder.build()
