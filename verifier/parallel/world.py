"""The processes of one job: started here, or by torchrun on one node or many.

Rank 0 leads. It runs the query and tells the others which phases to take part in; the others have no files, no clock
and no output of their own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import torch

import verifier
from verifier.core.backend import Group
from verifier.core.errors import ConfigError, RankFailed
from verifier.parallel.group import Solo

# Ranks wait for each other as long as the job lasts; the monitor knows whether someone is lost.
_PATIENCE = timedelta(days=7)
# Rank 0 joins when it has read its files.
_JOIN_PATIENCE = timedelta(seconds=900)
_EXPLAIN_SECONDS = 5.0


class Heart(Protocol):
    """What the engine says about itself; see :class:`verifier.parallel.monitor.Monitor`."""

    @property
    def failure(self) -> str | None: ...

    @property
    def memory(self) -> bool: ...

    def phase(self, name: str) -> None: ...

    def announced(self, seconds: float) -> AbstractContextManager[None]: ...

    def report(self, kind: str, message: str) -> None: ...

    def stop(self) -> None: ...


class _Heartless:
    """One rank: nobody listens."""

    failure: str | None = None
    memory = False

    def phase(self, name: str) -> None:
        pass

    @contextmanager
    def announced(self, seconds: float) -> Iterator[None]:
        yield

    def report(self, kind: str, message: str) -> None:
        pass

    def stop(self) -> None:
        pass


@dataclass
class World:
    """All ranks of a job, as one of them sees it.

    Attributes:
        everyone: the group of all ranks.
        device: where this rank computes.
        heart: liveness of the job.
        local_size: ranks on this machine, which share its cores.
        witness: a counterexample that was replayed; it stands whatever happens to the job.
        subgroup: makes a group of some ranks (a collective call of all ranks, which give all groups in one order).
    """

    everyone: Group
    device: torch.device
    heart: Heart
    subgroup: Callable[[Sequence[Sequence[int]]], Group]
    local_size: int = 1
    witness: Any = None
    _closing: list[Callable[[], None]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.everyone.rank

    @property
    def size(self) -> int:
        return self.everyone.size

    def failed(self) -> RankFailed | None:
        """The error that a broken collective call stands for: which rank was lost, once that is known."""
        until = time.monotonic() + (_EXPLAIN_SECONDS if self.size > 1 else 0.0)
        while self.heart.failure is None and time.monotonic() < until:
            time.sleep(0.05)
        return RankFailed(self.heart.failure) if self.heart.failure is not None else None

    def close(self) -> None:
        """End the other ranks and leave the job; nothing here may fail or wait for long."""
        self.heart.stop()
        for step in self._closing:
            with contextlib.suppress(Exception):
                step()


def solo(device: torch.device) -> World:
    """A job of one rank."""
    group = Solo()
    return World(group, device, _Heartless(), lambda groups: group)


# ---------------------------------------------------------------------------------------------------------- joining


@dataclass(frozen=True)
class Place:
    """Where a rank is in its job.

    Attributes:
        local_rank, local_size: among the ranks of this machine.
        address: host and port of the store.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: tuple[str, int]


def under_torchrun() -> Place | None:
    """The place that torchrun (or anything that sets the same variables) gives this process."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return None
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, count = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK and WORLD_SIZE are set but {error} is missing or not a number; start with torchrun, or unset them"
        ) from None
    return Place(rank, size, local, count, address) if size > 1 else None


def rank_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank on its machine; ranks share GPUs in turn when there are more ranks.

    Args:
        name: ``device`` of the configuration.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no CUDA device; use 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def join(
    place: Place,
    device: torch.device,
    children: dict[int, subprocess.Popen[bytes]] | None = None,
    log: Callable[[int], str] | None = None,
    fatal: Callable[[str], None] | None = None,
    listening: socket.socket | None = None,
) -> World:
    """Become a rank of a job.

    Args:
        children: processes of ranks that this process started.
        fatal: what the monitor does when a rank is lost and the main thread does not notice.
        listening: a bound socket for the store, when this process is to host it.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from verifier.parallel.monitor import Monitor
    from verifier.parallel.processes import ProcessGroup

    if dist.is_initialized():
        raise ConfigError("torch.distributed is already in use in this process; start the verifier in one of its own")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, beats = _stores(place, listening)
    monitor = Monitor(
        place.rank,
        PrefixStore("monitor", beats),
        children or {},
        log or (lambda rank: ""),
        [r for r in range(place.size) if r != place.rank] if place.rank == 0 else [0],
        fatal,
    )
    monitor.start()
    own_gpus = device.type == "cuda" and place.local_size <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if own_gpus else "gloo"

    def watch() -> None:
        if monitor.failure is not None:
            raise RankFailed(monitor.failure)

    _assemble(place, PrefixStore("assembly", store), watch)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        timeout=_PATIENCE,
        device_id=device if own_gpus else None,
    )
    made = 0

    def subgroup(groups: Sequence[Sequence[int]]) -> Group:
        nonlocal made
        mine: Group | None = None
        for members in groups:
            made += 1
            data: Any = dist.new_group(list(members), timeout=_PATIENCE, backend=backend)
            control: Any = dist.new_group(list(members), timeout=_PATIENCE, backend="gloo")
            if place.rank in members:
                prefix = PrefixStore(f"calls/{made}", store)
                mine = Solo() if len(members) == 1 else ProcessGroup(members, data, control, prefix, watch)
        assert mine is not None
        return mine

    everyone = subgroup([range(place.size)])
    world = World(everyone, device, monitor, subgroup, place.local_size)
    world._closing.append(monitor.dismiss)
    if children:
        world._closing.append(lambda: _end(children))
    world._closing.append(dist.destroy_process_group)
    _same_versions(world)
    return world


def _assemble(place: Place, store: Any, watch: Callable[[], None]) -> None:
    """Wait until every rank is here; unlike a collective call this notices one that never comes."""
    store.set(f"here/{place.rank}", "")
    until = time.monotonic() + _JOIN_PATIENCE.total_seconds()
    missing = list(range(place.size))
    while missing:
        watch()
        missing = [r for r in missing if not store.check([f"here/{r}"])]
        if missing and time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise RankFailed(f"rank {names} did not join within {_JOIN_PATIENCE.total_seconds():.0f} s")
        time.sleep(0.02 if missing else 0.0)


def _stores(place: Place, listening: socket.socket | None) -> tuple[Any, Any]:
    """The job's key-value store, by two connections: waits on the one do not hold up beats on the other."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = place.address
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and (listening is not None or not agent)
    options: dict[str, Any] = {"timeout": _JOIN_PATIENCE, "wait_for_workers": False}
    if listening is not None:
        options |= {"master_listen_fd": listening.detach(), "use_libuv": False}
    first = TCPStore(host, port, None, hosts, **options)
    options = {"timeout": _JOIN_PATIENCE, "wait_for_workers": False}
    return first, TCPStore(host, port, None, False, **options)


def _same_versions(world: World) -> None:
    """Bits and protocols are promised among equal versions only."""
    mine = {"verifier": verifier.__version__, "torch": torch.__version__, "Python": platform.python_version()}
    for rank, other in enumerate(world.everyone.objects(mine)):
        for name, version in mine.items():
            if name != "Python" and other[name] != version:
                raise ConfigError(
                    f"rank {rank} runs {name} {other[name]} but rank {world.rank} runs {version}; "
                    "install the same version on every machine"
                )


# --------------------------------------------------------------------------------------------------------- starting


class LocalRanks:
    """Ranks 1 to P - 1, started on this machine; the caller becomes rank 0.

    Args:
        arguments: what Python is started with for a rank; the store's address, the rank, their number and the process
            id of rank 0 follow.
        logs: folder for one log per rank; ``None`` keeps only what a failing rank said last.
        threads: CPU threads of a rank.
    """

    def __init__(self, size: int, arguments: Sequence[str], logs: str | None, threads: int) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(2 * size)
        self.address = ("127.0.0.1", int(self._socket.getsockname()[1]))
        self._size = size
        self._files: dict[int, IO[bytes]] = {}
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        environment = _environment(threads)
        try:
            for rank in range(1, size):
                self._files[rank] = _log_file(logs, rank)
                where = f"{self.address[0]}:{self.address[1]}"
                command = [sys.executable, *arguments, where, str(rank), str(size), str(os.getpid())]
                self._children[rank] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._files[rank],
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot start {size} ranks: {error.strerror or error}") from None

    def lead(self, device: torch.device, fatal: Callable[[str], None] | None = None) -> World:
        """Join them as rank 0."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        place = Place(0, self._size, 0, self._size, self.address)
        try:
            return join(place, device, self._children, self._said, fatal, self._socket)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End them without having joined."""
        self._socket.close()
        _end(self._children)

    def _said(self, rank: int) -> str:
        file = self._files[rank]
        with contextlib.suppress(OSError, ValueError):
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            return file.read().decode(errors="replace")
        return ""


def _environment(threads: int) -> dict[str, str]:
    """A rank imports the same package and talks over the loopback device."""
    environment = dict(os.environ)
    package = str(Path(verifier.__file__).resolve().parent.parent)
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package if not path else f"{package}{os.pathsep}{path}"
    environment["OMP_NUM_THREADS"] = str(threads)
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _log_file(logs: str | None, rank: int) -> IO[bytes]:
    if logs is None:
        return tempfile.TemporaryFile()
    Path(logs).mkdir(parents=True, exist_ok=True)
    return open(Path(logs) / f"rank-{rank}.log", "w+b")


def _end(children: dict[int, subprocess.Popen[bytes]]) -> None:
    """Ranks hold nothing that is worth waiting for."""
    for process in children.values():
        with contextlib.suppress(OSError):
            process.kill()
    for process in children.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)


def follow_leader(address: str, rank: int, size: int, device: str) -> World:
    """What a started rank does first; it dies with the process that started it.

    Args:
        address: ``host:port`` of the store.
        device: ``device`` of the configuration.
    """
    from verifier.parallel.monitor import leave

    host, _, port = address.rpartition(":")
    place = Place(rank, size, rank, size, (host, int(port)))
    return join(place, rank_device(device, rank), fatal=lambda message: leave(1))
