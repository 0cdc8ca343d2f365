"""Small random graphs built straight from ops, and helpers to bound and to sample them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.device import DEVICE, single
from verifier.bounds.crown import BoundState, initial_state
from verifier.bounds.engine import PLAIN, Engine
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.graph.graph import Graph, Input, Node
from verifier.graph.op import Op, Shape
from verifier.ops.add import Add
from verifier.ops.conv import Conv
from verifier.ops.linear import Linear
from verifier.ops.product import Mul
from verifier.ops.reduce import AvgPool
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Concat, Gather, Permute, Reshape
from verifier.ops.sigmoid import Sigmoid, Tanh
from verifier.ops.step import Heaviside
from verifier.parallel.single import SingleBackend


class Builder:
    """Collects nodes; every method returns the index of the new one."""

    def __init__(self, shape: Shape, seed: int, gain: float = 1.0) -> None:
        self.nodes = [Node(0, "x", Input(), (), shape)]
        self.parameters: dict[Handle, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)
        self.gain = gain

    def tensor(self, shape: Shape, scale: float) -> Handle:
        handle = Handle(f"p{len(self.parameters)}", shape)
        self.parameters[handle] = torch.randn(shape, generator=self.random) * scale
        return handle

    def op(self, op: Op, *inputs: int) -> int:
        index = len(self.nodes)
        # The batch of 2 shows an op that mixes up its axes.
        dummy = [torch.zeros(2, *self.nodes[i].shape) for i in inputs]
        shape = tuple(op.forward(dummy, tuple(self.parameters[h] for h in op.handles)).shape[1:])
        self.nodes.append(Node(index, f"n{index}", op, inputs, shape))
        return index

    def linear(self, x: int, out: int) -> int:
        n = self.nodes[x].shape[-1]
        return self.op(Linear(self.tensor((out, n), self.gain / n**0.5), self.tensor((out,), 0.3)), x)

    def conv(self, x: int, out: int, kernel: Shape = (3, 3), bias: bool = True, **options: object) -> int:
        channels = self.nodes[x].shape[-3]
        fan = channels * kernel[0] * kernel[1]
        weight = self.tensor((out, channels, *kernel), self.gain / fan**0.5)
        return self.op(Conv(weight, self.tensor((out,), 0.3) if bias else None, **options), x)  # type: ignore[arg-type]

    def relu(self, x: int) -> int:
        return self.op(Relu(), x)

    def add(self, *xs: int) -> int:
        return self.op(Add((1.0,) * len(xs)), *xs)

    def flat(self, x: int) -> int:
        return self.op(Reshape((self.nodes[x].size,)), x)

    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), len(self.nodes) - 1, self.parameters)


def mlp(seed: int) -> Graph:
    b = Builder((4,), seed)
    x = b.relu(b.linear(0, 9))
    x = b.relu(b.linear(x, 8))
    x = b.relu(b.linear(x, 7))
    b.linear(x, 3)
    return b.graph()


def wide_shape(seed: int) -> Graph:
    """A Linear that acts on the last of two dims, with a transposition between."""
    b = Builder((3, 4), seed)
    x = b.relu(b.linear(0, 5))
    x = b.relu(b.linear(b.op(Permute((1, 0)), x), 4))
    b.linear(b.flat(x), 2)
    return b.graph()


def conv(seed: int) -> Graph:
    """Large enough that windows stay windows through two convolutions."""
    b = Builder((1, 9, 8), seed)
    x = b.relu(b.conv(0, 2, padding=1))
    x = b.relu(b.conv(x, 2, padding=1))
    x = b.relu(b.conv(x, 3, (2, 2), stride=2))
    b.linear(b.flat(x), 3)
    return b.graph()


def strided(seed: int) -> Graph:
    """Uneven kernels, strides and paddings; a leading dim of one."""
    b = Builder((1, 2, 10, 9), seed)
    x = b.relu(b.conv(0, 2, (3, 2), stride=(2, 1), padding=(1, 0)))
    x = b.relu(b.conv(x, 2, (2, 3), stride=(1, 2), padding=(0, 2), bias=False))
    x = b.relu(b.conv(x, 2, (2, 2), padding=1))
    b.linear(b.flat(x), 2)
    return b.graph()


def dilated(seed: int) -> Graph:
    """Convolutions that windows cannot cross, between ones that they can."""
    b = Builder((2, 8, 8), seed)
    x = b.relu(b.conv(0, 2, padding=1))
    x = b.relu(b.conv(x, 2, padding=2, dilation=2))
    x = b.relu(b.conv(x, 2, (2, 2), stride=2))
    b.linear(b.flat(x), 2)
    return b.graph()


def residual(seed: int) -> Graph:
    """Skips with and without a convolution, so that windows of equal and of unequal size meet."""
    b = Builder((1, 8, 8), seed)
    x = b.relu(b.conv(0, 2, padding=1))
    y = b.conv(b.relu(b.conv(x, 2, padding=1)), 2, padding=1)
    x = b.relu(b.add(x, y))
    y = b.conv(x, 2, stride=2, padding=1)
    x = b.relu(b.add(y, b.conv(x, 2, (1, 1), stride=2)))
    b.linear(b.flat(x), 2)
    return b.graph()


def preactivation(seed: int) -> Graph:
    """Scale and ReLU before each convolution; the skip carries the value before them."""
    b = Builder((2, 6, 6), seed)
    x = b.conv(0, 2, padding=1)
    for _ in range(2):
        scaled = b.op(ScaleShift(b.tensor((2, 1, 1), 1.0), b.tensor((2, 1, 1), 0.3)), x)
        y = b.conv(b.relu(scaled), 2, padding=1)
        x = b.add(y, x)
    b.linear(b.flat(b.relu(x)), 2)
    return b.graph()


def shared(seed: int) -> Graph:
    """One value read by several branches, one pre-activation by two ReLUs, a value added to itself."""
    b = Builder((4,), seed)
    z = b.linear(0, 6)
    first, second = b.relu(z), b.relu(z)
    left, right = b.linear(first, 5), b.linear(second, 5)
    both = b.op(Add((1.0, -1.0)), left, right)
    x = b.relu(b.op(Add((1.0, 1.0, 0.5)), both, both, left))
    b.linear(b.op(Concat(0), x, first, 0), 3)
    return b.graph()


def concat(seed: int) -> Graph:
    """Channels joined from branches with different windows."""
    b = Builder((1, 8, 8), seed)
    left, right = b.relu(b.conv(0, 2, padding=1)), b.relu(b.conv(0, 1, (1, 1)))
    x = b.relu(b.conv(b.op(Concat(0), left, right, 0), 2, (3, 3), padding=1))
    b.linear(b.flat(x), 2)
    return b.graph()


def smooth(seed: int) -> Graph:
    """Sigmoid, tanh and leaky ReLU, and a ReLU on the input itself."""
    b = Builder((4,), seed, gain=2.0)
    x = b.op(Sigmoid(), b.linear(0, 6))
    y = b.op(Tanh(), b.linear(b.relu(0), 6))
    x = b.op(Relu(0.1), b.linear(b.add(x, y), 5))
    b.linear(x, 2)
    return b.graph()


def gated(seed: int) -> Graph:
    """Nonlinear ops that read others without anything affine between them."""
    b = Builder((4,), seed, gain=2.0)
    x = b.relu(b.linear(0, 6))
    x = b.op(Mul(), x, b.op(Sigmoid(), x))
    x = b.op(Tanh(), b.op(Relu(0.1), b.linear(x, 5)))
    b.linear(x, 2)
    return b.graph()


def pooled(seed: int) -> Graph:
    """Averages between convolutions, a scale on the way, skips that are pre-activations themselves."""
    b = Builder((1, 2, 12, 10), seed)
    x = b.relu(b.conv(0, 2, padding=1))
    x = b.op(AvgPool((2, 2)), x)
    x = b.relu(b.op(Add((1.0, -0.5)), b.conv(x, 2, padding=1), x))
    y = b.op(ScaleShift(b.tensor((2, 1, 1), 1.0), b.tensor((2, 1, 1), 0.3)), b.conv(x, 2, padding=1))
    x = b.relu(b.add(b.op(ScaleShift(None, b.tensor((2, 1, 1), 0.3)), x), y))
    b.linear(b.flat(x), 2)
    return b.graph()


def choice(seed: int) -> Graph:
    """Which of two values is larger, weighed over an image."""
    b = Builder((2, 4, 4), seed, gain=3.0)
    x = b.conv(b.relu(b.conv(0, 2, padding=1)), 2, (1, 1))
    index = torch.arange(16)
    parts = []
    for k in range(2):
        handle = Handle(f"index{k}", (16,), torch.int64)
        b.parameters[handle] = index + 16 * k
        parts.append(b.op(Gather(handle, (4, 4)), x))
    step = b.op(Heaviside(), b.op(Add((1.0, -1.0)), *parts))
    away = b.op(Relu(-1.0), b.op(ScaleShift(None, b.tensor((4, 4), 0.5)), step))
    b.linear(b.flat(away), 2)
    return b.graph()


ARCHITECTURES: dict[str, Callable[[int], Graph]] = {
    f.__name__: f
    for f in (
        *(mlp, wide_shape, conv, strided, dilated, residual, preactivation),
        *(shared, concat, smooth, gated, pooled, choice),
    )
}


@dataclass(frozen=True)
class Case:
    """A graph, its backend and a batch of boxes on the tests' device; the graph's own parameters stay on the CPU."""

    graph: Graph
    backend: SingleBackend
    box: Interval

    @property
    def engine(self) -> Engine:
        """In the arithmetic of proofs."""
        return Engine(self.graph, self.backend)

    def state(self, certified: bool = True) -> BoundState:
        return initial_state(self.engine if certified else self.engine.using(PLAIN), self.box)

    def samples(self, count: int, seed: int = 0) -> Tensor:
        """float64 points of every box, a third of them corners, (count, B, *input_shape)."""
        random = torch.Generator().manual_seed(seed)
        low, up = self.box.lower.double(), self.box.upper.double()
        share = torch.rand((count, *low.shape), generator=random, dtype=torch.float64).to(DEVICE)
        share[::3] = share[::3].round()
        # Clamped because low + 1.0 * (up - low) may round past the corner.
        return torch.minimum(torch.maximum(low + share * (up - low), low), up)

    def values(self, points: Tensor) -> dict[int, Tensor]:
        """float64 values of every node at (count, B, *input_shape) points, by node index."""
        keep = range(len(self.graph.nodes))
        out = self.graph.forward(points.flatten(0, 1), self.backend.weights, keep)
        assert isinstance(out, dict)
        return {i: v.reshape(*points.shape[:2], *v.shape[1:]) for i, v in out.items()}


def make(name: str, seed: int, batch: int = 1, radius: float = 0.3, chunk_bytes: int = 256 << 20) -> Case:
    graph = ARCHITECTURES[name](seed)
    random = torch.Generator().manual_seed(1000 + seed)
    centre = torch.randn((batch, *graph.input_shape), generator=random) / 2
    width = torch.rand((batch, *graph.input_shape), generator=random) * 2 * radius
    return case(graph, Interval(centre - width, centre + width), chunk_bytes)


def case(graph: Graph, box: Interval, chunk_bytes: int = 256 << 20) -> Case:
    return Case(graph, single(graph, chunk_bytes), box.to(DEVICE))


def inside(values: Tensor, bounds: Interval, slack: float = 0.0) -> bool:
    """Whether (count, B, *shape) values lie in (B, *shape) bounds, up to a rounding of the sampled forward pass."""
    room = slack * (1 + values.abs())
    return bool(((values >= bounds.lower.double() - room) & (values <= bounds.upper.double() + room)).all())
