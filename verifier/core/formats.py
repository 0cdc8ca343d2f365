"""Kinds of files by name: those of ours, and those that other packages read (group ``verifier.formats``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from verifier.core import folders
from verifier.core.errors import ConfigError, InputError, VerifierError
from verifier.core.plugins import FORMATS, foreign, lookup

# What we read, by suffix (perhaps with .gz).
READ = ("onnx", "vnnlib")


class InputFormat(Protocol):
    """Reads the files with one suffix, which is the plug-in's name without the dot. A module with ``read`` is one."""

    def read(self, path: Path, /) -> Any:
        """A network or a property.

        Returns:
            a network as a pair: a ``torch.nn.Module``, which is the network's meaning from then on, and the shape of
            one sample, leading batch dimension of 1 included; a property as a
            :class:`verifier.core.problem.Problem` (``verifier.spec.build`` makes them).

        Raises:
            Exception: the file is missing or malformed; becomes one sentence that names it.
        """
        ...


def read_foreign(path: Path) -> Any:
    """What another package reads in a file; None for suffixes of ours and those that no package claims.

    Raises:
        ConfigError: the package's reader cannot be used.
        InputError: the file is malformed.
    """
    suffix = path.suffix[1:]
    if suffix in ("", "gz", *READ) or suffix not in foreign(FORMATS, (*READ, *folders.FORMATS)):
        return None
    reader: InputFormat = lookup(FORMATS, suffix, {}, (*READ, *folders.FORMATS))
    if not callable(getattr(reader, "read", None)):
        raise ConfigError(f"the format '{suffix}' reads nothing (it has no function 'read'), so {path} cannot be read")
    try:
        return reader.read(path)
    except (VerifierError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as a .{suffix} file: {type(error).__name__}: {why}") from error
