"""Set-up of a run: device, threads, deterministic kernels, and weights where the configuration wants them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from verifier.config import Config
from verifier.core.arithmetic import check_environment, plain_arithmetic
from verifier.core.backend import Group, ParallelBackend
from verifier.core.device import default_chunk_bytes
from verifier.core.errors import ConfigError, MemoryExceeded
from verifier.core.memory import free_bytes, out_of_memory
from verifier.graph.graph import Graph
from verifier.parallel.backends import Place, placement
from verifier.parallel.distributed import DistributedBackend
from verifier.parallel.single import SingleBackend
from verifier.parallel.world import World, rank_device, solo

T = TypeVar("T")
_SMALLEST_CHUNK = 1 << 20


@dataclass
class Setup:
    """A network on its devices, as one rank sees it.

    Attributes:
        graph: what the engine works on; under tensor parallelism this rank's part of it.
        backend: for the bounds at the root, which all ranks compute together.
        search: for branch and bound; the ranks of one group.
        peers: one rank of every group that searches apart.
        group: the ranks of this rank's group.
        pool_bytes: what the open domains of a search may take.
    """

    graph: Graph
    backend: SingleBackend | DistributedBackend
    search: ParallelBackend
    peers: Group
    group: Group
    pool_bytes: int

    def retry(self, work: Callable[[], T]) -> T:
        """Run; on an out-of-memory error halve the chunks and start again, until chunks are tiny.

        Several ranks cannot start again alone; there the error ends the phase.
        """
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.backend.size > 1:
                    raise MemoryExceeded(
                        "the device's memory does not hold a chunk; lower memory.chunk_bytes"
                    ) from error
                if self.backend.chunk_bytes <= _SMALLEST_CHUNK:
                    raise MemoryExceeded(f"even chunks of {_SMALLEST_CHUNK >> 20} MiB do not fit") from error
                self.backend.chunk_bytes //= 2


def device_of(config: Config) -> torch.device:
    """The device the configuration asks for, of a job of one rank."""
    device = rank_device(config.device, 0)
    return torch.device("cuda") if device.type == "cuda" else device


# Operations of one row's walk below which a second thread waits longer than it works.
_ONE_THREAD_FLOPS = 2e5


def rank_threads(config: Config, ranks: int) -> int:
    """CPU threads of one of several ranks on this machine."""
    if config.threads != "auto":
        return config.threads
    return max(1, len(os.sched_getaffinity(0)) // ranks)


@contextmanager
def cpu_threads(graph: Graph, config: Config, ranks: int = 1) -> Iterator[None]:
    """The number of CPU threads for one query, in plain arithmetic; the process gets its own settings back."""
    before = torch.get_num_threads()
    small = sum(node.flops for node in graph.nodes) < _ONE_THREAD_FLOPS
    most = before if ranks == 1 else rank_threads(config, ranks)
    wanted = (1 if small else most) if config.threads == "auto" else config.threads
    torch.set_num_threads(wanted)
    try:
        with plain_arithmetic():
            yield
    finally:
        torch.set_num_threads(before)


def check_parallel(config: Config, ranks: int) -> None:
    """Refuse combinations of settings that mean nothing.

    Raises:
        ConfigError: in one sentence.
    """
    groups_of(config, ranks)


def groups_of(config: Config, ranks: int) -> int:
    """How many groups search apart.

    Raises:
        ConfigError: the groups do not divide the ranks, or the backend does not go with the other settings.
    """
    parallel, chosen = config.parallel, placement(config)
    groups = parallel.domains
    if groups == "auto":
        groups = ranks if chosen.replicated else 1
    if ranks % groups:
        raise ConfigError(
            f"parallel.domains is {groups} but there are {ranks} ranks; it must divide them, since every group has "
            "ranks / domains of them"
        )
    chosen.check(parallel, ranks, groups)
    return groups


def set_up(graph: Graph, config: Config, world: World | None = None) -> Setup:
    """Put a graph's weights where the configuration wants them. A collective call of all ranks.

    Args:
        graph: rank 0 gives one with parameters; the others' have none.

    Raises:
        MemoryExceeded: the weights do not fit into ``memory.device_limit``.
    """
    world = world or solo(device_of(config))
    if world.device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(world.device)
    plain_kernels(world.device)
    groups = groups_of(config, world.size)
    each = world.size // groups
    group = world.subgroup([range(g * each, (g + 1) * each) for g in range(groups)])
    peers = world.subgroup([range(i, world.size, each) for i in range(each)])
    limit = config.memory.device_limit
    # Chunks follow the configured budgets and the kind of device, never free memory: equal settings give equal kernel
    # calls. Ranks on different devices take the smallest of their sizes.
    chunk = config.memory.chunk_bytes
    chunk = default_chunk_bytes(world.device) if chunk == "auto" else chunk
    chunk = chunk if limit is None else min(chunk, max(_SMALLEST_CHUNK, limit // 8))
    chunk = int(min(size for (size,) in world.everyone.numbers([chunk])))
    pool = (free_bytes(world.device) if limit is None else limit) // (3 * _sharing(world))
    placed = placement(config).place(Place(graph, config, world, group, peers, chunk))
    return Setup(placed.graph, placed.backend, placed.search, peers, group, pool)


def plain_kernels(device: torch.device) -> None:
    """Full precision and the same kernel each time, which bounds on rounding errors and bit-identical results rest on.

    Raises:
        ConfigError: the environment makes the device's libraries do something else.
    """
    check_environment(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def _sharing(world: World) -> int:
    """Ranks that share this rank's device."""
    if world.device.type == "cpu":
        return world.size
    return max(1, -(-world.size // torch.cuda.device_count()))


def structure(graph: Graph) -> Graph:
    """The graph without its parameters, for ranks that receive them."""
    return replace(graph, parameters={})
