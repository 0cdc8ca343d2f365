"""Set-up of a run: device, threads, deterministic kernels, and weights where the configuration wants them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from verifier.config import Config
from verifier.core.arithmetic import check_environment, plain_arithmetic
from verifier.core.backend import Group, ParallelBackend
from verifier.core.errors import ConfigError, MemoryExceeded
from verifier.core.handles import Handle, WeightStore
from verifier.core.memory import free_bytes, out_of_memory
from verifier.graph.graph import Graph, parameter_bytes
from verifier.parallel.distributed import DistributedBackend
from verifier.parallel.group import Solo
from verifier.parallel.single import SingleBackend
from verifier.parallel.stores import HostOffload, Resident, Sharded, column_blocks
from verifier.parallel.tp import TensorParallel, cut_graph
from verifier.parallel.world import World, rank_device, solo
from verifier.solver.strategy import node_flops

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_SMALLEST_CHUNK = 1 << 20
_CAST_BYTES = 256 << 20


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
    small = sum(map(node_flops, graph.nodes)) < _ONE_THREAD_FLOPS
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
        ConfigError: the groups do not divide the ranks, or the backend needs more ranks.
    """
    parallel = config.parallel
    groups = parallel.domains
    if groups == "auto":
        groups = ranks if parallel.backend == "single" else 1
    if ranks % groups:
        raise ConfigError(
            f"parallel.domains is {groups} but there are {ranks} ranks; it must divide them, since every group has "
            "ranks / domains of them"
        )
    if parallel.backend == "tp" and ranks // groups == 1:
        raise ConfigError(
            f"parallel.backend is tp and every group has one rank (ranks {ranks}, domains {groups}); "
            "tp needs at least two ranks in a group"
        )
    if parallel.backend == "tp" and parallel.offload:
        raise ConfigError("parallel.offload does not go with tp, whose weights never leave their device; use fsdp")
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
    if config.parallel.backend == "fsdp" and each == 1:
        _LOG.info("parallel.backend is fsdp, but a group has one rank: its weights are whole")
    _check_limit(graph, config, each, limit)
    # Chunks follow the configured budgets alone, never free memory: equal settings give equal kernel calls.
    chunk = (
        config.memory.chunk_bytes if limit is None else min(config.memory.chunk_bytes, max(_SMALLEST_CHUNK, limit // 8))
    )
    pool = (free_bytes(world.device) if limit is None else limit) // (3 * _sharing(world))
    sharded = config.parallel.rows == "sharded"
    if config.parallel.backend == "tp":
        part = cut_graph(graph, group)
        need = node_bytes(part.cuts)
        if limit is not None and need > limit:
            raise MemoryExceeded(
                f"a rank's share of the weights takes {need} bytes and memory.device_limit is {limit}; use more ranks "
                "or a higher limit"
            )
        store = Resident(world.device, _cast_bytes(limit, need), column_blocks(part, config.parallel.stream))
        for source, tensor in _parameters(graph, world):
            for handle, block in part.blocks(source, tensor):
                store.put(handle, block)
        backend = TensorParallel(part, world.device, store, chunk, peers, sharded)
        search = TensorParallel(part, world.device, store, chunk)
        return Setup(part, backend, search, peers, group, pool)
    store = _store(graph, config, world, group)
    for handle, tensor in _parameters(graph, world):
        store.put(handle, tensor)
    single = SingleBackend(graph, world.device, chunk, store)
    if world.size == 1:
        return Setup(graph, single, single, peers, group, pool)
    backend = DistributedBackend(world.everyone, world.device, store, chunk, sharded)
    search = DistributedBackend(group, world.device, store, chunk, sharded) if each > 1 else single
    return Setup(graph, backend, search, peers, group, pool)


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


def _parameters(graph: Graph, world: World) -> Iterator[tuple[Handle, Tensor]]:
    """All parameters one after the other, on the CPU of every rank."""
    from verifier.parallel.processes import ProcessGroup

    handles: list[Handle] = world.everyone.share(list(graph.parameters) if world.rank == 0 else None)
    for handle in handles:
        if world.rank == 0:
            tensor = graph.parameters[handle].detach().contiguous()
        else:
            tensor = torch.empty(handle.shape, dtype=handle.dtype)
        if isinstance(world.everyone, ProcessGroup):
            world.everyone.broadcast(tensor)
        yield handle, tensor


def _store(graph: Graph, config: Config, world: World, group: Group) -> WeightStore:
    parallel, limit = config.parallel, config.memory.device_limit
    columns = column_blocks(graph, parallel.stream)
    if parallel.backend == "fsdp" and not isinstance(group, Solo):
        return Sharded(group, world.device, parallel.prefetch, columns)  # type: ignore[arg-type]
    if parallel.offload:
        return HostOffload(world.device, parallel.prefetch, columns)
    return Resident(world.device, _cast_bytes(limit, parameter_bytes(graph)), columns)


def _cast_bytes(limit: int | None, weights: int) -> int:
    """What converted copies of the weights may take."""
    return _CAST_BYTES if limit is None else max(0, min(_CAST_BYTES, (limit - weights) // 2))


def _check_limit(graph: Graph, config: Config, each: int, limit: int | None) -> None:
    """Whether the weights fit: at rest, and the layers that are whole at once."""
    if limit is None or config.parallel.backend == "tp":
        return
    parallel = config.parallel
    total = sum(node_bytes(node.op.handles) for node in graph.nodes)
    columns = column_blocks(graph, parallel.stream)
    largest = max((node_bytes(h for h in node.op.handles if h not in columns) for node in graph.nodes), default=0)
    whole = largest * (2 if parallel.prefetch else 1)
    if parallel.backend == "fsdp" and each > 1:
        need, how = total // each + whole, f"a {each}th of the weights and the layers in use take"
        advice = "use more ranks, parallel.prefetch=false, parallel.stream or a higher limit"
    elif parallel.offload:
        need, how = whole, "the layers in use take"
        advice = "use parallel.prefetch=false, parallel.stream or a higher limit"
    else:
        need, how = total, "the weights take"
        advice = "raise it, shard the weights (parallel.backend=fsdp with parallel.ranks), or set parallel.offload=true"
    if need > limit:
        raise MemoryExceeded(f"{how} {need} bytes and memory.device_limit is {limit}; {advice}")


def node_bytes(handles: Iterable[Handle]) -> int:
    """Bytes of some parameters as stored."""
    out = 0
    for handle in handles:
        size = handle.dtype.itemsize
        for n in handle.shape:
            size *= n
        out += size
    return out
