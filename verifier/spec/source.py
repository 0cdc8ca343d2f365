"""Reads a text file that may be compressed, within size limits, and names positions in it."""

from __future__ import annotations

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError

MAX_BYTES = 2**30
_BLOCK = 2**22
_COMMENT = re.compile(rb";[^\r\n]*")


@dataclass(frozen=True)
class Source:
    """A file's text without comments; offsets and line numbers are those of the file."""

    name: str
    data: bytes

    def line(self, position: int) -> int:
        return self.data.count(b"\n", 0, position) + 1

    def at(self, position: int) -> str:
        """``file, line n`` of an offset, to start an error message with."""
        return f"{self.name}, line {self.line(position)}"


def locate(path: str | Path) -> Path:
    """The file itself, or its ``.gz`` sibling when only that exists.

    Raises:
        InputError: neither exists.
    """
    path = Path(path)
    sibling = path.with_name(path.name + ".gz")
    if path.is_file():
        return path
    if sibling.is_file():
        return sibling
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file; give the path of a file")
    raise InputError(f"{path} does not exist, nor does {sibling.name} beside it; check the path")


def read_bytes(path: str | Path, deadline: Deadline | None = None) -> bytes:
    """The file's bytes, decompressed when they start with gzip's magic number.

    Raises:
        InputError: missing, unreadable, damaged or larger than ``MAX_BYTES`` once decompressed.
    """
    path = locate(path)
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        blocks, size = [], 0
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            while block := file.read(_BLOCK):
                blocks.append(block)
                size += len(block)
                if size > MAX_BYTES:
                    raise InputError(f"{path} holds more than {MAX_BYTES >> 20} MiB of text; split the property")
                if deadline is not None:
                    deadline.check(f"the reading of {path}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return b"".join(blocks)


def read_source(path: str | Path, deadline: Deadline | None = None) -> Source:
    """The file's text with ``;`` comments blanked out (see :func:`read_bytes` for errors)."""
    data = read_bytes(path, deadline)
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    return Source(str(path), blank_comments(data))


def blank_comments(data: bytes) -> bytes:
    """Remove ``;`` comments, keeping every line break."""
    return _COMMENT.sub(b"", data) if b";" in data else data
