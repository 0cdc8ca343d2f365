"""A job of real processes for tests: ``python -m tests.parallel.job lead TASK P`` runs a task below on P ranks.

Rank 0 prints one line of JSON, what the task returned there. A task that raises on any rank ends the job with status 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from scripts.networks import ResNet, save_conv3, save_mlp, save_resnet
from tests.parallel import odd as oddities
from tests.parallel.odd import SETTINGS, TENSORS, WAYS, problem
from verifier.bounds.alpha import Schedule
from verifier.bounds.api import Method, NetworkBounds, Wanted, compute_graph_bounds
from verifier.bounds.engine import Engine
from verifier.config import Config, load_config
from verifier.core import folders
from verifier.core.backend import Cost
from verifier.core.deadline import Deadline
from verifier.core.interval import Interval
from verifier.core.progress import SilentProgress
from verifier.core.result import Result
from verifier.frontend.network import from_module, load_network
from verifier.graph.graph import Graph
from verifier.parallel.backends import WholeNetwork
from verifier.parallel.launch import LocalRanks, join_leader
from verifier.parallel.processes import ProcessGroup
from verifier.parallel.world import World
from verifier.solver.pipeline import solve
from verifier.solver.ranks import rank_loop
from verifier.solver.setup import set_up

Task = Callable[[World], Any]

# Every network with its box radius and the methods that bits are compared for.
NETWORKS: dict[str, tuple[float, tuple[Method, ...]]] = {
    "784-256x4-10": (0.06, ("ibp", "crown", "alpha-crown")),
    "784-1024x4-10": (0.01, ("crown",)),
    "784-9000x2-10": (0.01, ("crown",)),  # sums that are taken in blocks
    "conv3": (0.02, ("ibp", "crown", "alpha-crown")),
    "resnet": (0.01, ("ibp", "crown", "alpha-crown")),
}
MODES: dict[str, dict[str, Any]] = {
    "rows": {"parallel.backend": "single"},
    "fsdp": {"parallel.backend": "fsdp"},
    "fsdp replicated": {"parallel.backend": "fsdp", "parallel.rows": "replicated"},
    "fsdp without prefetch": {"parallel.backend": "fsdp", "parallel.prefetch": False},
    **{
        name: {"parallel.backend": name}
        for name, found in folders.BACKENDS.items()
        if isinstance(found, WholeNetwork) and name not in ("single", "fsdp")
    },
}


def load(name: str) -> Graph:
    """One of the networks, weights seeded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        if name == "conv3":
            save_conv3(path, channels=8, size=12)
        elif name == "resnet":
            torch.manual_seed(0)
            save_resnet(ResNet(width=8, size=8), path)
        else:
            width, depth = (int(n) for n in name.split("-")[1].split("x"))
            save_mlp(path, (784, *[width] * (depth - 1), 10))
        return load_network(path).graph


def bounds(
    graph: Graph, world: World | None, config: Config, method: Method, radius: float
) -> tuple[NetworkBounds, int]:
    """Bounds of one box around a seeded point, every pre-activation included, and of how many nodes this rank had rows,
    but not all of them."""
    setup = set_up(graph, config, world)
    n = graph.nodes[0].size
    centre = torch.rand(n, generator=torch.Generator().manual_seed(1))
    schedule = Schedule(3)
    dealt = 0
    deal = setup.backend.row_chunks

    def counting(n_rows: int, row: Cost, *rule: int) -> Any:
        nonlocal dealt
        chunks = deal(n_rows, row, *rule)
        dealt += 0 < sum(c.stop - c.start for c in chunks) < n_rows
        return chunks

    setup.backend.row_chunks = counting  # type: ignore[method-assign]
    # Certified values take the same way in float64; one network shows that and saves the time of the others.
    wanted = Wanted(method, True, schedule, schedule, certified=n == 784 and method != "crown")
    found = compute_graph_bounds(Engine(setup.graph, setup.backend), Interval(centre - radius, centre + radius), wanted)
    return found, dealt


def fingerprint(found: NetworkBounds) -> str:
    """A hash of all bits: plain and certified bounds, and slopes."""
    digest = hashlib.sha256()
    for values in (found.plain, found.certified):
        for name, interval in values.items():
            digest.update(name.encode())
            digest.update(interval.lower.numpy().tobytes() + interval.upper.numpy().tobytes())
    for name, slopes in found.slopes.items():
        digest.update(name.encode() + slopes.numpy().tobytes())
    return digest.hexdigest()


def modes(name: str, method: Method, ranks: int) -> Iterable[str]:
    """All of them where they are quick, and otherwise the one that has everything.

    With slopes those that share only weights run on two ranks: the number of ranks matters there as it does to CROWN.
    """
    if method == "ibp" or (name == "784-256x4-10" and (method == "crown" or ranks == 2)):
        return MODES
    return ("rows", "fsdp") if name == "784-256x4-10" else ("fsdp",)


def cases(ranks: int) -> Iterator[tuple[str, Method, str]]:
    """Network, method and mode of every comparison."""
    for name, (_, methods) in NETWORKS.items():
        for method in methods:
            for mode in modes(name, method, ranks):
                yield name, method, mode
        if name in ("784-256x4-10", "784-9000x2-10"):
            yield name, "crown", "streamed"


def bits(world: World) -> dict[str, Any]:
    """Every case on all ranks; rank 0 also runs it alone."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {}
    graphs: dict[str, Graph] = {}
    alone: dict[tuple[str, str, bool, bool], str] = {}
    for name, method, mode in cases(world.size):
        if name not in graphs:
            graphs = {name: load(name)}
        graph = graphs[name]
        # Some 160 rows in a chunk: by default CROWN has one chunk for networks as small as these.
        widest = max(n.size for n in graph.nodes)
        fine = method == "crown" and mode in ("rows", "fsdp") and widest < 4096
        chunks = {"memory.chunk_bytes": 2560 * widest} if fine else {}
        settings = MODES.get(mode, {"parallel.backend": "fsdp", "parallel.stream": 300_000}) | chunks
        radius = NETWORKS[name][0]
        found, dealt = bounds(graph, world, load_config(values=settings), method, radius)
        every = world.everyone.objects(fingerprint(found))
        if world.rank == 0:
            stream = settings.get("parallel.stream")
            key = (name, method, stream is not None, fine)
            if key not in alone:
                single = load_config(values=chunks | ({} if stream is None else {"parallel.stream": stream}))
                alone[key] = fingerprint(bounds(graph, None, single, method, radius)[0])
            widths = [(i.upper - i.lower).double() for i in found.plain.values()]
            unstable = sum(int(((i.lower < 0) & (i.upper > 0)).sum()) for i in found.plain.values())
            out[f"{name} {method} {mode}"] = {
                "equal": all(e == alone[key] for e in every),
                "finite": all(bool(torch.isfinite(w).all()) for w in widths),
                "unstable": unstable,
                "dealt": dealt,
                "slopes": len(found.slopes),
            }
    return out


def features(world: World) -> dict[str, Any]:
    """Tensor parallelism in one group of all ranks, and in groups of two that share the rows."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {}
    for name, method in (("784-256x4-10", "crown"), ("conv3", "alpha-crown"), ("resnet", "crown")):
        graph, radius = load(name), NETWORKS[name][0]
        alone = bounds(graph, None, load_config(), method, radius)[0] if world.rank == 0 else None
        for groups in {1, max(1, world.size // 2)}:
            settings = {"parallel.backend": "tp", "parallel.domains": groups}
            found, _ = bounds(graph, world, load_config(values=settings), method, radius)
            every = world.everyone.objects(fingerprint(found))
            if alone is None:
                continue
            errors = [0.0]
            for key, want in alone.plain.items():
                reference, got = torch.stack(want), torch.stack(found.plain[key])
                errors.append(float((got - reference).abs().max() / max(1.0, float(reference.abs().max()))))
            unstable = sum(int(((i.lower < 0) & (i.upper > 0)).sum()) for i in alone.plain.values())
            case = {"equal": len(set(every)) == 1, "error": max(errors), "unstable": unstable}
            out[f"{name} {method} in {groups} groups"] = case
    return out


def talk(world: World) -> dict[str, Any]:
    """Every kind of message, with sizes that differ and tensors that are empty."""
    group, rank, size = world.everyone, world.rank, world.size
    for round_ in range(50):
        assert group.numbers([rank, round_]) == [[r, round_] for r in range(size)]
        assert group.objects({"rank": rank, "data": "x" * rank * 1000}) == [
            {"rank": r, "data": "x" * r * 1000} for r in range(size)
        ]
        for source in range(size):
            assert group.broadcast_object(("from", source) if rank == source else None, source) == ("from", source)
        for dtype in (torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8):
            mine = torch.full((3, 2), rank, dtype=dtype)
            assert torch.equal(group.all_gather(mine)[:, 0, 0], torch.arange(size).to(dtype))
        assert group.all_gather(torch.zeros(0, 4)).shape == (size, 0, 4)
        swapped = group.all_to_all(torch.arange(size, dtype=torch.float32)[:, None] + 10 * rank)
        assert swapped[:, 0].tolist() == [10 * r + rank for r in range(size)]
        assert not group.called()
        group.numbers([0.0])
        if rank == round_ % size:
            group.call()
        group.numbers([0.0])

        time.sleep(0.006)
        assert group.called()
        group.numbers([0.0])
        group.answered()
    return {"size": size}


def odd(world: World) -> dict[str, Any]:
    """Tensors of every rank, stride and size on all ranks; queries with every backend and setting of several ranks."""
    torch.set_num_threads(1)
    group, spread = world.everyone, 0
    assert isinstance(group, ProcessGroup)
    for name, tensor in TENSORS.items():
        for source in range(world.size):
            # What receives has strides of its own, too, as long as nothing in it is shared.
            mine = tensor if world.rank == source else torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            assert torch.equal(group.broadcast(mine, source), tensor), name
        if tensor.dim() == 2:
            mine = tensor if world.rank == 0 else torch.zeros(tensor.t().shape, dtype=tensor.dtype).t()
            assert torch.equal(group.broadcast(mine), tensor), name
        spread += 1
    verdicts: dict[str, tuple[str, str]] = {}
    for name, (module, shape) in oddities.NETWORKS.items():
        settings = list(SETTINGS)
        for backend, shift in product(("single", "fsdp", "tp"), range(2)):
            # Two settings per network and backend; over all networks every pair of both occurs.
            setting = settings[(2 * len(verdicts) // 6 + 3 * shift + len(verdicts)) % len(settings)]
            if backend == "tp" and "offload" in setting:
                setting = "streamed"
            way = WAYS["inputs" if len(verdicts) % 2 else "neurons"]
            config = load_config(values={**SETTINGS[setting], **way, "parallel.backend": backend, "device": "cpu"})
            if world.rank == 0:
                network = from_module(module, torch.zeros(shape))
                found = solve(network, problem(module, shape), config, Deadline(60), SilentProgress(), world)
                verdicts[f"{name}, {backend}, {setting}"] = (found.verdict.value, found.reason)
            else:
                rank_loop(world, Result)
                verdicts[name + backend + setting] = ("", "")
    return {"spread": spread, "verdicts": verdicts}


TASKS: dict[str, Task] = {"bits": bits, "features": features, "talk": talk, "odd": odd}


def main(arguments: list[str]) -> int:
    if arguments[0] == "lead":
        _, task, size = arguments
        ranks = LocalRanks(int(size), ["-m", "tests.parallel.job", "follow", task], None, 1)
        world = ranks.lead(torch.device("cpu"))
        try:
            print(json.dumps(TASKS[task](world)))
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            world.close()
        return 0
    _, task, address, rank, size, _ = arguments
    world = join_leader(address, int(rank), int(size), "cpu")
    try:
        TASKS[task](world)
    except Exception as error:
        world.heartbeat.report(f"{type(error).__name__}: {error}")
        raise
    time.sleep(60)  # rank 0 ends this process
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
