"""The device that tests of bounds, certificates and searches compute on: ``VERIFIER_TEST_DEVICE``, else the CPU.

Random numbers come from CPU generators and then move to :data:`DEVICE`: every device is asked the same question.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from verifier.graph.graph import Graph
from verifier.parallel.single import SingleBackend
from verifier.solver.setup import plain_kernels

DEVICE = torch.device(os.environ.get("VERIFIER_TEST_DEVICE", "cpu"))
# What makes a query run there.
ON_DEVICE: dict[str, object] = {"device": DEVICE.type}
# float32 convolutions have error bounds on the CPU alone: a GPU may compute them by transforms without an error bound.
CONV_FLOAT32 = DEVICE.type == "cpu"

plain_kernels(DEVICE)
torch.zeros(1, device=DEVICE)  # makes the context here, not within the time limit of some test


def single(graph: Graph, chunk_bytes: int = 256 << 20) -> SingleBackend:
    """The backend of the device, with the graph's parameters on it."""
    return SingleBackend(graph, DEVICE, chunk_bytes)


def array(values: Tensor) -> np.ndarray:
    """Values of any device for numpy."""
    return values.detach().cpu().numpy()
