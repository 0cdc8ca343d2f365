"""The warm server as its clients see it: starting one, and handing a query to it.

The warm server (:mod:`verifier.runtime.warm_server`) keeps one process ready that has imported everything and touched
the device. A query that gets it saves that time; everything else stays as it is: the caller holds the clock, reads the
pipe and writes all results. When anything is unusual the caller gets nothing and forks a worker as always.
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

from verifier.runtime.handle import WorkerHandle
from verifier.runtime.messages import (
    REPLIES,
    Accepted,
    Answer,
    Busy,
    Ended,
    Failed,
    Prepare,
    Ready,
    Refused,
    Reply,
    Retired,
    Stop,
    WarmingUp,
)
from verifier.runtime.query import Query
from verifier.runtime.warm_link import (
    Unavailable,
    caller,
    command,
    open_folder,
    pack,
    peer_is_us,
    receive,
    send,
    socket_path,
)

PATIENCE_SECONDS = 0.3  # for an answer, before a query goes its own way
_REPLY_SECONDS = 2.0  # for an answer, when nothing hurries
_BIND_SECONDS = 10.0  # for a new server to listen


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
class WarmProcess:
    """The process from the warm server that works on our query.

    Attributes:
        connection: to the server, which kills the process when we close it and else tells how it ended.
        lifetime_pipe: our end of a pipe; when the last copy is closed, the kernel kills the process and its group.
    """

    connection: socket.socket
    lifetime_pipe: int
    _status: int | None = None

    def kill(self) -> None:
        if self.lifetime_pipe >= 0:
            os.close(self.lifetime_pipe)
            self.lifetime_pipe = -1
            self.connection.close()

    def reap(self, seconds: float) -> int | None:
        if self._status is None and self.lifetime_pipe >= 0:
            with contextlib.suppress(OSError, ValueError):
                self.connection.settimeout(seconds)
                ended, _ = receive(self.connection, Ended)
                self._status = None if ended is None else ended.status
        return self._status


def start_warm(query: Query, folder: Path, patience: float = PATIENCE_SECONDS) -> WorkerHandle | None:
    """Hand the query to the warm server; ``None`` when there is none.

    Args:
        patience: seconds to wait for its answer; a tenth of the time limit when that is less.

    Raises:
        Unavailable: there is one, but it does not fit, is busy, or does not answer in time.
    """
    if not query.quiet:  # what libraries print would not reach the caller
        return None
    patience = patience if query.timeout is None else min(patience, query.timeout / 10)
    until = time.monotonic() + patience
    with ExitStack() as stack:
        try:
            connection = connect(folder, patience)
            if connection is None:
                return None
            stack.callback(connection.close)
            messages, its_messages = _pipe(stack)
            its_lifetime_pipe, lifetime_pipe = _pipe(stack)
            here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(_close, here)
            request = Answer(caller(), pack(query), dict(os.environ))
            send(connection, request, (its_messages, its_lifetime_pipe, here))
            reply = _reply(connection, until)
        except (OSError, ValueError, TypeError) as error:
            raise Unavailable(f"no contact: {type(error).__name__}: {error}") from error
        if not isinstance(reply, Accepted):
            raise Unavailable(reply.why if isinstance(reply, Refused) else "it gave no answer")
        stack.pop_all()
    for descriptor in (its_messages, its_lifetime_pipe, here):
        os.close(descriptor)
    os.set_blocking(messages, False)
    return WorkerHandle(query, WarmProcess(connection, lifetime_pipe), messages)


def _pipe(stack: ExitStack) -> tuple[int, int]:
    """Read and write end, closed with the stack."""
    ends = os.pipe()
    for end in ends:
        stack.callback(_close, end)
    return ends


def _reply(connection: socket.socket, until: float) -> Reply | None:
    """The next message, if it comes in time; ``None`` when the other end was closed instead."""
    patience = max(0.0, until - time.monotonic())
    if not select.select([connection], [], [], patience)[0]:
        raise TimeoutError(f"no answer in {patience:.1f} s")
    return receive(connection, *REPLIES)[0]


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def make_ready(folder: Path, idle: float, seconds: float) -> Ready | Busy:
    """Find the warm server of this folder or start one, and wait until it can take a query, or works for somebody else.

    Args:
        idle: the new one ends after so many seconds without work.
        seconds: to wait at most.

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
                    start_server(folder, idle)
                    started = time.monotonic()
                elif time.monotonic() > started + _BIND_SECONDS:
                    raise Unavailable("it was started but does not listen")
                time.sleep(0.02)
                continue
            with connection:
                reply = _ask_ready(connection, until)
            match reply:
                case Ready() | Busy():
                    return reply
                case Failed(why):
                    raise Unavailable(f"its warm-up failed: {why}")
                case Retired():
                    started = None
    except (OSError, ValueError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error
    raise Unavailable(f"not ready after {seconds:g} s")


def _ask_ready(connection: socket.socket, until: float) -> Reply | None:
    """What it says to a call of prepare, once its warm-up is over."""
    send(connection, Prepare(caller()))
    reply = _reply(connection, time.monotonic() + _REPLY_SECONDS)
    return _reply(connection, until) if isinstance(reply, WarmingUp) else reply


def start_server(folder: Path, idle: float) -> None:
    """Start the warm server as a process of its own: own session, no streams and no descriptors of ours."""
    arguments = ["vnncomp", "resident", "--resident-folder", str(folder.absolute()), "--idle", str(idle)]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [*command(), *arguments], stdin=null, stdout=null, stderr=null, start_new_session=True, close_fds=True
    )
    process.returncode = 0  # nobody waits for it, and subprocess need not warn of that


def stop_server(folder: Path) -> None:
    """Ask the warm server of this folder to leave, and wait until nobody listens any more."""
    connection = connect(folder, _REPLY_SECONDS)
    if connection is not None:
        with connection:
            send(connection, Stop())
            with contextlib.suppress(OSError, ValueError):
                _reply(connection, time.monotonic() + _REPLY_SECONDS)
