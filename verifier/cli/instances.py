"""Lists of instances: CSV lines ``onnx,vnnlib,timeout`` with paths relative to the file's own folder.

For a property with several networks, ``onnx`` is a Python list ``[('f', 'a.onnx'), ('g', 'b.onnx')]``.
"""

from __future__ import annotations

import ast
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


Networks = tuple[tuple[str, Path], ...]


def find_networks(text: str, folder: Path | None = None) -> tuple[Path, Networks]:
    """The file of a network, or the first one and all in a list of names and files.

    Args:
        text: a path, or ``[('f', 'a.onnx'), ('g', 'b.onnx')]``.
        folder: what paths are relative to.

    Raises:
        InputError: a file does not exist, or the list is malformed.
    """
    folder = Path() if folder is None else folder
    if not text.lstrip().startswith("["):
        return existing(folder / text, "network"), ()
    try:
        pairs = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pairs = None
    return check_networks(pairs, text, folder)


def check_networks(pairs: object, text: str, folder: Path | None = None) -> tuple[Path, Networks]:
    """:func:`find_networks` for what should be pairs of names and files; ``text`` is shown where it is not."""
    folder = Path() if folder is None else folder
    found: dict[str, Path] = {}
    for pair in pairs if isinstance(pairs, list) else []:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)):
            break
        if pair[0] in found:
            raise InputError(f"the network '{pair[0]}' has two files in '{text[:80]}'; give it one")
        found[pair[0]] = existing(folder / pair[1], f"network '{pair[0]}':")
    else:
        if found:
            return next(iter(found.values())), tuple(found.items())
    raise InputError(f"'{text[:80]}' is not of the form [('f', 'a.onnx'), ('g', 'b.onnx')]")


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
