"""Files that are whole at every moment: written beside the target, then renamed over it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from verifier.core.errors import InputError

_BLOCK = 1 << 20


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader, or a killed process, never leaves a part of it.

    Raises:
        InputError: when the folder cannot be written.
    """
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as handle:
                os.fchmod(handle.fileno(), 0o644)
                handle.write(text)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def result_text(verdict: str, witness: str | None = None) -> str:
    """The text of a VNN-COMP result file: the verdict, and after ``sat`` the witness."""
    return f"{verdict}\n" if witness is None else f"{verdict}\n{witness.rstrip()}\n"


def sha256(path: Path) -> str:
    """Hex digest of a file as it is on disk (a ``.gz`` is not unpacked)."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
