"""The resident worker as its clients see it: starting one, and handing a query to it.

The resident worker (:mod:`verifier.cli.resident_server`) keeps one process ready that has imported everything and
touched the device. A query that gets it saves that time; everything else stays as it is: the caller holds the clock,
reads the pipe and writes all results. When anything is unusual the caller gets nothing and forks a worker as always.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from verifier.cli.resident_link import (
    Unavailable,
    circumstances,
    command,
    identity,
    open_folder,
    pack,
    peer_is_us,
    receive,
    send,
    socket_path,
)
from verifier.cli.worker import Job, Worker

PATIENCE_SECONDS = 0.3  # for an answer, before a query goes its own way
_REPLY_SECONDS = 2.0  # for an answer, when nothing hurries
_BIND_SECONDS = 10.0  # for a new resident worker to listen


def connect(folder: Path, seconds: float) -> socket.socket | None:
    """A connection whose operations take at most so many seconds; ``None`` when nobody listens.

    Raises:
        Unavailable: the folder or who listens in it is not ours.
        OSError: it does not answer.
    """
    try:
        opened = open_folder(folder, create=False)
    except FileNotFoundError:
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(seconds)
        connection.connect(socket_path(opened))
        if not peer_is_us(connection):
            raise Unavailable(f"the resident worker in {folder} belongs to another user")
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(opened)
    return connection


@dataclass
class Hired:
    """The resident's process that works on our query.

    Attributes:
        connection: to the resident, which kills the process when we close it and else tells how it ended.
        leash: our end of a pipe; when the last copy is closed, the kernel kills the process and its group.
    """

    connection: socket.socket
    leash: int
    _status: int | None = None

    def kill(self) -> None:
        if self.leash >= 0:
            os.close(self.leash)
            self.leash = -1
            self.connection.close()

    def reap(self, seconds: float) -> int | None:
        if self._status is None and self.leash >= 0:
            with contextlib.suppress(OSError, ValueError):
                self.connection.settimeout(seconds)
                self._status = (receive(self.connection)[0] or {}).get("ended")
        return self._status


def hire(job: Job, folder: Path, patience: float = PATIENCE_SECONDS) -> Worker | None:
    """Hand the query to the resident worker; ``None`` when there is none.

    Args:
        patience: seconds to wait for its answer; a tenth of the time limit when that is less.

    Raises:
        Unavailable: there is one, but it does not fit, is busy, or does not answer in time.
    """
    if not job.quiet:  # what libraries print would not reach the caller
        return None
    patience = patience if job.timeout is None else min(patience, job.timeout / 10)
    until = time.monotonic() + patience
    with ExitStack() as stack:
        try:
            connection = connect(folder, patience)
            if connection is None:
                return None
            stack.callback(connection.close)
            answers, theirs = _pipe(stack)
            their_leash, leash = _pipe(stack)
            here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(_close, here)
            request = _request("query", job=pack(job), environ=dict(os.environ))
            send(connection, request, (theirs, their_leash, here))
            answer = _answer(connection, until)
        except (OSError, ValueError, TypeError) as error:
            raise Unavailable(f"no contact: {type(error).__name__}: {error}") from error
        if "accepted" not in answer:
            raise Unavailable(str(answer.get("refused", "it gave no answer")))
        stack.pop_all()
    for descriptor in (theirs, their_leash, here):
        os.close(descriptor)
    os.set_blocking(answers, False)
    return Worker(job, Hired(connection, leash), answers)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """Read and write end, closed with the stack."""
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def start_worker(job: Job, folder: Path | None, patience: float = PATIENCE_SECONDS) -> Worker:
    """A worker from the resident of this folder, else one of our own; why it was not the resident goes to stderr."""
    if folder is not None:
        try:
            worker = hire(job, folder, patience)
        except Unavailable as why:
            click.echo(f"note: not using the resident worker: {why}", err=True)
        else:
            if worker is not None:
                return worker
    return Worker.start(job)


def _request(want: str, **more: Any) -> dict[str, Any]:
    return {"want": want, "identity": identity(), "circumstances": circumstances(), **more}


def _answer(connection: socket.socket, until: float) -> dict[str, Any]:
    """The next message, if it comes in time; empty when the other end was closed instead."""
    patience = max(0.0, until - time.monotonic())
    if not select.select([connection], [], [], patience)[0]:
        raise TimeoutError(f"no answer in {patience:.1f} s")
    return receive(connection)[0] or {}


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def make_ready(folder: Path, idle: float, seconds: float) -> str:
    """Find the resident worker of this folder or start one, and wait until it can take a query.

    Args:
        idle: the new one ends after so many seconds without work.
        seconds: to wait at most.

    Returns:
        ``ready``, or ``busy`` when it works for somebody else.

    Raises:
        Unavailable: it cannot be made ready.
    """
    until = time.monotonic() + seconds
    started: float | None = None
    try:
        os.close(open_folder(folder, create=True))
        while time.monotonic() < until:
            connection = connect(folder, _REPLY_SECONDS)
            if connection is None:
                if started is None:
                    start_resident(folder, idle)
                    started = time.monotonic()
                elif time.monotonic() > started + _BIND_SECONDS:
                    raise Unavailable("it was started but does not listen")
                time.sleep(0.02)
                continue
            with connection:
                send(connection, _request("ready"))
                answer = _answer(connection, time.monotonic() + _REPLY_SECONDS)
                if "warming" in answer:
                    answer = _answer(connection, until)
            if "failed" in answer:
                raise Unavailable(f"its warm-up failed: {answer['failed']}")
            if "retired" in answer:
                started = None
            for word in ("ready", "busy"):
                if word in answer:
                    return word
    except (OSError, ValueError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    raise Unavailable(f"not ready after {seconds:g} s")


def start_resident(folder: Path, idle: float) -> None:
    """Start the resident worker as a process of its own: own session, no streams and no descriptors of ours."""
    arguments = ["vnncomp", "resident", "--resident-folder", str(folder.absolute()), "--idle", str(idle)]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [*command(), *arguments], stdin=null, stdout=null, stderr=null, start_new_session=True, close_fds=True
    )
    process.returncode = 0  # nobody waits for it, and subprocess need not warn of that


def stop_resident(folder: Path) -> None:
    """Ask the resident worker of this folder to leave, and wait until nobody listens any more."""
    connection = connect(folder, _REPLY_SECONDS)
    if connection is not None:
        with connection:
            send(connection, {"want": "end"})
            with contextlib.suppress(OSError, ValueError):
                _answer(connection, time.monotonic() + _REPLY_SECONDS)
