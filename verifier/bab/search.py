"""Branch and bound, the same for splits of inputs, splits of neurons and the refinement of hidden bounds.

Land and Doig, *An Automatic Method of Solving Discrete Programming Problems*, Econometrica 1960; for neural networks
Bunel et al., JMLR 2020. A domain leaves the pool only to be closed by a certified bound, to be replaced by children
that cover it, or to be kept as stuck, and each of these is counted: the problem is proved when no domain is open or
stuck and the counts add up (:mod:`verifier.bab.balance`).
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

from verifier.bab.domains import Domains
from verifier.bab.exchange import Ending, Exchange
from verifier.bab.splitting import Splitting
from verifier.bab.statistics import Stop
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.memory import out_of_memory

D = TypeVar("D", bound=Domains)
C = TypeVar("C", bound=Domains)

_TOO_LARGE = "not even one domain fits"


def branch_and_bound(splitting: Splitting[D, Any, Any], exchange: Exchange[D]) -> Ending:
    """Search until everything is proved, a counterexample is found or a limit is met.

    Args:
        exchange: the limits, and the other groups of ranks that search the same problem; all meet now and then.

    Raises:
        LostDomains: some domain is not accounted for.
        MemoryExceeded, DeadlineExceeded: some group could not go on; raised on all.
    """
    if exchange.first:
        with exchange.guarded():
            splitting.start()
    while True:
        began, longest, stop = time.monotonic(), 0.0, Stop.NONE
        while splitting.pool.count and splitting.witness is None and not exchange.failed:
            stop = exchange.limit(splitting)
            if stop:
                break
            before = time.monotonic()
            with exchange.guarded():
                step(splitting)
            longest = max(longest, time.monotonic() - before)
            if exchange.first:
                splitting.show(exchange.others)
            if exchange.due(time.monotonic() - began, splitting.statistics.bounded):
                break
        ending = exchange.synchronise(splitting, stop, longest)
        if ending is not None:
            return ending


def step(splitting: Splitting[Any, Any, Any]) -> None:
    """One round: pick domains, branch, and bound, certify, offer and push their children."""
    splitting.statistics.rounds += 1
    picked = splitting.pick()
    if not picked.count:
        return
    try:
        children = splitting.branch(picked)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if not _halves_help(splitting, picked, error):
            raise MemoryExceeded(_TOO_LARGE) from error
        splitting.pool.push(picked)
        return
    settle(splitting, children)


def settle(splitting: Splitting[Any, C, Any], domains: C) -> None:
    """Bound domains in batches; close what is certified, and put the rest into the pool.

    A batch that does not fit into memory is halved and tried again, as if it had never been touched.
    """
    parts = splitting.parts(domains)
    while parts and splitting.witness is None:
        part, before, held = parts.pop(), splitting.statistics.copy(), splitting.pool.count
        left = None  # nothing of the batch before takes memory while this one is bounded
        try:
            left = splitting.certify(part, splitting.bound(part))
            splitting.witness = splitting.offer(left)
            if splitting.witness is None:
                splitting.push(left)
            continue
        except DeadlineExceeded as error:
            late, again = DeadlineExceeded(str(error)), []  # without the frames of the old one
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            late, again = MemoryExceeded(_TOO_LARGE), part.halves() if _halves_help(splitting, part, error) else []
        splitting.pool.cut(held)
        splitting.undo(before)
        parts += again
        if not again:  # the others would fare no better
            for rest in (part, *parts):
                splitting.postpone(rest, late)
            return


def _halves_help(splitting: Splitting[Any, Any, Any], part: Domains, error: Exception) -> bool:
    """After an allocation failed: go on with smaller batches; whether the halves of this one are smaller."""
    if splitting.backend.size > 1:  # the other ranks of a group go on: only the end of the job is safe
        raise MemoryExceeded(f"a batch of {part.count} domains does not fit; make bab.batch_size smaller") from error
    splitting.shrink(part.count)
    return part.count > 1
