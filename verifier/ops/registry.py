"""All op classes: those in the modules of this package, and sets of ops, which add all that an op needs in one module.

Sets of ours are the modules of ``verifier/contrib``; other packages add theirs in the group ``verifier.ops``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import verifier
import verifier.ops
from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.plugins import OPS, Plugin, foreign, load, note, united
from verifier.graph.op import Op


@cache
def op_classes() -> tuple[type[Op], ...]:
    """Every concrete op class of ``verifier.ops``, sorted by name."""
    found: set[type[Op]] = set()
    for module in pkgutil.iter_modules(verifier.ops.__path__):
        loaded = importlib.import_module(f"verifier.ops.{module.name}")
        for _, cls in inspect.getmembers(loaded, inspect.isclass):
            public = not cls.__name__.startswith("_") and cls.__module__ == loaded.__name__
            if public and issubclass(cls, Op) and not inspect.isabstract(cls):
                found.add(cls)
    return tuple(sorted(found, key=lambda c: c.__name__))


@dataclass(frozen=True)
class OpSet:
    """What one module adds, or any object that a plug-in names: it has some of these in capitals (``OPS``, ...).

    Attributes:
        plugin: whose it is; for a set of ours the package is the verifier, and no record names it.
        ops: op classes; an instance of one may stand in a graph.
        translators: by the name of an ATen function, see ``Translator`` of the front end's ``lowering``.
        converters: by ONNX operator, see ``Converts`` of its ``converters``.
        samples: for :mod:`verifier.testing`.
        nodes: networks of one node for the tests of ``converters``, see :class:`verifier.testing.Node`.
    """

    plugin: Plugin
    ops: tuple[type[Op], ...]
    translators: Mapping[str, Any]
    converters: Mapping[str, Any]
    samples: tuple[Any, ...]
    nodes: tuple[Any, ...]

    @property
    def by_name(self) -> dict[str, type[Op]]:
        """The op classes."""
        return {cls.__name__: cls for cls in self.ops}


@cache
def op_sets() -> tuple[OpSet, ...]:
    """The sets of all other packages, imported and checked.

    Raises:
        ConfigError: one cannot be imported or used, or has something under a name that is taken.
    """
    found = tuple(map(op_set, foreign(OPS, folders.OPS).values()))
    check_classes(found)
    return found


def op_set(plugin: Plugin) -> OpSet:
    """The set of another package, imported and checked on its own.

    Raises:
        ConfigError: it cannot be imported or used.
    """
    return _op_set(plugin, load(plugin), our_classes())


def check_classes(sets: Iterable[OpSet]) -> None:
    """Op classes of other packages all have names of their own.

    Raises:
        ConfigError: a name is one of ours, or in two sets.
    """
    united("op class", {cls.__name__ for cls in our_classes()}, [(s.plugin, s.by_name) for s in sets])


@cache
def our_sets() -> tuple[OpSet, ...]:
    """The sets in ``verifier/contrib``, imported and checked.

    Raises:
        ConfigError: one cannot be used, or has something under a name that is taken.
    """
    version, folder = verifier.__version__, folders.OPS
    plugins = [Plugin(OPS, name, "verifier", version, f"{folder.package}.{name}") for name in folder]
    found = tuple(_op_set(plugin, folder[plugin.name], op_classes()) for plugin in plugins)
    united("op class", {cls.__name__ for cls in op_classes()}, [(s.plugin, s.by_name) for s in found])
    return found


def our_classes() -> tuple[type[Op], ...]:
    """Every concrete op class of ours, sorted by name."""
    added = (cls for found in our_sets() for cls in found.ops)
    return tuple(sorted((*op_classes(), *added), key=lambda c: c.__name__))


def our_table(part: str, others: Collection[str]) -> dict[str, Any]:
    """The ``translators`` or ``converters`` of our sets, by name.

    Args:
        others: names that are taken.

    Raises:
        ConfigError: a name is taken, or in two sets; or as of :func:`our_sets`.
    """
    return united(part[:-1], others, [(found.plugin, getattr(found, part)) for found in our_sets()])


def _op_set(plugin: Plugin, loaded: Any, taken: Collection[type[Op]]) -> OpSet:
    names = ("ops", "translators", "converters", "samples", "nodes")
    parts = {name: getattr(loaded, name.upper(), None) for name in names}
    if all(part is None for part in parts.values()):
        raise ConfigError(f"the {plugin} has none of OPS, TRANSLATORS, CONVERTERS, SAMPLES and NODES")
    for name in ("translators", "converters"):
        table = parts[name] or {}
        if not isinstance(table, Mapping) or not all(isinstance(k, str) and callable(v) for k, v in table.items()):
            raise ConfigError(f"{name.upper()} of the {plugin} must be functions by name")
    classes = tuple(parts["ops"] or ())
    for cls in classes:
        why = _unfit(cls, taken)
        if why is not None:
            raise ConfigError(f"OPS of the {plugin}: {getattr(cls, '__name__', cls)} {why}")
    translators, converters = parts["translators"] or {}, parts["converters"] or {}
    samples, nodes = tuple(parts["samples"] or ()), tuple(parts["nodes"] or ())
    return OpSet(plugin, classes, translators, converters, samples, nodes)


def _unfit(cls: Any, taken: Collection[type[Op]]) -> str | None:
    """Why a class cannot be an op of a set; None when it can."""
    if not (inspect.isclass(cls) and issubclass(cls, Op)):
        return "is no op class; derive it from AffineOp or NonlinearOp"
    if inspect.isabstract(cls):
        return f"does not say all that an op must: {', '.join(sorted(cls.__abstractmethods__))} missing"
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return "must be a frozen dataclass"
    base = next((base for base in taken if issubclass(cls, base)), None)
    if base is not None:  # much knows ours by their class, and would take it for one
        return f"is a {base.__name__}; derive it from an abstract class instead"
    there = sys.modules.get(cls.__module__)
    if cls.__module__ == "__main__" or getattr(there, cls.__qualname__, None) is not cls:
        return "must stand at the top of a module, where other processes can import it"
    return None


def foreign_table(part: str, ours: Collection[str], sets: Iterable[OpSet]) -> dict[str, tuple[Plugin, Any]]:
    """The ``translators`` or ``converters`` of sets of other packages, by name, with whose they are.

    Args:
        ours: names that are taken.

    Raises:
        ConfigError: a name is taken, or in two sets.
    """
    tables = [(s.plugin, {key: (s.plugin, value) for key, value in getattr(s, part).items()}) for s in sets]
    return united(part[:-1], ours, tables)


def check_listed(plugin: Plugin, op: Op) -> None:
    """An op that a plug-in's translator has emitted is one of ours or in some set; whose it is takes part.

    Raises:
        ConfigError: it is not.
    """
    if type(op) in our_classes():
        return
    owner = next((s.plugin for s in op_sets() if type(op) in s.ops), None)
    if owner is None:
        raise ConfigError(f"the {plugin} makes nodes of {type(op).__name__}, which is not in its OPS")
    note(owner)
