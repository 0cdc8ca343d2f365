"""One query as processes pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verifier.config import Config


@dataclass(frozen=True)
class Query:
    """One query.

    Attributes:
        onnx, vnnlib: the files; they exist. Of several networks, the first.
        settings: ``None``: the defaults, which are then only built where they are needed.
        timeout: seconds, or ``None``.
        start: ``time.monotonic()`` from which the limit counts.
        verbose: keep the warnings of libraries.
        proof: file for the proof of an ``unsat``.
        quiet: drop what libraries print. The caller's pipes then close with the parent, however long the system takes
            to free the child's memory.
        networks: files by the names that the property gives to networks; none: the network has no name.
    """

    onnx: Path
    vnnlib: Path
    settings: Config | None
    timeout: float | None
    start: float
    verbose: bool = False
    quiet: bool = False
    networks: tuple[tuple[str, Path], ...] = ()
    proof: Path | None = None

    @cached_property
    def config(self) -> Config:
        """All settings."""
        from verifier.config import Config

        return Config() if self.settings is None else self.settings
