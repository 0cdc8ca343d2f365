"""Weights sharded over the ranks of a group: each stores its part of every weight, and layers are gathered for use."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from verifier.core.handles import WeightStore
from verifier.parallel.backends import Place, Placed, WholeNetwork
from verifier.parallel.stores import Sharded, column_blocks

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardedWeights(WholeNetwork):
    """Rows are dealt as where weights are whole; a group of one rank has whole weights."""

    replicated: ClassVar[bool] = False

    def place(self, place: Place) -> Placed:
        if place.group.size == 1:
            _LOG.info("parallel.backend is fsdp, but a group has one rank: its weights are whole")
        return super().place(place)

    def store(self, place: Place) -> WeightStore:
        if place.group.size == 1:
            return super().store(place)
        parallel = place.config.parallel
        columns = column_blocks(place.graph, parallel.stream)
        return Sharded(place.group, place.world.device, parallel.prefetch, columns)  # type: ignore[arg-type]

    def need(self, place: Place, total: int, in_use: int) -> tuple[int, str, str]:
        each = place.group.size
        if each == 1:
            return super().need(place, total, in_use)
        advice = "use more ranks, parallel.prefetch=false, parallel.stream or a higher limit"
        return total // each + in_use, f"a {each}th of the weights and the layers in use take", advice


BACKEND = ShardedWeights()
