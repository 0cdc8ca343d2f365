"""What other packages add, found by their entry points: a group at a time, and only when a table of ours lacks a name.

Reading the names of a group imports nothing; what a name stands for is imported when it is asked for. Nobody takes over
a name of ours, and no two packages share one. Every process that needs a plug-in finds it itself: what travels between
processes are names, and op classes that can be imported by theirs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

from verifier.core.errors import ConfigError, PluginFailed, VerifierError

T = TypeVar("T")

OPS, HEURISTICS, ATTACKS, FORMATS = "verifier.ops", "verifier.heuristics", "verifier.attacks", "verifier.formats"
# What the groups hold, in words.
GROUPS = {OPS: "set of ops", HEURISTICS: "branching heuristic", ATTACKS: "attack", FORMATS: "format"}


@dataclass(frozen=True, order=True)
class Plugin:
    """One entry point of another package.

    Attributes:
        group: one of :data:`GROUPS`.
        name: what it is asked for by.
        distribution, version: of the package, as it was installed.
        target: what is imported, ``module`` or ``module:object``.
    """

    group: str
    name: str
    distribution: str
    version: str
    target: str

    def __str__(self) -> str:
        return f"{GROUPS.get(self.group, self.group)} '{self.name}' of package {self.distribution}"

    def entry(self) -> dict[str, str]:
        """As it stands in a record."""
        return {"group": self.group, "name": self.name, "package": self.distribution, "version": self.version}


# ---------------------------------------------------------------------------------------------------------- finding


@cache
def _installed(group: str) -> Mapping[str, Plugin]:
    """All plug-ins of a group by name; read once per process.

    Raises:
        ConfigError: two packages have the same name.
    """
    from importlib import metadata

    importlib.invalidate_caches()  # a folder may have come to be since this process looked at it
    found: dict[str, Plugin] = {}
    for point in metadata.entry_points(group=group):
        package, version = ("", "") if point.dist is None else (point.dist.name, point.dist.version)
        package, version = package or "unknown", version or "unknown"  # damaged ones have neither
        plugin = Plugin(group, point.name, package, version, point.value)
        other = found.setdefault(point.name, plugin)
        if other is not plugin:
            raise ConfigError(
                f"packages {other.distribution} and {package} both bring the {GROUPS.get(group, group)} "
                f"'{point.name}'; uninstall one of them"
            )
    return dict(sorted(found.items()))


def foreign(group: str, ours: Collection[str] = ()) -> Mapping[str, Plugin]:
    """What other packages add to a group, by name; none of it is imported.

    Args:
        ours: names that are taken.

    Raises:
        ConfigError: a package has a name of ours, or two have the same one.
    """
    found = _installed(group)
    for plugin in found.values():
        if plugin.name in ours:
            raise ConfigError(f"the {plugin} has the name of one of ours; it must take another")
    return found


def lookup(group: str, name: str, ours: Mapping[str, T], reserved: Collection[str] = ()) -> T:
    """What a name stands for: an entry of our table, at no cost, else a plug-in, which takes part from now on.

    Args:
        ours: the table.
        reserved: further names that plug-ins cannot have.

    Raises:
        ConfigError: nobody has the name (the message lists what there is), or the plug-in cannot be imported.
    """
    if name in ours:
        return ours[name]
    others = foreign(group, {*ours, *reserved})
    if name not in others:
        raise ConfigError(f"there is no {GROUPS[group]} '{name}'; there are {choices(ours, others)}")
    note(others[name])
    return load(others[name])


def choices(ours: Iterable[str], others: Mapping[str, Plugin]) -> str:
    """All names of a table, those of other packages with the package's name."""
    theirs = (f"{name} (package {plugin.distribution})" for name, plugin in others.items())
    return ", ".join((*ours, *theirs))


_loaded: list[Plugin] = []


@cache
def load(plugin: Plugin) -> Any:
    """Import what a plug-in names.

    Raises:
        ConfigError: that fails.
    """
    from importlib import metadata

    _loaded.append(plugin)
    try:
        return metadata.EntryPoint(plugin.name, plugin.target, plugin.group).load()
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the {plugin} ({plugin.target}) cannot be imported: {type(error).__name__}: {why}"
        ) from error


def united(what: str, ours: Collection[str], tables: Iterable[tuple[Plugin, Mapping[str, T]]]) -> dict[str, T]:
    """The tables of several plug-ins as one.

    Args:
        what: an entry of such a table, in words.
        ours: keys that are taken.

    Raises:
        ConfigError: a key is one of ours, or in two tables.
    """
    owner: dict[str, Plugin] = {}
    out: dict[str, T] = {}
    for plugin, table in tables:
        for key, value in table.items():
            if key in ours:
                raise ConfigError(f"the {plugin} brings the {what} '{key}', and so do we; it must leave it out")
            if key in owner:
                raise ConfigError(
                    f"the {owner[key]} and the {plugin} both bring the {what} '{key}'; uninstall one of them"
                )
            owner[key], out[key] = plugin, value
    return out


def installed_versions(groups: Iterable[str]) -> dict[str, str]:
    """Versions of all plug-ins of some groups, by what they are; equal on all ranks of a job."""
    return {str(plugin): plugin.version for group in groups for plugin in _installed(group).values()}


# ------------------------------------------------------------------------------------------------------- taking part

Told = Callable[[Sequence[Plugin]], object]

_listening: ContextVar[tuple[tuple[list[Plugin], Told], ...]] = ContextVar("_listening", default=())


@contextmanager
def noted(told: Told = len) -> Iterator[list[Plugin]]:
    """The plug-ins that are asked for inside, each once, in that order.

    Args:
        told: called with all of them so far whenever there are more.
    """
    found: list[Plugin] = []
    token = _listening.set((*_listening.get(), (found, told)))
    try:
        yield found
    finally:
        _listening.reset(token)


def note(*plugins: Plugin) -> None:
    """Plug-ins take part in what is going on."""
    for found, told in _listening.get():
        new = [plugin for plugin in dict.fromkeys(plugins) if plugin not in found]
        if new:
            found.extend(new)
            told(found)


def taking_part() -> tuple[Plugin, ...]:
    """The plug-ins noted so far by the outermost :func:`noted`, that of the query."""
    return tuple(next((found for found, _ in _listening.get()), ()))


# --------------------------------------------------------------------------------------------------------- failures


@contextmanager
def answerable(plugin: Plugin, what: str, refusals: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A plug-in's code runs inside; an exception that is no refusal becomes a sentence that names it.

    Args:
        what: what it is doing, in words.
        refusals: exceptions that pass besides those that this package raises on purpose.

    Raises:
        PluginFailed: with the exception as its cause.
    """
    try:
        yield
    except (VerifierError, MemoryError, *refusals):
        raise
    except Exception as error:
        raise _failed(plugin, what, error) from error


def blamed(error: Exception) -> Exception:
    """The exception itself, or a :class:`PluginFailed` with it as its cause when it came out of a plug-in's code.

    That is code of a plug-in's package, or a method of an object whose class is from there.
    """
    if isinstance(error, VerifierError):
        return error
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        kind = type(frame.f_locals.get("self"))
        plugin = _owner(kind.__module__)
        where = f"{kind.__name__}.{frame.f_code.co_name}"
        if plugin is None:
            plugin, where = _owner(frame.f_globals.get("__name__", "")), frame.f_code.co_qualname
        if plugin is not None:
            found = _failed(plugin, where, error)
            found.__cause__ = error
            return found
    return error


def _failed(plugin: Plugin, what: str, error: Exception) -> PluginFailed:
    why = " ".join(str(error).split())[:200]
    return PluginFailed(f"the {plugin} failed in {what}: {type(error).__name__}{f': {why}' if why else ''}")


def _owner(module: str) -> Plugin | None:
    """The loaded plug-in that a module belongs to; of several of a package the one whose own module it is."""
    targets = {plugin.target.partition(":")[0]: plugin for plugin in _loaded}
    top = module.partition(".")[0]
    return targets.get(module) or next((p for target, p in targets.items() if target.partition(".")[0] == top), None)
