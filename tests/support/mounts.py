"""File systems of any size, and other users: what only root can have; tests that need them are skipped for others."""

from __future__ import annotations

import os
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY, SOMEBODY = 65534, 65533


@contextmanager
def small_disk(folder: Path, **options: str | int) -> Iterator[Path]:
    """A file system in memory at ``folder`` with mount options such as ``size="64k"`` or ``nr_inodes=4``."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small file system")
    folder.mkdir(exist_ok=True)
    words = ",".join(f"{name}={value}" for name, value in options.items())
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", words, "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take every byte that is left on its file system."""
    with open(folder / "filling", "ab", buffering=0) as handle:
        for size in (4096, 1):
            try:
                while handle.write(b"x" * size):
                    pass
            except OSError:
                continue


def as_user(user: int, work: Callable[[], None]) -> None:
    """Run something in a child that belongs to another user; what it raises fails the test."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def open_to_all(folder: Path) -> Iterator[Path]:
    """The folder with mode 1777, as /tmp has, reachable by every user: pytest's own folders are closed to others."""
    changed = [(parent, parent.stat().st_mode & 0o7777) for parent in folder.parents if not parent.stat().st_mode & 1]
    for parent, mode in changed:
        parent.chmod(mode | 0o011)
    folder.chmod(0o1777)
    try:
        yield folder
    finally:
        for parent, mode in changed:
            parent.chmod(mode)
