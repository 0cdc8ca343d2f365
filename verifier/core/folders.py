"""Folders to which a file is added, and nothing else: every module in them is one entry of a table, under its name.

The settings know the names without importing a module; a module is imported when its entry is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from verifier.core.errors import ConfigError

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[1]


class Folder(Mapping[str, T]):
    """The modules of a folder of the verifier as a table, sorted by name; helpers begin with an underscore.

    Args:
        package: the folder, as a package.
        attribute: what every module must have.
        whole: an entry is the module, not its attribute.
    """

    def __init__(self, package: str, attribute: str | None, whole: bool = False) -> None:
        self.package, self.attribute, self.whole = package, attribute, whole

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all modules, none of which is imported."""
        path = _ROOT.joinpath(*self.package.split(".")[1:])
        return tuple(sorted(m.name for m in pkgutil.iter_modules([str(path)]) if not m.name.startswith("_")))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def digest(self) -> str:
        """Of the names and contents of its files."""
        folder, found = _ROOT.joinpath(*self.package.split(".")[1:]), hashlib.sha256()
        for name in self.names:
            path = folder / f"{name}.py"
            content = path.read_bytes() if path.is_file() else b""
            found.update(f"{name} {len(content)} ".encode() + content)
        return found.hexdigest()[:12]

    def __getitem__(self, name: str) -> T:
        """Import a module.

        Raises:
            KeyError: there is none of this name.
            ConfigError: it lacks the attribute.
        """
        if name not in self.names:
            raise KeyError(name)
        module: Any = importlib.import_module(f"{self.package}.{name}")
        if self.attribute is not None and not hasattr(module, self.attribute):
            file = f"{self.package.replace('.', '/')}/{name}.py"
            raise ConfigError(f"{file} has no '{self.attribute}', which every module of its folder must have")
        return module if self.whole or self.attribute is None else getattr(module, self.attribute)


# Sets of ops, each in the form of a plug-in's module (:mod:`verifier.ops.registry`).
OPS: Folder[Any] = Folder("verifier.contrib", None)
# Branching heuristics: a ``Heuristic`` or a function that scores neurons (:mod:`verifier.bab.branching`).
HEURISTICS: Folder[Any] = Folder("verifier.bab.branching.heuristics", "HEURISTIC")
# Attacks: functions of a ``Target`` (:mod:`verifier.attack.methods`).
ATTACKS: Folder[Any] = Folder("verifier.attack.attacks", "attack")
# Output formats: modules with a function ``render`` (:mod:`verifier.report.formats`).
FORMATS: Folder[Any] = Folder("verifier.report.formats", "render", whole=True)
# How weights and work are placed (:mod:`verifier.parallel.backends`).
BACKENDS: Folder[Any] = Folder("verifier.parallel.backends", "BACKEND")
