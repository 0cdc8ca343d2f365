"""The container of a proof: a zip file whose arrays are written as they come, and that gets its name at the end."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from verifier.core.errors import InputError

# The types of arrays in a file, by what numpy calls them.
_TYPES = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "uint8": "u1"}
_LEVEL = 6


def part_of(path: Path) -> Path:
    """What a file is called before it is finished."""
    return path.with_name(path.name + ".part")


class Archive:
    """A file in the making, beside the one that it becomes.

    Args:
        path: of the finished file.

    Attributes:
        failure: why the file cannot be written, from then on nothing is; a query does not end for it.

    Raises:
        InputError: nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: dict[str, list[Any]] = {}
        self.failure: OSError | None = None
        self._part = part_of(path)
        try:
            path.unlink(missing_ok=True)  # nothing of an earlier query stays
            self._zip = zipfile.ZipFile(self._part, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

    def put(self, array: np.ndarray) -> str:
        """Write an array; its name."""
        return self.stream((array,), array.dtype, array.shape)

    def stream(self, blocks: Iterable[np.ndarray], dtype: np.dtype | type, shape: tuple[int, ...]) -> str:
        """Write an array that comes in blocks along its first dimension; its name."""
        dtype = np.dtype(dtype)
        kind = _TYPES[dtype.name]
        name = f"a{len(self.arrays)}"
        if self.failure is not None:
            return name
        count = 0
        try:
            with self._zip.open(f"{name}.bin", "w", force_zip64=True) as out:
                for block in blocks:
                    count += block.size
                    out.write(np.ascontiguousarray(block, dtype=kind).tobytes())
        except OSError as error:
            self.failure = error
            return name
        if count != int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"an array of shape {shape} got {count} elements")
        self.arrays[name] = [kind, [int(n) for n in shape]]
        return name

    def finish(self, header: Mapping[str, Any]) -> int:
        """Write the header and give the file its name; its size in bytes.

        Raises:
            OSError: it could not be written.
        """
        if self.failure is not None:
            raise self.failure
        text = json.dumps({**header, "arrays": self.arrays}, allow_nan=False, separators=(",", ":"))
        self._zip.writestr("header.json", text)
        self._zip.close()
        size = self._part.stat().st_size
        os.replace(self._part, self.path)
        return size

    def drop(self) -> None:
        """Leave nothing of an unfinished file."""
        with contextlib.suppress(OSError):
            self._zip.close()
        with contextlib.suppress(OSError):
            self._part.unlink()
