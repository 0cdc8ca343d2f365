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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import torch

import verifier
from verifier.core.backend import Group
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError, RankFailed, VerifierError
from verifier.core.memory import out_of_memory
from verifier.core.plugins import HEURISTICS, OPS, installed_versions
from verifier.parallel.group import Solo
from verifier.parallel.names import local_names

# Ranks wait for each other as long as the job lasts; the monitor knows whether someone is lost.
_PATIENCE = timedelta(days=7)
# Rank 0 joins when it has read its files.
_JOIN_PATIENCE = timedelta(seconds=900)
_EXPLAIN_SECONDS = 5.0
_INTERFACE = "GLOO_SOCKET_IFNAME"
_INTERFACES = (_INTERFACE, "NCCL_SOCKET_IFNAME")
# torch.distributed has one default group per process.
_in_use = threading.Lock()


class Heart(Protocol):
    """What the engine says about itself; see :class:`verifier.parallel.monitor.Monitor`."""

    @property
    def failure(self) -> str | None: ...

    @property
    def memory(self) -> bool: ...

    def phase(self, name: str) -> None: ...

    def report(self, kind: str, message: str) -> None: ...

    def stop(self) -> None: ...


class _Heartless:
    """One rank: nobody listens."""

    failure: str | None = None
    memory = False

    def phase(self, name: str) -> None:
        pass

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

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A broken connection is how this rank learns that another one was lost; raise what it stands for.

        Raises:
            RankFailed: which rank was lost, once that is known.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:
            if self.size == 1 or isinstance(error, VerifierError) or out_of_memory(error):
                raise
            until = time.monotonic() + _EXPLAIN_SECONDS
            while self.heart.failure is None and time.monotonic() < until:
                time.sleep(0.05)
            if self.heart.failure is None:
                raise
            raise RankFailed(self.heart.failure) from error

    def close(self) -> None:
        """End the other ranks and leave the job; nothing here may fail or wait for long."""
        self.heart.stop()
        while self._closing:
            with contextlib.suppress(Exception):
                self._closing.pop(0)()


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
    """The place that torchrun (or anything that sets the same variables) gives this process; None for a job of one.

    Raises:
        ConfigError: a variable is missing or makes no sense.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return None
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        return None
    rank = _variable("RANK", 0, size - 1)
    count = _variable("LOCAL_WORLD_SIZE", 1, size, "1")
    local = _variable("LOCAL_RANK", 0, count - 1, "0")
    port = _variable("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR is not; start with torchrun, or unset them")
    return Place(rank, size, local, count, (os.environ["MASTER_ADDR"], port))


def _variable(name: str, low: int, high: int | None = None, default: str | None = None) -> int:
    """One of torchrun's variables: a number between two others."""
    text = os.environ.get(name, default)
    if text is None:
        raise ConfigError(f"RANK and WORLD_SIZE are set but {name} is not; start with torchrun, or unset them")
    if text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high):
        return int(text)
    between = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise ConfigError(f"{name} is '{text}' but must be a number {between}; start with torchrun, or unset RANK")


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
    deadline: Deadline | None = None,
) -> World:
    """Become a rank of a job.

    Args:
        children: processes of ranks that this process started.
        fatal: what the monitor does when a rank is lost and the main thread does not notice.
        listening: a bound socket for the store, when this process is to host it.
        deadline: until which to wait for the others.

    Raises:
        ConfigError: this process or machine cannot take part.
        RankFailed: another rank is lost or out of reach.
        DeadlineExceeded: the others did not come in time.
    """
    import torch.distributed as dist

    _check_interface()
    if not _in_use.acquire(blocking=False):
        raise ConfigError(
            "this process already answers a query with several ranks; ask one after the other, or each in a process of "
            "its own"
        )
    try:
        if dist.is_initialized():
            raise ConfigError(
                "torch.distributed is already in use in this process; start the verifier in one of its own"
            )
        world = _join(place, device, children or {}, log, fatal, listening, deadline or Deadline())
    except BaseException:
        _in_use.release()
        raise
    world._closing.append(_in_use.release)
    return world


def _join(
    place: Place,
    device: torch.device,
    children: dict[int, subprocess.Popen[bytes]],
    log: Callable[[int], str] | None,
    fatal: Callable[[str], None] | None,
    listening: socket.socket | None,
    deadline: Deadline,
) -> World:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from verifier.parallel.monitor import Monitor

    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with local_names(place.address[0]):
            store, beats = _stores(place, listening)
    except dist.DistError as error:
        host, port = place.address
        first = str(error).splitlines()[0]
        raise RankFailed(
            f"rank {place.rank} has no contact with the store of the job, {host}:{port}: {first}"
        ) from None
    monitor = Monitor(
        place.rank,
        PrefixStore("monitor", beats),
        children,
        log or (lambda rank: ""),
        [r for r in range(place.size) if r != place.rank] if place.rank == 0 else [0],
        fatal,
    )
    monitor.start()
    try:
        world = _meet(place, device, store, monitor, deadline)
    except BaseException:
        monitor.stop()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        raise
    world._closing += [monitor.dismiss, lambda: _end(children), dist.destroy_process_group]
    return world


def _meet(place: Place, device: torch.device, store: Any, heart: Heart, deadline: Deadline) -> World:
    """Wait for all ranks and make the group of all of them."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from verifier.parallel.processes import ProcessGroup

    own_gpus = device.type == "cuda" and place.local_size <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if own_gpus else "gloo"

    def watch() -> None:
        if heart.failure is not None:
            raise RankFailed(heart.failure)

    _assemble(place, PrefixStore("assembly", store), watch, deadline)
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
    world = World(everyone, device, heart, subgroup, place.local_size)
    _same_versions(world)
    return world


def _check_interface() -> None:
    """Gloo says little when there is no network interface of the name that it is given."""
    given = os.environ.get(_INTERFACE)
    known = [name for _, name in socket.if_nameindex()]
    for name in (given or "").split(","):
        if name and name.partition(":")[0] not in known:
            raise ConfigError(
                f"{_INTERFACE} is '{given}' but this machine's network interfaces are {', '.join(known)}; correct or "
                "unset it"
            )


def _assemble(place: Place, store: Any, watch: Callable[[], None], deadline: Deadline) -> None:
    """Wait until every rank is here; unlike a collective call this notices one that never comes."""
    store.set(f"here/{place.rank}", "")
    until = time.monotonic() + _JOIN_PATIENCE.total_seconds()
    missing = list(range(place.size))
    while missing:
        watch()
        deadline.check("the start of the ranks")
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
    mine |= installed_versions((OPS, HEURISTICS))
    for rank, other in enumerate(world.everyone.objects(mine)):
        for name, version in mine.items():
            if name != "Python" and other.get(name) != version:
                raise ConfigError(
                    f"rank {rank} runs {name} {other.get(name, '(missing)')} but rank {world.rank} runs {version}; "
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
        _check_interface()
        self._size = size
        self._files: dict[int, IO[bytes]] = {}
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        environment = _environment(threads)
        self._socket = socket.socket()
        try:
            self._socket.bind(("127.0.0.1", 0))
            self._socket.listen(2 * size)
            self.address = ("127.0.0.1", int(self._socket.getsockname()[1]))
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
            raise ConfigError(f"cannot start {size} ranks: {error.strerror or error}; use fewer") from None
        except BaseException:
            self.close()
            raise

    def lead(
        self,
        device: torch.device,
        fatal: Callable[[str], None] | None = None,
        deadline: Deadline | None = None,
    ) -> World:
        """Join them as rank 0."""
        ours = _loopback()
        added = [name for name in ours if name not in os.environ]
        os.environ.update(ours)
        place = Place(0, self._size, 0, self._size, self.address)
        try:
            world = join(place, device, self._children, self._said, fatal, self._socket, deadline)
        except BaseException:
            self.close()
            _remove(added)
            raise
        world._closing.append(lambda: _remove(added))
        return world

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
    environment = {**os.environ, **_loopback()}
    package = str(Path(verifier.__file__).resolve().parent.parent)
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = package if not path else f"{package}{os.pathsep}{path}"
    environment["OMP_NUM_THREADS"] = str(threads)
    return environment


def _loopback() -> dict[str, str]:
    """What tells gloo and NCCL to use the loopback device, unless the user has chosen one.

    NCCL would otherwise listen where other machines can reach it.
    """
    known = [name for _, name in socket.if_nameindex()]
    return {name: os.environ.get(name, "lo") for name in _INTERFACES} if "lo" in known else {}


def _remove(names: Sequence[str]) -> None:
    for name in names:
        os.environ.pop(name, None)


def _log_file(logs: str | None, rank: int) -> IO[bytes]:
    if logs is None:  # in memory: no folder need be writable
        return open(os.memfd_create(f"rank-{rank}"), "w+b")
    path = Path(logs) / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w+b")
    except OSError as error:
        raise ConfigError(
            f"parallel.logs is {logs} but {path} cannot be written ({error.strerror or error}); give another folder"
        ) from None


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
