"""LayerNormalization and InstanceNormalization, for every axis and with their optional outputs."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from verifier.frontend.builder import broadcast
from verifier.frontend.converters import Attributes, Function
from verifier.testing import Node


def _layer_norm(a: Attributes) -> Function:
    axis, epsilon = a.get("axis", -1), a.get("epsilon", 1e-5)
    if a.get("stash_type", 1) not in (1, 11):
        raise NotImplementedError("LayerNormalization with statistics of a type other than float32 or float64")

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        k = axis % x.dim()
        shape = x.shape[k:]
        if broadcast(scale.shape, shape) != tuple(shape) or (
            bias is not None and broadcast(bias.shape, shape) != tuple(shape)
        ):
            raise NotImplementedError("LayerNormalization whose scale reaches beyond the normalised dims")
        offset = None if bias is None else bias.expand(shape)
        y = F.layer_norm(x, list(shape), scale.expand(shape), offset, epsilon)
        if a.outputs == 1:
            return y
        dims = list(range(k, x.dim()))
        mean = x.mean(dims, keepdim=True)
        deviation = torch.rsqrt(((x - mean) * (x - mean)).mean(dims, keepdim=True) + epsilon)
        return (y, mean, deviation)[: a.outputs]

    return run


def _instance_norm(a: Attributes) -> Function:
    epsilon = a.get("epsilon", 1e-5)
    return lambda x, scale, bias: F.group_norm(x, x.shape[1], scale, bias, epsilon)


def _f(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


CONVERTERS = {"LayerNormalization": _layer_norm, "InstanceNormalization": _instance_norm}
NODES = [
    *(Node("LayerNormalization", (1, 2, 6), (_f(6), _f(6)), {"epsilon": 0.01, "axis": -1}, 17) for _ in range(1)),
    Node("LayerNormalization", (2, 3, 4), (_f(3, 4), _f(3, 4)), {"axis": 1, "epsilon": 0.1}, 17),
    Node("LayerNormalization", (3, 4), (_f(4),), {"axis": 1, "epsilon": 0.1}, 17),
    Node("InstanceNormalization", (1, 3, 4), (_f(3), _f(3)), {"epsilon": 0.1}, 13),
    Node("InstanceNormalization", (2, 2, 3, 3), (_f(2), _f(2)), {}, 13),
]
