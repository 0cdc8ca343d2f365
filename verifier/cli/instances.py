"""Lists of instances: CSV lines ``onnx,vnnlib,timeout`` with paths relative to the file's own folder."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from verifier.core.errors import InputError


@dataclass(frozen=True)
class Instance:
    """One line of a list.

    Attributes:
        category: name of the list's folder.
        index: number of the instance in its list, from 0.
        onnx, vnnlib: as written in the list.
        folder: what the paths are relative to.
        timeout: seconds.
    """

    category: str
    index: int
    onnx: str
    vnnlib: str
    folder: Path
    timeout: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the instance in a results file."""
        return self.category, self.onnx, self.vnnlib


def existing(path: str | Path, what: str) -> Path:
    """The file, or the same name with ``.gz`` when only that exists.

    Raises:
        InputError: naming the path when there is neither.
    """
    path = Path(path)
    packed = Path(f"{path}.gz")
    for candidate in (path, packed):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give a file")
    raise InputError(f"{what} {path} does not exist (nor does {packed.name}); check the path")


def parse_timeout(text: str, where: str) -> float:
    """Positive finite seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"{where}: a time limit is a positive number of seconds, not '{text}'")
    return seconds


def read_instances(path: Path) -> list[Instance]:
    """All instances of a list, in order.

    Raises:
        InputError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    folder = path.absolute().parent
    found: list[Instance] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            where = f"{path}:{reader.line_num}"
            if len(cells) != 3 or not all(cells):
                raise InputError(f"{where}: expected onnx,vnnlib,timeout, found {len(cells)} cells")
            if not found and cells[:2] == ["onnx", "vnnlib"]:  # a header
                continue
            onnx, vnnlib, timeout = cells
            found.append(Instance(folder.name, len(found), onnx, vnnlib, folder, parse_timeout(timeout, where)))
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    if not found:
        raise InputError(f"{path} lists no instances")
    return found
