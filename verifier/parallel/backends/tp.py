"""Tensor parallelism: every rank of a group has a part of the features, and of the weights that make them."""

from __future__ import annotations

from verifier.config import ParallelConfig
from verifier.core.errors import ConfigError, MemoryExceeded
from verifier.parallel.backends import Place, Placed, Placement, node_bytes
from verifier.parallel.stores import Resident, column_blocks
from verifier.parallel.tp import TensorParallel, cut_graph


class CutNetwork(Placement):
    """Weights never leave their device; groups may deal rows among each other."""

    def check(self, parallel: ParallelConfig, ranks: int, groups: int) -> None:
        if ranks // groups == 1:
            raise ConfigError(
                f"parallel.backend is tp and every group has one rank (ranks {ranks}, domains {groups}); "
                "tp needs at least two ranks in a group"
            )
        if parallel.offload:
            raise ConfigError("parallel.offload does not go with tp, whose weights never leave their device; use fsdp")

    def place(self, place: Place) -> Placed:
        part = cut_graph(place.graph, place.group)
        need, limit, device = node_bytes(part.cuts), place.limit, place.world.device
        if limit is not None and need > limit:
            raise MemoryExceeded(
                f"a rank's share of the weights takes {need} bytes and memory.device_limit is {limit}; use more ranks "
                "or a higher limit"
            )
        store = Resident(device, place.cast_bytes(need), column_blocks(part, place.config.parallel.stream))
        for source, tensor in place.parameters():
            for handle, block in part.blocks(source, tensor):
                store.put(handle, block)
        backend = TensorParallel(part, device, store, place.chunk_bytes, place.peers, place.sharded)
        return Placed(part, backend, TensorParallel(part, device, store, place.chunk_bytes))


BACKEND = CutNetwork()
