"""Several groups of ranks as threads: every rank has its own group and a team, its peers in the other groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tests.parallel.threads import ThreadGroup, on_ranks
from verifier.core.backend import Group

T = TypeVar("T")


def on_grid(groups: int, ranks: int, work: Callable[[Group, Group], T]) -> list[list[T]]:
    """What ``work(team, group)`` returns on every rank, [group][rank]; an error of one rank ends all."""
    one = ThreadGroup

    def make(everyone: ThreadGroup) -> T:
        mine, place = divmod(everyone.rank, ranks)
        # The first rank of each group and of each team opens its room, and all get to know all rooms.
        room = type(everyone.room)
        inner = everyone.room.synchronise(everyone.rank, "groups", room(ranks) if place == 0 else None)[mine * ranks]
        outer = everyone.room.synchronise(everyone.rank, "teams", room(groups) if mine == 0 else None)[place]
        try:
            return work(one(outer, mine, groups), one(inner, place, ranks))
        except BaseException:
            for opened in (inner, outer):
                opened.barrier.abort()
            raise

    flat = on_ranks(groups * ranks, make)
    return [flat[g * ranks : (g + 1) * ranks] for g in range(groups)]
