"""What a model consists of: the ONNX file and the files that hold its external data, hashed without onnx.

The few fields of interest are found by walking the protobuf encoding, so that the light process that writes records
need not import anything.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

_BLOCK = 1 << 20
_LARGEST = (1 << 31) - 1  # bytes of a protobuf message
_ADVERTISED = b"location"  # the key of an external file's name
# For every kind of message the fields that lead to stored tensors, by number.
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEPTH = 100  # as deep as protobuf itself nests messages

Facts = tuple[int, int, int, int]  # device, inode, size, time
Part = tuple[Path, Facts | None]


class Hashes:
    """SHA-256 of networks and properties; a file is read again only when its time, size or place has changed."""

    def __init__(self) -> None:
        self._external: dict[Part, tuple[Path, ...]] = {}
        self._found: dict[tuple[Part, ...], str] = {}

    def of(self, path: Path, network: bool) -> str:
        """Of a file's bytes as they are on disk, followed by a network's files of external data, sorted by name.

        Raises:
            OSError: it cannot be read. External files that are missing count as empty.
        """
        facts = _facts(path)
        if (path, facts) not in self._external:
            self._external[path, facts] = external_files(path) if network else ()
        parts = [(path, facts), *((part, _facts(part, missing=True)) for part in self._external[path, facts])]
        key = tuple(parts)
        if key not in self._found:
            self._found[key] = _digest([part for part, known in parts if known is not None])
        return self._found[key]


def _facts(path: Path, missing: bool = False) -> Facts | None:
    try:
        status = os.stat(path)
    except OSError:
        if missing:
            return None
        raise
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def external_files(path: Path) -> tuple[Path, ...]:
    """The files beside an ONNX file in which it says that it keeps data; none for a file of another kind."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as stream:
                data = stream.read(_LARGEST)
        except (OSError, EOFError, zlib.error):
            return ()
    if _ADVERTISED not in data:
        return ()
    folder = path.resolve().parent
    found = {(folder / name).resolve() for name in _locations(memoryview(data), "model", 0)}
    return tuple(sorted(p for p in found if p.is_relative_to(folder) and p.is_file()))


def _locations(data: memoryview, kind: str, depth: int) -> Iterator[str]:
    """Names of external files in a message of a kind; what cannot be read as one ends it."""
    for number, value in _fields(data):
        part = _WAYS[kind].get(number)
        if part == "entry":
            entry = {n: bytes(v) for n, v in _fields(value)}
            if entry.get(1) == _ADVERTISED:
                yield os.fsdecode(entry.get(2, b"")).replace("\0", "")
        elif part is not None and depth < _DEPTH:
            yield from _locations(value, part, depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of every field that has a length."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                return
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            return


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length and where it ends; past the end of the data when it is cut off."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    return 0, len(data)
