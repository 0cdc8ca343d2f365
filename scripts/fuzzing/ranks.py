"""Several ranks: one job of real processes answers many queries in turn, with every backend and grouping."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scripts.fuzzing import checks, search
from scripts.fuzzing.checks import Complaint, Query
from scripts.fuzzing.search import Found
from scripts.fuzzing.settings import random_settings

_QUERIES = 8  # of one job


@contextmanager
def job(size: int, device: str) -> Iterator[Any]:
    """A world of so many ranks; the others follow until it ends."""
    import torch

    from verifier.parallel.launch import LocalRanks

    ranks = LocalRanks(size, ["-m", "scripts.fuzzing.ranks", device], None, 1)
    world = ranks.lead(torch.device("cpu" if device == "cpu" else "cuda:0"))
    try:
        yield world
    finally:
        world.close()


def asked(world: Any) -> checks.Solve:
    """A query answered by a world."""

    def solve(query: Query, network: Any, property: Path) -> Any:
        from verifier.api import load_problem
        from verifier.config import as_config
        from verifier.core.deadline import Deadline
        from verifier.core.progress import SilentProgress
        from verifier.solver.pipeline import solve as answer

        config = as_config(dict(query.settings))
        problem = load_problem(property)
        return answer(network, problem, config, Deadline(query.timeout), SilentProgress(), world)

    return solve


def bounds_differ(query: Query, network: Any, world: Any) -> Complaint | None:
    """Bounds computed by all ranks against those of one: sound, and with the same bits where weights are whole."""
    from verifier.api import Job, bound_network, round_down
    from verifier.config import as_config
    from verifier.solver.phases import BoundNetwork, BoundsReport

    config = as_config(dict(query.settings))
    low, high = (np.asarray(v) for v in (query.lower, query.upper))
    settings = {k: v for k, v in query.settings.items() if not k.startswith("parallel.")}
    values = checks.known_values(query)
    method = query.methods[0] if query.methods else "crown"
    box = round_down(low), -round_down(-high)
    wanted = BoundNetwork(*box, method, True)  # type: ignore[arg-type]
    ours = bound_network(Job(0, lambda _: world), lambda: network, config, wanted, BoundsReport)
    alone = bound_network(_alone(settings), lambda: network, as_config(settings), wanted, BoundsReport)
    for name, interval in ours.bounds.certified.items():
        lower, upper = (np.asarray(t.double()).reshape(-1) for t in interval)
        for x, known in values:
            wrong = checks._outside(f"{method} on ranks", name, lower, upper, known, x)
            if wrong is not None:
                return wrong
        one = alone.bounds.certified.get(name)
        if config.parallel.backend != "tp" and one is not None:
            for a, b in zip(interval, one, strict=True):
                if not bool((a == b).all()):
                    return Complaint("other bits", f"{method} of '{name}' differs between {world.size} ranks and one")
    return None


def _alone(settings: dict[str, Any]) -> Any:
    from verifier.api import Job
    from verifier.config import as_config
    from verifier.parallel.world import solo
    from verifier.solver.setup import device_of

    return Job(0, lambda _: solo(device_of(as_config(settings))))


def run(rng: np.random.Generator, device: str) -> Iterator[Found | None]:
    """One job and its queries; what is found is told when the job has ended, as there can be only one at a time."""
    import torch

    size = int(rng.choice([2, 2, 3]))
    if device == "cuda" and torch.cuda.device_count() < size:
        device = "cpu"  # a rank needs a GPU of its own
    told: list[Found] = []
    with job(size, device) as world:
        for _ in range(_QUERIES):
            query = random_query(rng, device, size)
            if query is None:
                continue
            found = complaints_of(query, world)
            if not found:
                yield None
            told += [Found(query, c) for c in found[:1]]
            if any(c.what in ("crash", "error") for c in found):
                break  # the other ranks may be anywhere
    yield from told


def random_query(rng: np.random.Generator, device: str, size: int) -> Query | None:
    """A query for so many ranks."""
    query = search.random_query(rng, device)
    if query is None:
        return None
    settings = random_settings(rng, device, 200)
    for key in ("parallel.stream", "parallel.offload", "parallel.prefetch"):
        settings.pop(key, None)
    backend = str(rng.choice(["single", "single", "fsdp", "tp"]))
    settings |= {"parallel.backend": backend, "parallel.ranks": size}
    if rng.random() < 0.3:
        settings["parallel.domains"] = 1 if backend == "tp" else int(rng.choice([1, size]))
    if rng.random() < 0.2:
        settings["parallel.rows"] = "replicated"
    return checks.at(query, settings=settings, methods=query.methods[:1], timeout=4.0)


def complaints_of(query: Query, world: Any) -> list[Complaint]:
    """What is wrong with bounds and verdict of a job."""
    from verifier.core.errors import UnsupportedError

    try:
        with checks.written(query) as (file, _), checks.quiet():
            network = checks.load(file)
            # Small chunks, so that rows are dealt; ranks talk at every step of every chunk, and bounds know no limit.
            few = {"memory.chunk_bytes": 512, "bounds.alpha.iterations": 2, "bounds.alpha.intermediate_iterations": 2}
            again = checks.at(query, settings={**query.settings, **few})
            wrong = bounds_differ(again, network, world)
        return [wrong] if wrong else checks.examine(checks.at(query, methods=()), asked(world), network)
    except UnsupportedError:
        return []
    except Exception as error:
        return [Complaint("crash", checks.last_words(error))]


def confirmed(query: Query) -> list[Complaint]:
    """The complaints of a query on a job of its own, for the reducer."""
    with job(int(query.settings.get("parallel.ranks", 2)), str(query.settings.get("device", "cpu"))) as world:
        return complaints_of(query, world)


def follow(device: str, address: str, rank: int, size: int, parent: int) -> None:
    """A rank other than the first: takes part in query after query until rank 0 ends it."""
    import os

    from verifier.runtime.processes import die_with_parent

    die_with_parent(True)
    if os.getppid() != parent:
        return
    from verifier.parallel.launch import join_leader
    from verifier.solver.ranks import rank_loop

    world = join_leader(address, rank, size, device)
    while True:
        rank_loop(world, object)


if __name__ == "__main__":
    follow(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
