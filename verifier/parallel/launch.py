"""Ranks that this process starts on its machine, and what a rank that was started does first."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch

import verifier
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError
from verifier.parallel.heartbeat import leave
from verifier.parallel.world import INTERFACES, LaunchedRanks, Rendezvous, World, check_interface, join, rank_device


class LocalRanks:
    """Ranks 1 to P - 1, started on this machine; the caller becomes rank 0.

    Args:
        arguments: what Python is started with for a rank; the store's address, the rank, their number and the process
            id of rank 0 follow.
        logs: folder for one log per rank; ``None`` keeps only what a failing rank said last.
        threads: CPU threads of a rank.
    """

    def __init__(self, size: int, arguments: Sequence[str], logs: str | None, threads: int) -> None:
        check_interface()
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
        rendezvous = Rendezvous(0, self._size, 0, self._size, self.address)
        launched = LaunchedRanks(self._children, self._said, self._socket)
        try:
            world = join(rendezvous, device, launched, fatal, deadline)
        except BaseException:
            self.close()
            _remove(added)
            raise
        world._closing.append(lambda: _remove(added))
        return world

    def close(self) -> None:
        """End them without having joined."""
        self._socket.close()
        LaunchedRanks(self._children).end()

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
    return {name: os.environ.get(name, "lo") for name in INTERFACES} if "lo" in known else {}


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


def join_leader(address: str, rank: int, size: int, device: str) -> World:
    """What a started rank does first; it dies with the process that started it.

    Args:
        address: ``host:port`` of the store.
        device: ``device`` of the configuration.
    """
    host, _, port = address.rpartition(":")
    rendezvous = Rendezvous(rank, size, rank, size, (host, int(port)))
    return join(rendezvous, rank_device(device, rank), fatal=lambda message: leave(1))
