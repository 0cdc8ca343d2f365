"""What ties a child process to its parent, and a forked child as its parent sees it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import Protocol

_PR_SET_PDEATHSIG = 1


def lead_group(parent: int) -> None:
    """Make this forked process the leader of a group of its own, with the usual signals, that dies with its parent."""
    os.setpgid(0, 0)
    die_with_parent(True)
    if os.getppid() != parent:
        os._exit(1)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def die_with_parent(wanted: bool) -> None:
    """Whether the kernel kills this process when its parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if wanted else 0, 0, 0, 0)


class Process(Protocol):
    """The process behind a worker."""

    def kill(self) -> None:
        """SIGKILL to it and its children, now; nothing when it has ended."""

    def reap(self, seconds: float) -> int | None:
        """Wait a little for its end; its wait status, or ``None`` when it is not over yet or not known."""


@dataclass
class ForkedProcess:
    """A child of ours, leader of its own process group."""

    pid: int
    _reaped: int | None = None

    def kill(self) -> None:
        if self._reaped is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def reap(self, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while self._reaped is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._reaped = 0
                break
            if pid:
                self._reaped = status
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(0.005)
        return self._reaped
