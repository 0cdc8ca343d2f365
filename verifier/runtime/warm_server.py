"""The warm server: a small process that keeps one warm process ready, for exactly one query.

The server imports nothing heavy and does no work. It forks a process that warms up (imports, device context) and then
waits. A query that fits is passed on to it with the descriptors that came along; the warm process answers it as a
forked one would, and ends. Then the server prepares the next one. So nothing but warmth is shared between queries, and
while a query runs there is no second set of imports or device context.

A running query belongs to its client alone: it writes to the client's pipe, and the kernel kills it when the client's
end of the lifetime pipe, to which nobody writes, is closed. It outlives the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from verifier.core.messages import MessageError
from verifier.runtime.messages import (
    REQUESTS,
    WARM_UP_REPORTS,
    Accepted,
    Answer,
    Busy,
    Caller,
    Ended,
    Failed,
    HandOver,
    Prepare,
    Ready,
    Refused,
    Reply,
    Retired,
    Stop,
    WarmingUp,
)
from verifier.runtime.processes import die_with_parent, lead_group
from verifier.runtime.warm_link import (
    LOCK,
    SOCKET,
    caller,
    difference,
    open_folder,
    peer_is_us,
    receive,
    send,
    socket_path,
    unpack,
)
from verifier.runtime.worker import work

_REQUEST_SECONDS = 1.0  # for a client that connected to say what it wants
_WARM_UP_SECONDS = 120.0
_LONG_SECONDS = 3600.0  # select refuses to wait for ever so long
_F_SETSIG = 10  # fcntl: which signal tells of input
_TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

WarmUp = Callable[[], None]


def serve(folder: Path, idle: float, warm_up: WarmUp) -> None:
    """Be the warm server of this folder; returns at once when there is one.

    Args:
        idle: seconds without a query or a call of prepare after which it ends.
        warm_up: what a warm process does beforehand.
    """
    known = caller()
    opened = open_folder(folder, create=True)
    os.chdir("/")
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=opened)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    _Server(opened, lock, idle, warm_up, known).run()


@dataclass
class _WarmProcess:
    """The warm process.

    Attributes:
        control: our end of a socket pair, open until a query is sent: it says Ready or Failed.
        taken: it has been given to a query.
        client: the connection of that query while it is open.
    """

    pid: int
    control: socket.socket
    began: float
    ready: bool = False
    taken: bool = False
    client: socket.socket | None = None

    def kill(self) -> None:
        """Safe as long as it has not been waited for."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


@dataclass
class _Server:
    """One loop over everything that can happen; nothing in it waits.

    Attributes:
        new: connections that have not said what they want, with the time until which they may.
        asking: connections that are told when a warm process is ready.
        failure: why the warm-up failed; whoever asks next is told.
        retired: takes no more queries and ends as soon as nothing runs.
    """

    folder: int
    lock: int
    idle: float
    warm_up: WarmUp
    caller: Caller
    process: _WarmProcess | None = None
    listener: socket.socket | None = None
    new: dict[socket.socket, float] = field(default_factory=dict)
    asking: list[socket.socket] = field(default_factory=list)
    failure: str = ""
    retired: bool = False
    _used: float = field(default_factory=time.monotonic)

    def run(self) -> None:
        woken = self._watch_signals()
        self._listen()
        self._prepare()
        try:
            while not self._over():
                controls = [self.process.control] if self.process and self.process.control.fileno() >= 0 else []
                clients = [self.process.client] if self.process and self.process.client else []
                listeners = [self.listener] if self.listener else []
                sources = [woken, *listeners, *self.new, *self.asking, *controls, *clients]
                for source in select.select(sources, [], [], self._patience())[0]:
                    self._handle(source, woken)
                self._expire()
        finally:
            self._retire("it ends")
            if self.process is not None and not self.process.taken:
                self.process.kill()

    def _watch_signals(self) -> int:
        """A descriptor from which the numbers of the signals that have come can be read."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        for number in (signal.SIGCHLD, *_TO_END):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        return read

    def _listen(self) -> None:
        """Take the place of a socket that an earlier server left; we hold the lock, so nobody uses it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=self.folder)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        before = os.umask(0o077)
        self.listener.bind(socket_path(self.folder))
        os.umask(before)
        self.listener.listen(16)
        self.listener.setblocking(False)

    # -- time ---------------------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        if self.process is not None and self.process.taken:
            return False
        return self.retired or (self._waiting() and time.monotonic() >= self._used + self.idle)

    def _waiting(self) -> bool:
        """Nothing is going on."""
        return self.process is None or (self.process.ready and not self.process.taken)

    def _patience(self) -> float | None:
        """Seconds until the next thing that happens by itself."""
        ends = list(self.new.values())
        if self.process is not None and not self.process.ready:
            ends.append(self.process.began + _WARM_UP_SECONDS)
        if self._waiting():
            ends.append(self._used + self.idle)
        return min(max(0.0, min(ends) - time.monotonic()), _LONG_SECONDS) if ends else None

    def _expire(self) -> None:
        now = time.monotonic()
        for connection in [connection for connection, until in self.new.items() if now >= until]:
            self._drop(connection)
        if self.process is not None and not self.process.ready and now >= self.process.began + _WARM_UP_SECONDS:
            self.process.kill()

    # -- events -------------------------------------------------------------------------------------------------------

    def _handle(self, source: int | socket.socket, woken: int) -> None:
        process = self.process
        if source == woken:
            if set(os.read(woken, 4096)) & {*_TO_END}:
                self._retire("it was told to end")
            self._reap()
        elif source is self.listener:
            self._accept()
        elif source in self.new:
            self._request(source)  # type: ignore[arg-type]
        elif process is not None and process.client is not None and source is process.client:
            process.kill()  # the client has what it wants, or is gone
            process.client.close()
            process.client = None
        elif process is not None and source is process.control:
            self._hear(process)
        elif source in self.asking:
            self._drop(source)  # type: ignore[arg-type]

    def _accept(self) -> None:
        assert self.listener is not None
        with contextlib.suppress(OSError):
            connection, _ = self.listener.accept()
            connection.setblocking(False)
            if peer_is_us(connection):
                self.new[connection] = time.monotonic() + _REQUEST_SECONDS
            else:
                connection.close()

    def _request(self, connection: socket.socket) -> None:
        """Read what a client wants and do it; a client that talks nonsense is hung up on."""
        del self.new[connection]
        descriptors: list[int] = []
        try:
            message, descriptors = receive(connection, *REQUESTS)
            match message:
                case Prepare():
                    self._be_ready(connection, message)
                case Answer():
                    self._pass_on(connection, message, descriptors)
                case Stop():
                    self._retire("it was asked to end")
                    connection.close()
                case None:
                    connection.close()
        except (OSError, MessageError):
            self._drop(connection)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _be_ready(self, connection: socket.socket, message: Prepare) -> None:
        self._used = time.monotonic()
        process, why = self.process, self._unfit(message.caller)
        if why is not None:
            self._retire(why)
            self._tell(connection, Retired(why))
        elif process is not None and process.client is not None:
            self._tell(connection, Busy())
        elif process is not None and process.ready and not process.taken:
            self._tell(connection, Ready())
        else:
            send(connection, WarmingUp())
            self.asking.append(connection)
            if self.failure:
                self._give_up()
            elif process is None:
                self._prepare()

    def _pass_on(self, connection: socket.socket, message: Answer, descriptors: list[int]) -> None:
        """Pass a query on to the warm process, which tells the client itself that it has it."""
        process = self.process
        why = self._unfit(message.caller)
        if why is None and process is not None and process.taken:
            why = "it is busy"
        if why is not None or process is None or not process.ready:
            self._tell(connection, Refused(why or "it is not ready"))
            return
        send(process.control, HandOver(message.query, message.environ), [*descriptors, connection.fileno()])
        process.control.close()
        process.taken, process.client = True, connection

    def _unfit(self, caller: Caller) -> str | None:
        """Why a client cannot use what we prepared."""
        if caller.identity != self.caller.identity:
            return "it was started with other code or another interpreter"
        name = difference(self.caller.circumstances, caller.circumstances)
        return None if name is None else f"it was started with another {name}"

    def _hear(self, process: _WarmProcess) -> None:
        """The warm process says that it is ready, or why it failed."""
        try:
            message, _ = receive(process.control, *WARM_UP_REPORTS)
        except (OSError, MessageError):
            message = None
        match message:
            case Ready():
                process.ready, self._used = True, time.monotonic()
                self._tell_all(message)
            case Failed(why):
                self.failure = why
            case None:  # it has ended, and SIGCHLD follows
                process.control.close()

    # -- the warm process ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        server, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _warm_process(child, self.warm_up, parent)
        child.close()
        server.settimeout(1.0)
        self.process = _WarmProcess(pid, server, time.monotonic())

    def _reap(self) -> None:
        """Notice the end of the warm process; a used one is replaced, one that failed is not."""
        process = self.process
        if process is None:
            return
        pid, status = os.waitpid(process.pid, os.WNOHANG)
        if not pid:
            return
        self.process = None
        if process.client is not None:
            self._tell(process.client, Ended(status))
        while process.control.fileno() >= 0:
            self._hear(process)  # its last words
        if process.taken and not self.retired:
            self._used = time.monotonic()
            self._prepare()
        elif not process.ready:
            self.failure = self.failure or f"it ended with wait status {status}"
            if self.asking:
                self._give_up()

    def _give_up(self) -> None:
        """Say why the warm-up failed, and make room for a server that tries again."""
        self._tell_all(Failed(self.failure))
        self._retire("its warm-up failed")

    # -- connections ---------------------------------------------------------------------------------------------------

    def _tell(self, connection: socket.socket, message: Reply) -> None:
        with contextlib.suppress(OSError):
            send(connection, message)
        self._drop(connection)

    def _tell_all(self, message: Reply) -> None:
        for connection in list(self.asking):
            self._tell(connection, message)

    def _drop(self, connection: socket.socket) -> None:
        self.new.pop(connection, None)
        if connection in self.asking:
            self.asking.remove(connection)
        connection.close()

    def _retire(self, why: str) -> None:
        """Make room for another server; what runs is watched to its end."""
        if self.retired:
            return
        self.retired = True
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=self.folder)
        os.close(self.lock)
        self._tell_all(Retired(why))
        for connection in list(self.new):
            self._drop(connection)


# -------------------------------------------------------------------------------------------------- in the warm process


def _warm_process(control: socket.socket, warm_up: WarmUp, server: int) -> None:
    """Warm up, wait for one query, answer it; never returns."""
    code = 1
    try:
        lead_group(server)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _close_all_but(control.fileno())
        try:
            warm_up()
        except Exception as error:
            send(control, Failed(f"{type(error).__name__}: {error}"))
            os._exit(1)
        send(control, Ready())
        message, descriptors = receive(control, HandOver)
        if message is not None:
            _answer(message, *descriptors)
            code = 0
    finally:
        os._exit(code)


def _close_all_but(kept: int) -> None:
    """The lock, the listening socket and all connections stay with the server."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _answer(message: HandOver, pipe: int, lifetime_pipe: int, here: int, client: int) -> None:
    """Become the process of one query, under the client's folder and variables, alive only as long as the client is."""
    query = unpack(message.query)
    end_with(lifetime_pipe)
    die_with_parent(False)
    os.fchdir(here)
    os.environ.clear()
    os.environ.update(message.environ)
    with socket.socket(fileno=client) as connection:
        send(connection, Accepted(os.getpid()))
    os.close(here)
    work(query, pipe)


def end_with(lifetime_pipe: int) -> None:
    """The kernel kills our process group once the last write end of this pipe is closed, whatever we are doing then."""
    fcntl.fcntl(lifetime_pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifetime_pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifetime_pipe, fcntl.F_SETFL, fcntl.fcntl(lifetime_pipe, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()
    closed.register(lifetime_pipe, select.POLLIN)
    if closed.poll(0):  # it was closed before the kernel knew
        os._exit(1)
