"""Work of fixed shapes that a GPU repeats as one launch.

Small batches leave a GPU waiting for the next kernel. Work that comes again with the same shapes is therefore recorded
as a CUDA graph and replayed: its inputs are copied into the buffers that were recorded, and its outputs out of them.
Batches are padded with domains to a power of two, so that few shapes come again often. A recording costs as much as
several runs, which is why the first runs of a shape are left to the caller, who does them step by step.

What is recorded must not depend on values: no tensor is read by the host, and no shape follows from one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.core.cuda_graphs import CudaGraphs, Outputs, Recorder
from verifier.core.memory import out_of_memory

_LOG = logging.getLogger(__name__)

# Runs of a shape before it is recorded, and recordings at most.
_AFTER = 6
_MOST = 16
# Domains of the smallest recording.
_SMALLEST = 8
# Numbers of the widest buffer up to which launches take longer than the work; larger batches gain nothing.
_MOST_NUMBERS = 1 << 22
# Bytes that all recordings together take at most for each of these numbers: some thirty buffers of the largest one,
# twice because its first run is not recorded, and the inputs and outputs of all.
_BYTES = 512


@dataclass(frozen=True)
class _Recording:
    """Buffers that lead with the padded number of domains, and what computes the outputs from the inputs.

    Attributes:
        work: what was recorded; a replay reads the tensors that it holds.
    """

    inputs: tuple[Tensor, ...]
    outputs: Outputs
    replay: Callable[[], None]
    work: Callable[..., Outputs]


class Recordings:
    """The recordings of one search. Every answer is a copy, so that the next replay leaves it alone.

    Attributes:
        made: recordings made so far.
        replays: answers that came from one.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        room: int,
        after: int = _AFTER,
        most: int = _MOST,
        numbers: int = _MOST_NUMBERS,
    ) -> None:
        """
        Args:
            recorder: None: nothing is recorded.
            room: bytes that all recordings may take.
            after: runs of a shape before it is recorded.
            most: recordings at most.
            numbers: of the widest buffer, up to which a batch is recorded.
        """
        self._recorder, self._after, self._most = recorder, after, most
        self._numbers = min(numbers, room // _BYTES)
        self._seen: Counter[Hashable] = Counter()
        self._found: dict[Hashable, _Recording] = {}
        self.made = self.replays = 0

    def run(
        self, key: Hashable, width: int, inputs: tuple[Tensor, ...], work: Callable[..., Outputs]
    ) -> Outputs | None:
        """The outputs of ``work(*inputs)`` from a replay, or None when the caller should do without.

        Args:
            key: what the work depends on besides the inputs.
            width: numbers that one domain adds to the widest buffer.
            inputs: tensors that lead with the domains, as do the outputs.
        """
        count = int(inputs[0].shape[0])
        size = padded(count)
        if self._recorder is None or not count or size * width > self._numbers:
            return None
        place = (key, size)
        try:
            found = self._found.get(place)
            if found is None:
                self._seen[place] += 1
                if self._seen[place] <= self._after or len(self._found) >= self._most:
                    return None
                found = self._found[place] = _record(self._recorder, size, inputs, work)
                self.made += 1
            for buffer, value in zip(found.inputs, inputs, strict=True):
                buffer[:count].copy_(value)
            found.replay()
            self.replays += 1
            return tuple(value[:count].clone() for value in found.outputs)
        except (RuntimeError, MemoryError) as error:
            why = "out of memory" if out_of_memory(error) else str(error).split("\n", 1)[0]
            _LOG.debug("work on %d domains is not recorded, and nothing from here on: %s", size, why)
            self.close()
            return None

    @property
    def possible(self) -> bool:
        """Whether anything is recorded, or may still be."""
        return self._recorder is not None

    def close(self) -> None:
        """Give up the memory of all recordings; none is made any more."""
        self._recorder = None
        self._found.clear()


def _record(recorder: Recorder, size: int, inputs: tuple[Tensor, ...], work: Callable[..., Outputs]) -> _Recording:
    """A recording on ``size`` domains; the given ones stand for all of them until others come."""
    rows = torch.arange(size, device=inputs[0].device) % inputs[0].shape[0]
    buffers = tuple(value[rows] for value in inputs)
    outputs, replay = recorder.record(lambda: work(*buffers))
    return _Recording(buffers, outputs, replay, work)


def padded(count: int) -> int:
    """The number of domains that a batch is padded to: a power of two."""
    return max(_SMALLEST, 1 << (count - 1).bit_length())


def recordings(device: torch.device, wanted: bool, room: int) -> Recordings:
    """What a search on a device records.

    Args:
        wanted: ``bab.cuda_graphs``; nothing is recorded on a CPU.
        room: bytes that the recordings may take.
    """
    return Recordings(CudaGraphs(device) if wanted and device.type == "cuda" else None, room)
