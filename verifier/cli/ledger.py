"""The file of JSON lines that ``verifier run`` fills: one run at a time, and which of its records still hold."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from verifier.core.errors import InputError
from verifier.report.files import is_stream, make_folder
from verifier.report.record import plain, to_json

Key = tuple[str, int, str, str]
Record = dict[str, Any]

DECIDED = ("sat", "unsat")
UNDECIDED = ("unknown", "error", "timeout")
# Errors of processes, not of the query: they need not happen again.
_LOST = ("WorkerDied", "RankFailed")


@dataclass(frozen=True)
class Wanted:
    """What a record would say of an instance if it were answered now.

    Attributes:
        hashes: of network and property; ``None`` for a file that is not there.
        timeout: the limit in seconds.
        config: every setting, as in a record.
        versions: of everything a verdict rests on.
    """

    hashes: tuple[str | None, str | None]
    timeout: float
    config: Mapping[str, Any]
    versions: Mapping[str, str | None]

    def why_not(self, record: Record) -> str | None:
        """Why a record does not hold any more, in a few words; ``None`` when it does.

        A decided verdict holds while files, semantics and certification are equal. For the others limit, versions and
        all other settings count as well, and a process that was lost is no answer.
        """
        if (record["onnx"]["sha256"], record["vnnlib"]["sha256"]) != self.hashes:
            return "files changed"
        config = plain(self.config)
        if _meaning(record["config"]) != _meaning(config):
            return "certification or semantics changed"
        if record["verdict"] == "unsat" and record["certified"] is not _meaning(config)[0]:
            return "certification or semantics changed"
        if record["verdict"] in DECIDED:
            return None
        if (record["error"] or {}).get("kind") in _LOST:
            return "a process was lost"
        if record["timeout"] != self.timeout:
            return "another limit"
        if record["versions"] != plain(self.versions):
            return "other versions"
        return "other settings" if record["config"] != config else None


def _meaning(config: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether proofs are certified, and of which network they speak."""
    numerics = config["numerics"]
    return bool(numerics["certify"]), str(numerics.get("semantics", "real"))


class Ledger:
    """An open file of records that no other run writes to. Pipes and devices take records and hold none."""

    def __init__(self, path: Path) -> None:
        """Open and lock; the file is made when there is none.

        Raises:
            InputError: it cannot be written, or another run writes to it.
        """
        self.path, self.torn = path, False
        self._opened: list[int] = []
        try:
            self._stream = is_stream(path)
            make_folder(path.absolute().parent)
            self._open()
        except OSError as error:
            self.close()
            raise InputError(f"cannot write {path}: {error.strerror or error}") from None
        except InputError:
            self.close()
            raise

    def _open(self) -> None:
        """The lock is the process's own: workers do not inherit it."""
        if self._stream:
            self._opened.append(os.open(self.path, os.O_WRONLY | os.O_CLOEXEC))
            return
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._opened.append(descriptor)
            _lock(descriptor, self.path)
            opened, named = os.fstat(descriptor), os.stat(self.path)
            if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
                return
            os.close(self._opened.pop())  # another run has put a new file in its place since

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._opened:
            with suppress(OSError):
                os.close(descriptor)
        self._opened = []

    @property
    def filled(self) -> bool:
        """Whether it holds anything."""
        return not self._stream and os.fstat(self._opened[-1]).st_size > 0

    def read(self) -> list[Record]:
        """All records in the file's order; a last line that a kill cut off is left out, and ``torn`` says so.

        Raises:
            InputError: for a line that is no record.
        """
        if self._stream:
            return []
        descriptor = self._opened[-1]
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as handle:
            data = handle.read()
        self.torn = not data.endswith(b"\n") and bool(data)
        found: list[Record] = []
        for number, line in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                key_of(record)
                _meaning(record["config"])
                _ = record["verdict"], record["seconds"]["total"], record["certified"], record["timeout"]
                _ = record["versions"], record["error"], record["onnx"]["sha256"], record["vnnlib"]["sha256"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}:{number}: not a record of verifier run; give another --out") from None
            found.append(record)
        return found

    def keep(self, records: Sequence[Record]) -> None:
        """Make these all that the file holds: a new file, locked as well, in the place of the old one.

        Raises:
            InputError: it cannot be written.
        """
        if self._stream:
            return
        target = self.path.resolve()
        try:
            descriptor, name = tempfile.mkstemp(prefix=".verifier-", dir=target.parent)
            self._opened.append(descriptor)
            try:
                os.fchmod(descriptor, os.fstat(self._opened[0]).st_mode & 0o777)
                _lock(descriptor, self.path)
                for record in records:
                    self.append(record)
                os.replace(name, target)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None

    def append(self, record: Record) -> None:
        """Add a line.

        Raises:
            InputError: it cannot be written; the file ends with a part of the line at worst, which the next run drops.
        """
        rest = memoryview(to_json(record).encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._opened[-1], rest) :]
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise InputError(f"another run writes to {path}; wait for its end or give another --out") from None
        raise


def key_of(record: Record) -> Key:
    """What identifies the instance of a record."""
    return record["category"], record["instance"], record["onnx"]["path"], record["vnnlib"]["path"]
