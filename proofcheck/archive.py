"""The container of a proof: a zip file with `header.json` and one member of little-endian binary per array.

Nothing in it is believed: sizes are compared with what the header says before a member is read, no member is read
beyond its size, and the sum of all sizes is bounded.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from proofcheck.failures import Refused, require

_TYPES = {"<f8", "<f4", "<i4", "u1"}
_MOST_HEADER = 1 << 26
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError, KeyError)


class Archive:
    """An open proof.

    Args:
        most_bytes: that all arrays together may have.

    Attributes:
        header: the JSON object.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.left = most_bytes
        try:
            self._zip = zipfile.ZipFile(path)
            members = self._zip.infolist()
        except _BROKEN as error:
            raise Refused(f"{path.name} is not a zip file: {error}") from None
        names = [m.filename for m in members]
        require(len(set(names)) == len(names), "two members of the zip file have the same name")
        self._members = {m.filename: m for m in members}
        text = self._read("header.json", None, _MOST_HEADER)
        try:
            self.header = json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise Refused(f"header.json: {error}") from None
        require(isinstance(self.header, dict), "header.json is not an object")
        self._arrays: Any = self.header.get("arrays")
        require(isinstance(self._arrays, dict), "header.json: arrays")
        for name, entry in self._arrays.items():
            require(isinstance(entry, list) and len(entry) == 2 and entry[0] in _TYPES and isinstance(entry[1], list)
                    and len(entry[1]) <= 3 and all(type(d) is int and 0 <= d < 1 << 40 for d in entry[1]),
                    f"header.json: array {name!r}")  # fmt: skip
        require(set(self._members) == {"header.json", *(f"{n}.bin" for n in self._arrays)},
                "the members of the zip file are not those of the header")  # fmt: skip

    def _read(self, name: str, size: int | None, most: int) -> bytes:
        require(name in self._members, f"no member {name!r}")
        member = self._members[name]
        require(member.compress_type in (0, 8) and not member.flag_bits & 1, f"{name}: compression or encryption")
        require(member.file_size <= most, f"{name}: {member.file_size} bytes are too many")
        require(size is None or member.file_size == size, f"{name}: {member.file_size} bytes, where {size} must be")
        try:
            with self._zip.open(member) as file:
                data = file.read(member.file_size + 1)
        except _BROKEN as error:
            raise Refused(f"{name}: {error}") from None
        require(len(data) == member.file_size, f"{name}: {len(data)} bytes, where {member.file_size} must be")
        return data

    def size(self, name: str) -> int:
        """Elements that an array has by the header."""
        return math.prod(self._arrays.get(name, ("", [0]))[1])

    def array(self, name: object, dtypes: str, *shape: int | None) -> np.ndarray:
        """A member as an array of one of the types "f" (numbers, widened to float64), "i" and "u", and of a shape,
        where None stands for any size. Infinities are let through, NaN is not.
        """
        require(isinstance(name, str) and name in self._arrays, f"no array {name!r} in the header")
        entry: Any = self._arrays[name]
        dtype, sizes = entry
        fits = len(sizes) == len(shape) and all(b in (a, None) for a, b in zip(sizes, shape, strict=True))
        require(fits and np.dtype(dtype).kind in dtypes, f"{name}: {dtype} {sizes}, where {shape} must be")
        size = math.prod(sizes) * np.dtype(dtype).itemsize
        self.left -= size
        require(self.left >= 0, f"{name}: the arrays have too many bytes (see --max-bytes)")
        values = np.frombuffer(self._read(f"{name}.bin", size, size), dtype).reshape(sizes)
        require(values.dtype.kind != "f" or not np.isnan(values).any(), f"{name}: a NaN")
        return values.astype({"f": np.float64, "i": np.int64, "u": np.uint8}[values.dtype.kind])


def _no_constant(text: str) -> None:
    raise ValueError(f"the number {text}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has the same key twice")
    return made
