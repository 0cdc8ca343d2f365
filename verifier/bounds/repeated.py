"""Steps of an optimisation that are recorded once and replayed after that (``core/cuda_graphs.py``)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from verifier.bounds.climb import Climb
from verifier.bounds.paces import Pace
from verifier.core.cuda_graphs import Recorder

_LOG = logging.getLogger(__name__)
_Found = list[tuple[Tensor, dict[int, Tensor]]]
# A recording costs as much as a few steps; where tensors have more numbers, launches take no longer than their work.
_WORTH_RECORDING, _MOST_NUMBERS = 5, 1 << 25


class Repeated:
    """Steps that are recorded once and replayed after that, where a device does that.

    Args:
        pace: tensors.
    """

    def __init__(self, climb: Climb, pace: Pace, recorder: Recorder | None) -> None:
        self.climb, self.pace, self.recorder = climb, pace, recorder
        self._replay: Callable[[], None] | None = None
        self._recorded: _Found = []
        self._steps = 0

    def step(self, left: int) -> bool:
        """Do a step, bounds and rise, from a recording; False, and nothing is done, where there is none.

        Args:
            left: steps that there are, this one among them.
        """
        self._steps += 1
        if self._replay is not None:
            self._replay()
            self.climb.found = self._recorded[1]
            if self.climb.best.device.type == "cuda":  # steps are begun faster than they end, and there is a deadline
                torch.cuda.current_stream(self.climb.best.device).synchronize()
            return True
        if self.recorder is None or self._steps == 1 or left < _WORTH_RECORDING or not self._small():
            return False
        recorder, self.recorder = self.recorder, None  # it is tried once
        try:
            _, self._replay = recorder.record(self._work)
        except (RuntimeError, MemoryError) as error:
            _LOG.debug("steps are not recorded: %s", str(error).split("\n", 1)[0])
        if self._recorded:
            self.climb.found = self._recorded[0]
        return bool(self._recorded)

    def _work(self) -> tuple[Tensor, ...]:
        """The first call is a step; the second one is the recording of all others."""
        self.climb.bound()
        self.climb.rise(self.pace)
        self._recorded.append(self.climb.found)
        x, kept = self.climb.found
        return (x, *kept.values())

    def _small(self) -> bool:
        rows = self.climb.best.numel()
        return rows * max(node.size for node in self.climb.engine.graph.nodes) <= _MOST_NUMBERS
