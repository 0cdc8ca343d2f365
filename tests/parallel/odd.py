"""Weights of every rank, stride and small size, as tensors and in networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verifier.core.problem import Problem
from verifier.spec.build import from_box

_seeded = torch.Generator().manual_seed(5)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_seeded)


# Every tensor has a name that says what is odd about it.
TENSORS: dict[str, Tensor] = {
    "0-D": torch.tensor(1.5),
    "0-D of a matrix": _random(3, 3)[1, 2],
    "1-D": _random(5),
    "1-D of one": _random(1),
    "1-D of none": _random(0),
    "1-D with steps": _random(9)[::2],
    "1-D expanded": torch.tensor(2.0).expand(4),
    "1-D one with steps": _random(8)[::8],
    "2-D": _random(3, 4),
    "2-D transposed": _random(3, 4).t(),
    "2-D transposed column": _random(1, 5).t(),
    "2-D transposed row": _random(5, 1).t(),
    "2-D one": _random(1, 1).t(),
    "2-D expanded": _random(1, 4).expand(3, 4),
    "2-D expanded columns": _random(3, 1).expand(3, 4),
    "2-D with steps": _random(6, 8)[::2, ::2],
    "2-D without rows": _random(0, 4),
    "2-D without columns": _random(4, 0),
    "2-D column of a matrix": _random(5, 7)[:, 2:3],
    "3-D": _random(2, 3, 4),
    "3-D permuted": _random(2, 3, 4).permute(2, 0, 1),
    "3-D of ones": _random(1, 1, 1).transpose(0, 2),
    "3-D empty inside": _random(2, 0, 4),
    "4-D": _random(2, 3, 2, 2),
    "4-D channels last": _random(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "4-D expanded": _random(1, 1, 1, 3).expand(2, 3, 2, 3),
    "4-D of one": _random(1, 1, 1, 1),
    "float64 transposed": _random(1, 5).double().t(),
    "int64 with steps": torch.arange(12).reshape(3, 4)[:, ::2],
    "bool transposed": (_random(1, 5) > 0).t(),
}


class Net(nn.Module):
    """A function of the input and of tensors that stay as they are."""

    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor) -> None:
        super().__init__()
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)
        self.function, self.count = function, len(tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(self, f"t{i}") for i in range(self.count)))


def _mlp(x: Tensor, *w: Tensor) -> Tensor:
    for i, weight in enumerate(w):
        x = x @ weight
        x = torch.relu(x) if i + 1 < len(w) else x
    return x


# Networks with their input shapes.
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "one input": (Net(_mlp, _random(6, 1).t(), _random(6, 3), _random(3, 1)), (1, 1)),
    "one neuron": (Net(_mlp, _random(4, 1), _random(1, 1), _random(1, 2)), (1, 4)),
    "one of each": (Net(_mlp, _random(1, 1).t(), _random(1, 1)), (1, 1)),
    "transposed": (Net(_mlp, _random(7, 5).t(), _random(2, 7).t()), (1, 5)),
    "expanded": (Net(_mlp, _random(1, 6).expand(5, 6), _random(6, 1).expand(6, 3)), (1, 5)),
    "steps": (Net(_mlp, _random(10, 12)[::2, ::2], _random(6, 9)[:, ::3]), (1, 5)),
    "one layer": (Net(_mlp, _random(1, 5).t()), (1, 5)),
    "no parameters": (Net(lambda x: torch.relu(x) - x), (1, 3)),
    "scalars": (
        Net(lambda x, s, t: torch.relu(x * s + t) * t, _random(3, 3)[1, 2], torch.tensor([2.0]).expand(3)),
        (1, 3),
    ),
    "batched": (
        Net(lambda x, w, v: torch.relu(x @ w).flatten(1) @ v, _random(3, 2, 4).transpose(0, 1), _random(24, 2)),
        (1, 2, 3, 3),
    ),
    "convolution": (
        Net(
            lambda x, w, v: torch.relu(nn.functional.conv2d(x, w, padding=1)).flatten(1) @ v,
            _random(2, 1, 3, 3).to(memory_format=torch.channels_last),
            _random(1, 32).t(),
        ),
        (1, 1, 4, 4),
    ),
}

SETTINGS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "streamed": {"parallel.stream": 64},
    "streamed by columns": {"parallel.stream": 1},
    "offload": {"parallel.offload": True},
    "offload, streamed, no prefetch": {
        "parallel.offload": True,
        "parallel.stream": 64,
        "parallel.prefetch": False,
    },
    "limit": {"memory.device_limit": 1 << 20},
    "limit, offload": {"memory.device_limit": 1 << 16, "parallel.offload": True},
    "small chunks": {"memory.chunk_bytes": 4096},
    "no prefetch": {"parallel.prefetch": False},
    "rows on every rank": {"parallel.rows": "replicated"},
}
# The ways through the engine that matter to weights.
WAYS: dict[str, Mapping[str, Any]] = {
    "inputs": {"bab.branching": "input"},
    "neurons": {"attack.enabled": False, "bab.branching": "kfsb"},
}


def problem(module: nn.Module, shape: tuple[int, ...]) -> Problem:
    """Whether the first output falls below what it takes at random points, by a margin that is sometimes enough."""
    with torch.no_grad():
        points = torch.rand((200, *shape[1:]), generator=torch.Generator().manual_seed(1)) * 2 - 1
        values = torch.stack([module(p[None]).reshape(-1) for p in points])
    n, low = int(np.prod(shape)), values[:, 0]
    row = np.zeros(values.shape[1])
    row[0] = 1.0
    limit = float(low.min() - 0.1 * (low.max() - low.min()) - 0.01)
    return from_box(-np.ones(n), np.ones(n), [[(row, limit)]], values.shape[1])
