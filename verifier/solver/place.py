"""Set-up of a run: device, threads, deterministic kernels, the backend and its memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from verifier.config import Config
from verifier.core.errors import ConfigError, MemoryExceeded
from verifier.core.memory import free_bytes, out_of_memory
from verifier.graph.graph import Graph, parameter_bytes
from verifier.parallel.single import SingleBackend
from verifier.solver.strategy import node_flops

T = TypeVar("T")
_SMALLEST_CHUNK = 1 << 20


@dataclass
class Placed:
    """A network on its device.

    Attributes:
        pool_bytes: what the open domains of a search may take.
    """

    backend: SingleBackend
    pool_bytes: int

    def retry(self, work: Callable[[], T]) -> T:
        """Run; on an out-of-memory error halve the chunks and start again, until chunks are tiny."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.backend.chunk_bytes <= _SMALLEST_CHUNK:
                    raise MemoryExceeded(f"even chunks of {_SMALLEST_CHUNK >> 20} MiB do not fit") from error
                self.backend.chunk_bytes //= 2


def device_of(config: Config) -> torch.device:
    """The device the configuration asks for."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no CUDA device; use 'auto' or 'cpu'")
    wanted = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wanted else "cpu")


# Operations of one row's walk below which a second thread waits longer than it works.
_ONE_THREAD_FLOPS = 2e5


@contextmanager
def cpu_threads(graph: Graph, config: Config) -> Iterator[None]:
    """The number of CPU threads for one query; the process gets its own setting back."""
    before = torch.get_num_threads()
    small = sum(map(node_flops, graph.nodes)) < _ONE_THREAD_FLOPS
    wanted = (1 if small else before) if config.threads == "auto" else config.threads
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def place(graph: Graph, config: Config) -> Placed:
    """Put a graph's weights on the configured device."""
    device = device_of(config)
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    limit = config.memory.device_limit
    if limit is not None and parameter_bytes(graph) > limit:
        raise MemoryExceeded(
            f"the weights take {parameter_bytes(graph)} bytes and memory.device_limit is {limit}; raise the limit"
        )
    # Chunks follow the configured budgets alone, never free memory: equal settings give equal kernel calls.
    chunk = (
        config.memory.chunk_bytes if limit is None else min(config.memory.chunk_bytes, max(_SMALLEST_CHUNK, limit // 8))
    )
    return Placed(SingleBackend(graph, device, chunk), (free_bytes(device) if limit is None else limit) // 3)
