"""Small queries whose answers nobody wants: they load what the first query on a GPU would wait for.

A GPU's libraries load every kernel at its first use, which is most of what a small query takes there. The warm-up goes
through attack, bounds and both searches on networks made up here, in this process alone whatever job it may belong
to. Random numbers come from its own stream and the global one is put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from verifier import api
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.problem import Problem

if TYPE_CHECKING:
    from verifier.core.result import Result

# Enough for every phase to run once with many domains; seconds are a limit, not what it takes.
_SETTINGS = {"bab": {"max_domains": 3000}, "attack": {"restarts": 20, "steps": 20}}
_LIMIT_SECONDS = 10.0
# Thresholds lie below the least sampled output by such shares of the spread: no counterexample, but work for a proof.
_FAR, _NEAR = 1.4, 0.2


def warm_kernels(device: str = "cuda") -> list[Result]:
    """Answer small queries: a convolutional network whose neurons are split, and one whose few inputs are.

    Args:
        device: as in the configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        images = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 24), nn.ReLU(), nn.Linear(24, 3)
        )
        points = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
        kinds = ((images, (1, 1, 6, 6), _FAR), (points, (1, 4), _NEAR))
        queries = [(net, shape, _problem(net, shape, share)) for net, shape, share in kinds]
    config = Config.model_validate({**_SETTINGS, "device": device})
    return [
        api.answer(net, problem, config, api.Terms(Deadline(_LIMIT_SECONDS)), shape) for net, shape, problem in queries
    ]


@torch.no_grad()
def _problem(net: nn.Module, shape: tuple[int, ...], share: float) -> Problem:
    """Whether the first output falls below a threshold on [-1, 1]^n."""
    y = net(2 * torch.rand(2000, *shape[1:]) - 1)
    least = float(y[:, 0].min() - share * (y[:, 0].max() - y[:, 0].min()))
    box = np.ones((1, int(np.prod(shape))), dtype=np.float32)
    return Problem(
        lower=-box,
        upper=box,
        witness_lower=-box,
        witness_upper=box,
        row_y=np.eye(1, y.shape[1]),
        row_x=None,
        row_d=np.array([least]),
        case_box=np.array([0]),
        case_rows=np.array([[0]]),
    )
