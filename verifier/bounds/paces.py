"""How an optimisation of slopes and multipliers goes uphill: its schedule, and the learning rates of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """How to optimise: steps, learning rates and their decay.

    Attributes:
        stop: called with a step and the best bounds (B, S) after it, at some of the steps (:func:`.worth.looked_at`);
            True ends early. All ranks decide alike.
    """

    iterations: int
    rate_alpha: float = 0.25
    rate_beta: float = 0.05
    decay: float = 0.97
    stop: Callable[[int, Tensor], bool] | None = None


class Pace(NamedTuple):
    """Learning rates of a step over the first correction of Adam's, and its second correction; numbers, or tensors ()
    that the next step finds changed."""

    alpha: float | Tensor
    beta: float | Tensor
    correction: float | Tensor


class Paces:
    """The pace of every step.

    Args:
        tensors: as tensors, which a recorded step reads; on a GPU always, so that recording changes no bit.
    """

    def __init__(self, schedule: Schedule, device: torch.device, tensors: bool) -> None:
        self.schedule = schedule
        self._table = self._row = None
        self.now = self._numbers(0)
        if tensors:
            self._table = torch.tensor([self._numbers(step) for step in range(schedule.iterations + 1)], device=device)
            self._row = self._table[0].clone()
            self.now = Pace(*self._row.unbind())

    def _numbers(self, step: int) -> Pace:
        schedule, count = self.schedule, step + 1
        rate = schedule.decay**step / (1 - 0.9**count)
        return Pace(schedule.rate_alpha * rate, schedule.rate_beta * rate, 1 - 0.999**count)

    def set(self, step: int) -> None:
        if self._table is None or self._row is None:
            self.now = self._numbers(step)
        else:
            self._row.copy_(self._table[step])
