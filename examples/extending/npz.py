"""An input format: networks in files of numpy, with the arrays w0, b0, w1, b1, ... and ReLUs between the layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn


def read(path: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A network as a torch module, and the shape of one sample.

    Raises:
        OSError, ValueError, KeyError: the user is told that the file cannot be read, and why.
    """
    layers: list[nn.Module] = []
    with np.load(path, allow_pickle=False) as arrays:
        while f"w{len(layers) // 2}" in arrays:
            weight, bias = (torch.from_numpy(arrays[f"{name}{len(layers) // 2}"]).float() for name in "wb")
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = weight, bias
            layers += [layer, nn.ReLU()]
    if not layers:
        raise ValueError("there is no array w0")
    first = layers[0]
    assert isinstance(first, nn.Linear)
    return nn.Sequential(*layers[:-1]), (1, first.in_features)
