"""Networks that the measuring scripts and their tests make: shapes from the literature, seeded weights, ONNX files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

MAX_PROTOBUF = (1 << 31) - 1


class OnnxWriter:
    """Collects the nodes of a network, opset 13, input ``X`` and output ``Y`` with a batch axis of 1.

    Every method takes and returns the name of a value. Nothing but one copy of the weights is held.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        self._input_shape = tuple(input_shape)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def linear(self, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        """weight: (out, in)."""
        return self._node("Gemm", [x, *self._store(weight, bias)], transB=1)

    def conv(self, x: str, weight: np.ndarray, bias: np.ndarray, stride: int = 1, padding: int = 0) -> str:
        """weight: (out, in, k, k)."""
        return self._node("Conv", [x, *self._store(weight, bias)], strides=[stride] * 2, pads=[padding] * 4)

    def relu(self, x: str) -> str:
        return self._node("Relu", [x])

    def add(self, x: str, y: str) -> str:
        return self._node("Add", [x, y])

    def flatten(self, x: str) -> str:
        return self._node("Flatten", [x], axis=1)

    def save(self, path: Path, n_out: int) -> None:
        """Write the file; weights of 2 GiB or more go into a second one beside it: protobuf has no room for them."""
        self._nodes[-1].output[0] = "Y"
        graph = helper.make_graph(
            self._nodes,
            path.stem,
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, *self._input_shape])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, n_out])],
            [],
        )
        large = sum(len(t.raw_data) for t in self._tensors) > MAX_PROTOBUF - (1 << 20)
        if large:
            self._move_outside(path.with_suffix(".data"))
        graph.initializer.extend(self._tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        path.write_bytes(model.SerializeToString())

    def _move_outside(self, path: Path) -> None:
        """Move raw data into a file of its own, tensor by tensor."""
        offset = 0
        with path.open("wb") as file:
            for tensor in self._tensors:
                data = tensor.raw_data
                file.write(data)
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", path.name), ("offset", offset), ("length", len(data))):
                    entry = tensor.external_data.add()
                    entry.key, entry.value = key, str(value)
                offset += len(data)

    def _store(self, *arrays: np.ndarray) -> list[str]:
        names = [f"p{len(self._tensors) + i}" for i in range(len(arrays))]
        self._tensors += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        return names

    def _node(self, kind: str, inputs: Sequence[str], **attributes: object) -> str:
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name


# ------------------------------------------------------------------------------------------------- plain networks


def save_mlp(path: Path, sizes: Sequence[int], seed: int = 0, gain: float = 1.4, shift: float = 0.5) -> None:
    """A ReLU network with normal weights of deviation gain / sqrt(fan-in) and normal biases of deviation ``shift``."""
    rng = np.random.default_rng(seed)
    writer, x = OnnxWriter(sizes[:1]), "X"
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        weight, bias = _normal(rng, (m, n), gain / n**0.5), _normal(rng, (m,), shift)
        x = writer.linear(x, weight, bias)
        if i < len(sizes) - 2:
            x = writer.relu(x)
    writer.save(path, sizes[-1])


def save_conv3(path: Path, channels: int = 32, size: int = 32, n_out: int = 10, seed: int = 0) -> None:
    """Three convolutions, strides 1, 2, 2, and one linear layer."""
    rng = np.random.default_rng(seed)
    writer, x, n = OnnxWriter((3, size, size)), "X", 3
    for m, stride in ((channels, 1), (2 * channels, 2), (2 * channels, 2)):
        weight = _normal(rng, (m, n, 3, 3), 1.2 / (9 * n) ** 0.5)
        x = writer.relu(writer.conv(x, weight, _normal(rng, (m,), 0.2), stride, 1))
        n, size = m, -(-size // stride)
    width = n * size * size
    x = writer.linear(writer.flatten(x), _normal(rng, (n_out, width), width**-0.5), _normal(rng, (n_out,), 0.2))
    writer.save(path, n_out)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= np.float32(deviation)
    return values


# ------------------------------------------------------------------------------------------------ residual network


class Block(nn.Module):
    """relu(x' + conv(relu(conv(x)))), x' being x or a 1x1 convolution of it where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, 1)
        self.second = nn.Conv2d(n_out, n_out, 3, 1, 1)
        self.skip = nn.Conv2d(n_in, n_out, 1, stride) if stride > 1 or n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.skip is None else self.skip(x)
        return (skip + self.second(self.first(x).relu())).relu()


class ResNet(nn.Module):
    """ResNet-18 for small images with two linear layers at its end: 17 convolutions, 8 blocks, 3 projections.

    At width 64, 32x32 pixels and 100 classes it has 15.4 million parameters, the shape of CIFAR100_resnet_large in
    VNN-COMP. Batch normalisation is left out, as it is folded into the convolutions before verification anyway.
    """

    def __init__(self, width: int = 64, size: int = 32, classes: int = 100) -> None:
        super().__init__()
        self.width, self.size, self.classes = width, size, classes
        widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = nn.ModuleList(
            Block(n, m, s) for n, m, s in zip([width, *widths[:-1]], widths, strides, strict=True)
        )
        side = -(-size // 8)
        self.hidden = nn.Linear(8 * width * side * side, 8 * width)
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(self.hidden(x.flatten(1)).relu())

    def affine(self) -> Iterator[nn.Conv2d | nn.Linear]:
        """Every layer with weights."""
        return (m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear))

    @torch.no_grad()
    def reset(self, seed: int, residual: float = 0.2) -> ResNet:
        """Seeded normal weights; the second convolution of a block starts small, so that signals keep their size."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.affine():
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
            assert module.bias is not None
            module.bias.zero_()
        for block in self.blocks:
            assert isinstance(block, Block)
            block.second.weight.mul_(residual)
        return self

    @torch.no_grad()
    def calm(self, seed: int) -> ResNet:
        """Seeded weights whose magnitudes sum to about 1 per unit, and biases of deviation 0.1: interval bounds keep
        their width from layer to layer, as they do in trained networks, and stay meaningful without training."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.affine():
            fan_in = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (1.25 / fan_in))
            assert module.bias is not None
            module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
        return self


def save_resnet(network: ResNet, path: Path) -> None:
    """Write the network as ONNX."""
    writer = OnnxWriter((3, network.size, network.size))

    def conv(x: str, layer: nn.Module) -> str:
        assert isinstance(layer, nn.Conv2d)
        return writer.conv(x, *_arrays(layer), int(layer.stride[0]), int(layer.padding[0]))

    x = writer.relu(conv("X", network.stem))
    for block in network.blocks:
        assert isinstance(block, Block)
        skip = x if block.skip is None else conv(x, block.skip)
        x = writer.relu(writer.add(conv(writer.relu(conv(x, block.first)), block.second), skip))
    x = writer.relu(writer.linear(writer.flatten(x), *_arrays(network.hidden)))
    writer.linear(x, *_arrays(network.head))
    writer.save(path, network.classes)


def _arrays(layer: nn.Conv2d | nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    assert layer.bias is not None
    return layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()


# ----------------------------------------------------------------------------------------------------- properties


def save_box(
    path: Path, lower: np.ndarray, upper: np.ndarray, n_out: int, threshold: float = 1e6, relation: str = ">="
) -> None:
    """A VNN-LIB file with an unsafe set of one row: the first output reaches a threshold, from below or (<=) above."""
    text = _declarations(lower.size, n_out) + _box(lower, upper) + [f"(assert ({relation} Y_0 {threshold!r}))"]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def save_robustness(path: Path, title: str, lower: np.ndarray, upper: np.ndarray, label: int, classes: int) -> None:
    """ "Some input of the box is not classified as ``label``" as VNN-LIB 1.0; bounds are written exactly."""
    others = " ".join(f"(and (<= Y_{label} Y_{j}))" for j in range(classes) if j != label)
    text = [f"; {title}", *_declarations(lower.size, classes), *_box(lower, upper), f"(assert (or {others}))"]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def _declarations(n_in: int, n_out: int) -> list[str]:
    return [f"(declare-const X_{i} Real)" for i in range(n_in)] + [f"(declare-const Y_{j} Real)" for j in range(n_out)]


def _box(lower: np.ndarray, upper: np.ndarray) -> list[str]:
    pairs = zip(lower.ravel().tolist(), upper.ravel().tolist(), strict=True)
    return [f"(assert (>= X_{i} {lo!r}))\n(assert (<= X_{i} {hi!r}))" for i, (lo, hi) in enumerate(pairs)]
