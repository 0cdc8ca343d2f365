"""Recording work of fixed shapes as CUDA graphs, which a GPU repeats as one launch.

What is recorded must not depend on values: no tensor is read by the host, and no shape follows from one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


class Recorder(Protocol):
    """What records work on a device."""

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """The outputs of work, and what fills them anew from the inputs that the work reads.

        The work is done once as it is before it is recorded.

        Raises:
            RuntimeError: the work cannot be recorded.
        """
        ...


# Threads of a process record on one stream.
_ONE_AT_A_TIME = threading.Lock()


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory, since only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.CUDAGraph | None = None  # a pool that no graph uses any more cannot be used again
        self._failures = 0

    def record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        if self._failures >= _FAILURES:
            raise RuntimeError("too much could not be recorded before")
        with _ONE_AT_A_TIME:
            try:
                return self._record(work)
            except BaseException:
                self._failures += 1
                self._last = None  # its memory may be what is missing
                self.pool = torch.cuda.graph_pool_handle()
                raise

    def _record(self, work: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        current, stream = torch.cuda.current_stream(self.device), _stream(self.device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                work()  # kernels are loaded and libraries take their workspaces outside the recording
                stream.synchronize()
                # Other threads may go on talking to the device meanwhile.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = work()
                except BaseException:
                    with suppress(RuntimeError):  # the stream must leave the recording; what failed is told already
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            current.wait_stream(stream)
        self._last = graph
        return outputs, graph.replay


# After so many failures nothing more is tried: each costs as much as the work.
_FAILURES = 3


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where this process records: one stream, since cuBLAS keeps a workspace for every one that it has seen."""
    return torch.cuda.Stream(device)
