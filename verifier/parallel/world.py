"""The ranks of one job, started here (:mod:`verifier.parallel.launch`) or by torchrun on one node or many.

Rank 0 leads. It runs the query and tells the others which phases to take part in; the others have no files, no clock
and no output of their own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

import verifier
from verifier.core import folders
from verifier.core.backend import Group
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError, RankFailed, VerifierError
from verifier.core.memory import out_of_memory
from verifier.core.plugins import HEURISTICS, OPS, installed_versions
from verifier.core.result import Witness
from verifier.parallel.group import Solo
from verifier.parallel.heartbeat import Heartbeat, HeartbeatMonitor, NoHeartbeat
from verifier.parallel.names import local_names

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Ranks wait for each other as long as the job lasts; the monitor knows whether someone is lost.
_PATIENCE = timedelta(days=7)
# Rank 0 joins when it has read its files.
_JOIN_PATIENCE = timedelta(seconds=900)
_EXPLAIN_SECONDS = 5.0
_INTERFACE = "GLOO_SOCKET_IFNAME"
INTERFACES = (_INTERFACE, "NCCL_SOCKET_IFNAME")
# torch.distributed has one default group per process.
_in_use = threading.Lock()


@dataclass
class World:
    """All ranks of a job, as one of them sees it.

    Attributes:
        everyone: the group of all ranks.
        device: where this rank computes.
        heartbeat: liveness of the job.
        local_size: ranks on this machine, which share its cores.
        witness: a counterexample that was replayed; it stands whatever happens to the job.
        subgroup: makes a group of some ranks (a collective call of all ranks, which give all groups in one order).
    """

    everyone: Group
    device: torch.device
    heartbeat: Heartbeat
    subgroup: Callable[[Sequence[Sequence[int]]], Group]
    local_size: int = 1
    witness: Witness | None = None
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
            while self.heartbeat.failure is None and time.monotonic() < until:
                time.sleep(0.05)
            if self.heartbeat.failure is None:
                raise
            raise RankFailed(self.heartbeat.failure) from error

    def close(self) -> None:
        """End the other ranks and leave the job; nothing here may fail or wait for long."""
        self.heartbeat.stop()
        while self._closing:
            with contextlib.suppress(Exception):
                self._closing.pop(0)()


def solo(device: torch.device) -> World:
    """A job of one rank."""
    group = Solo()
    return World(group, device, NoHeartbeat(), lambda groups: group)


# ---------------------------------------------------------------------------------------------------------- joining


@dataclass(frozen=True)
class LaunchedRanks:
    """The ranks that this process started.

    Attributes:
        processes: by rank.
        log: the end of what such a process printed.
        listening: a bound socket for the store, when this process is to host it.
    """

    processes: Mapping[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    log: Callable[[int], str] = lambda rank: ""
    listening: socket.socket | None = None

    def end(self) -> None:
        """Kill them: ranks hold nothing that is worth waiting for."""
        for process in self.processes.values():
            with contextlib.suppress(OSError):
                process.kill()
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2.0)


@dataclass(frozen=True)
class Rendezvous:
    """Which rank a process is, and where it meets the others.

    Attributes:
        local_rank, local_size: among the ranks of this machine.
        address: host and port of the store.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: tuple[str, int]


def under_torchrun() -> Rendezvous | None:
    """What torchrun (or anything that sets the same variables) says of this process; None for a job of one.

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
    return Rendezvous(rank, size, local, count, (os.environ["MASTER_ADDR"], port))


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
    rendezvous: Rendezvous,
    device: torch.device,
    launched: LaunchedRanks | None = None,
    fatal: Callable[[str], None] | None = None,
    deadline: Deadline | None = None,
) -> World:
    """Become a rank of a job.

    Args:
        launched: the ranks that this process started.
        fatal: what the monitor does when a rank is lost and the main thread does not notice.
        deadline: until which to wait for the others.

    Raises:
        ConfigError: this process or machine cannot take part.
        RankFailed: another rank is lost or out of reach.
        DeadlineExceeded: the others did not come in time.
    """
    import torch.distributed as dist

    check_interface()
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
        world = _join(rendezvous, device, launched or LaunchedRanks(), fatal, deadline or Deadline())
    except BaseException:
        _in_use.release()
        raise
    world._closing.append(_in_use.release)
    return world


def _join(
    rendezvous: Rendezvous,
    device: torch.device,
    launched: LaunchedRanks,
    fatal: Callable[[str], None] | None,
    deadline: Deadline,
) -> World:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with local_names(rendezvous.address[0]):
            store, heartbeats = _stores(rendezvous, launched.listening)
    except dist.DistError as error:
        host, port = rendezvous.address
        first = str(error).splitlines()[0]
        raise RankFailed(
            f"rank {rendezvous.rank} has no contact with the store of the job, {host}:{port}: {first}"
        ) from None
    monitor = HeartbeatMonitor(
        rendezvous.rank,
        PrefixStore("monitor", heartbeats),
        launched.processes,
        launched.log,
        list(range(1, rendezvous.size)) if rendezvous.rank == 0 else [0],
        fatal,
    )
    monitor.start()
    try:
        world = _make_world(rendezvous, device, store, monitor, deadline)
    except BaseException:
        monitor.stop()
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        raise
    world._closing += [monitor.end_job, launched.end, dist.destroy_process_group]
    return world


def _make_world(
    rendezvous: Rendezvous, device: torch.device, store: Store, heartbeat: Heartbeat, deadline: Deadline
) -> World:
    """Wait for all ranks and make the group of all of them."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from verifier.parallel.processes import ProcessGroup

    own_gpus = device.type == "cuda" and rendezvous.local_size <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if own_gpus else "gloo"

    def watch() -> None:
        if heartbeat.failure is not None:
            raise RankFailed(heartbeat.failure)

    _assemble(rendezvous, PrefixStore("assembly", store), watch, deadline)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rendezvous.rank,
        world_size=rendezvous.size,
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
            if rendezvous.rank in members:
                prefix = PrefixStore(f"calls/{made}", store)
                mine = Solo() if len(members) == 1 else ProcessGroup(members, data, control, prefix, watch)
        assert mine is not None
        return mine

    everyone = subgroup([range(rendezvous.size)])
    world = World(everyone, device, heartbeat, subgroup, rendezvous.local_size)
    _same_versions(world)
    return world


def check_interface() -> None:
    """Gloo says little when there is no network interface of the name that it is given."""
    given = os.environ.get(_INTERFACE)
    known = [name for _, name in socket.if_nameindex()]
    for name in (given or "").split(","):
        if name and name.partition(":")[0] not in known:
            raise ConfigError(
                f"{_INTERFACE} is '{given}' but this machine's network interfaces are {', '.join(known)}; correct or "
                "unset it"
            )


def _assemble(rendezvous: Rendezvous, store: Store, watch: Callable[[], None], deadline: Deadline) -> None:
    """Wait until every rank is here; unlike a collective call this notices one that never comes."""
    store.set(f"here/{rendezvous.rank}", "")
    until = time.monotonic() + _JOIN_PATIENCE.total_seconds()
    missing = list(range(rendezvous.size))
    while missing:
        watch()
        deadline.check("the start of the ranks")
        missing = [r for r in missing if not store.check([f"here/{r}"])]
        if missing and time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise RankFailed(f"rank {names} did not join within {_JOIN_PATIENCE.total_seconds():.0f} s")
        time.sleep(0.02 if missing else 0.0)


def _stores(rendezvous: Rendezvous, listening: socket.socket | None) -> tuple[Store, Store]:
    """The job's key-value store, by two connections: waits on the one do not hold up heartbeats on the other."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = rendezvous.address
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rendezvous.rank == 0 and (listening is not None or not agent)
    options: dict[str, Any] = {"timeout": _JOIN_PATIENCE, "wait_for_workers": False}
    if listening is not None:
        options |= {"master_listen_fd": listening.detach(), "use_libuv": False}
    first = TCPStore(host, port, None, hosts, **options)
    options = {"timeout": _JOIN_PATIENCE, "wait_for_workers": False}
    return first, TCPStore(host, port, None, False, **options)


def _same_versions(world: World) -> None:
    """Bits and protocols are promised among equal versions only; files may have been added to an installation."""
    mine = {"verifier": verifier.__version__, "torch": torch.__version__} | installed_versions((OPS, HEURISTICS))
    mine |= {f"{f.package} of digest": f.digest() for f in (folders.OPS, folders.HEURISTICS, folders.BACKENDS)}
    for rank, other in enumerate(world.everyone.objects(mine)):
        for name, version in mine.items():
            if other.get(name) != version:
                raise ConfigError(
                    f"rank {rank} runs {name} {other.get(name, '(missing)')} but rank {world.rank} runs {version}; "
                    "install the same version on every machine"
                )
