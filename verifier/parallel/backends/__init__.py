"""How the weights and the work of a network are placed: one file per name that ``parallel.backend`` takes.

``BACKEND`` of a file is a :class:`Placement`. What the engine sees of it later is a ``ParallelBackend``
(:mod:`verifier.core.backend`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from verifier.config import Config, ParallelConfig
from verifier.core.backend import Group, ParallelBackend
from verifier.core.errors import ConfigError, MemoryExceeded
from verifier.core.folders import BACKENDS
from verifier.core.handles import Handle, WeightStore
from verifier.graph.graph import Graph, parameter_bytes
from verifier.parallel.distributed import DistributedBackend
from verifier.parallel.single import SingleBackend
from verifier.parallel.stores import HostOffload, Resident, column_blocks
from verifier.parallel.world import World

_CAST_BYTES = 256 << 20


@dataclass(frozen=True)
class Place:
    """Where a network goes, as one rank sees it.

    Attributes:
        graph: rank 0's has parameters, the others' have none.
        group: the ranks of this rank's group.
        peers: one rank of every group.
        chunk_bytes: of coefficients alive in one chunk of rows.
    """

    graph: Graph
    config: Config
    world: World
    group: Group
    peers: Group
    chunk_bytes: int

    @property
    def limit(self) -> int | None:
        """Bytes that the device may use."""
        return self.config.memory.device_limit

    @property
    def sharded(self) -> bool:
        """Whether rows are dealt to ranks."""
        return self.config.parallel.rows == "sharded"

    def parameters(self) -> Iterator[tuple[Handle, Tensor]]:
        """All parameters one after the other, on the CPU of every rank. A collective call of all ranks."""
        from verifier.parallel.processes import ProcessGroup

        everyone, first = self.world.everyone, self.world.rank == 0
        handles: list[Handle] = everyone.broadcast_object(list(self.graph.parameters) if first else None)
        for handle in handles:
            if first:
                tensor = self.graph.parameters[handle].detach().contiguous()
            else:
                tensor = torch.empty(handle.shape, dtype=handle.dtype)
            if isinstance(everyone, ProcessGroup):
                everyone.broadcast(tensor)
            yield handle, tensor

    def cast_bytes(self, weights: int) -> int:
        """What converted copies of the weights may take beside these."""
        return _CAST_BYTES if self.limit is None else max(0, min(_CAST_BYTES, (self.limit - weights) // 2))


@dataclass(frozen=True)
class Placed:
    """A network in its place.

    Attributes:
        graph: what this rank's engine works on; perhaps a part of the network.
        backend: of all ranks, for the bounds at the root.
        search: of this rank's group, for branch and bound.
    """

    graph: Graph
    backend: SingleBackend | DistributedBackend
    search: ParallelBackend


class Placement(ABC):
    """One way to place weights and work.

    Attributes:
        replicated: every rank can get at all weights without the others. Then every rank searches on its own, unless
            ``parallel.domains`` says otherwise, and attacks read the weights where they are.
    """

    replicated: ClassVar[bool] = False

    def check(self, parallel: ParallelConfig, ranks: int, groups: int) -> None:  # noqa: B027 - most have no demands
        """Whether the settings mean something; ``groups`` divides ``ranks``.

        Raises:
            ConfigError: in one sentence.
        """

    @abstractmethod
    def place(self, place: Place) -> Placed:
        """Put a graph's weights where they belong. A collective call of all ranks.

        Raises:
            MemoryExceeded: they do not fit into ``memory.device_limit``.
        """


@dataclass(frozen=True)
class WholeNetwork(Placement):
    """Every rank evaluates the whole network, and has all of its weights; rows are dealt to the ranks.

    Attributes:
        alone: the backend of one rank by itself.
        several: that of several ranks in lockstep.
    """

    alone: Callable[..., SingleBackend] = SingleBackend
    several: Callable[..., DistributedBackend] = DistributedBackend
    replicated: ClassVar[bool] = True

    def place(self, place: Place) -> Placed:
        self._check_limit(place)
        world, chunk = place.world, place.chunk_bytes
        store = self.store(place)
        for handle, tensor in place.parameters():
            store.put(handle, tensor)
        alone = self.alone(place.graph, world.device, chunk, store)
        if world.size == 1:
            return Placed(place.graph, alone, alone)
        backend = self.several(world.everyone, world.device, store, chunk, place.sharded)
        if place.group.size == 1:
            return Placed(place.graph, backend, alone)
        return Placed(place.graph, backend, self.several(place.group, world.device, store, chunk, place.sharded))

    def store(self, place: Place) -> WeightStore:
        """An empty store for all weights."""
        parallel = place.config.parallel
        columns = column_blocks(place.graph, parallel.stream)
        if parallel.offload:
            return HostOffload(place.world.device, parallel.prefetch, columns)
        return Resident(place.world.device, place.cast_bytes(parameter_bytes(place.graph)), columns)

    def need(self, place: Place, total: int, in_use: int) -> tuple[int, str, str]:
        """Bytes of the device that weights take, what takes them, and what can be done where that is too much.

        Args:
            total: bytes of all weights.
            in_use: bytes of the layers that are whole at once.
        """
        if place.config.parallel.offload:
            return in_use, "the layers in use take", "use parallel.prefetch=false, parallel.stream or a higher limit"
        advice = "raise it, shard the weights (parallel.backend=fsdp with parallel.ranks), or set parallel.offload=true"
        return total, "the weights take", advice

    def _check_limit(self, place: Place) -> None:
        """Whether the weights fit: at rest, and the layers that are whole at once."""
        if place.limit is None:
            return
        nodes, parallel = place.graph.nodes, place.config.parallel
        total = sum(node_bytes(node.op.handles) for node in nodes)
        columns = column_blocks(place.graph, parallel.stream)
        largest = max((node_bytes(h for h in node.op.handles if h not in columns) for node in nodes), default=0)
        need, how, advice = self.need(place, total, largest * (2 if parallel.prefetch else 1))
        if need > place.limit:
            raise MemoryExceeded(f"{how} {need} bytes and memory.device_limit is {place.limit}; {advice}")


def node_bytes(handles: Iterable[Handle]) -> int:
    """Bytes of some parameters as stored."""
    out = 0
    for handle in handles:
        size = handle.dtype.itemsize
        for n in handle.shape:
            size *= n
        out += size
    return out


def placement(config: Config) -> Placement:
    """What ``parallel.backend`` names.

    Raises:
        ConfigError: its file does not say how anything is placed.
    """
    name = config.parallel.backend
    found = BACKENDS[name]
    if not isinstance(found, Placement):
        raise ConfigError(f"BACKEND of the parallel backend '{name}' is a {type(found).__name__}, not a Placement")
    return found
