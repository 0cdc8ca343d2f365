"""Files that are whole at every moment where that is possible, and never hold what an earlier query left."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import stat
import tempfile
import time
from pathlib import Path

from verifier.core.errors import InputError

_LINKS = 40  # as many as the kernel follows
_OPEN_SECONDS, _WRITE_SECONDS = 0.2, 1.0  # for somebody to open a pipe, and to go on reading from it

_log = logging.getLogger(__name__)


def write_atomic(path: Path, text: str) -> None:
    """Make ``text`` all that ``path`` holds.

    A file is replaced by a new one that was written beside it, so that a reader, or a killed process, never leaves a
    part of it; its mode and owner stay. Links are followed. A file is written in place when it has several names or its
    folder takes no new file (it is full, or the file is another user's in a sticky folder), and so is what is no file
    (pipes, devices). Missing folders are made, which is logged.

    Raises:
        InputError: it cannot be written. What the file held is gone all the same, or the message says that it is not.
    """
    path, data = path.absolute(), text.encode()
    try:
        target = _replaceable(path)
        if target is None or not _replace(target, data):
            _write_in_place(path, data)
    except OSError as error:
        stays = "" if _empty(path) else "; what it held before is still there"
        raise InputError(f"cannot write {path}: {error.strerror or error}{stays}") from None


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device or the like, which takes one text and forgets none."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _replaceable(path: Path) -> Path | None:
    """Where a new file may be put in the place of the old one, all links followed; ``None``: write in place."""
    for _ in range(_LINKS):
        if not path.is_symlink():
            break
        if path.parent.resolve().is_relative_to("/proc"):  # what a process has open, not a name
            return None
        path = path.parent / os.readlink(path)
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    try:
        status = path.stat()
    except FileNotFoundError:
        make_folder(path.parent)
        return path
    return path if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else None


def make_folder(folder: Path) -> None:
    """Make a folder that is missing, and those above it, and say so in the log; OSError when that cannot be."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _log.warning("note: the folder %s did not exist and was made", folder)


def _replace(target: Path, data: bytes) -> bool:
    """Write a new file and rename it over ``target``; whether that was possible where there is a file already."""
    try:
        before = target.stat()
    except FileNotFoundError:
        before = None
    name: str | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".verifier-", dir=target.parent)
        with open(descriptor, "wb") as handle:
            if before is not None and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, before.st_uid, before.st_gid)
            os.fchmod(descriptor, 0o644 if before is None else stat.S_IMODE(before.st_mode))
            handle.write(data)
        os.replace(name, target)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
        if before is None or not isinstance(error, OSError):
            raise
        return False
    return True


def _write_in_place(path: Path, data: bytes) -> None:
    """Empty what is there and write; neither makes a file nor waits for long."""
    descriptor = _open(path)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
        rest = memoryview(data)
        while rest:
            if not select.select([], [descriptor], [], _WRITE_SECONDS)[1]:
                raise OSError(errno.EAGAIN, "nobody reads what is written")
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor to write what exists; a pipe that nobody reads is waited for a moment."""
    until = time.monotonic() + _OPEN_SECONDS
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() >= until:
                raise OSError(error.errno, "nobody reads from it") from None
        time.sleep(0.02)


def _empty(path: Path) -> bool:
    """Empty a file that could not be written, or remove it; whether nothing of it is left."""
    try:
        if not path.is_file():
            return True
        with contextlib.suppress(OSError):
            os.truncate(path, 0)
            return True
        os.unlink(path.resolve())
    except OSError:
        return False
    return True
