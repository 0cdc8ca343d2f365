"""What networks may consist of, from the tables themselves: ONNX operators, ATen functions, ops of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.plugins import OPS, foreign
from verifier.graph.op import AffineOp, Op
from verifier.ops.registry import OpSet, check_classes, op_set, our_classes, our_sets


@dataclass(frozen=True)
class Entry:
    """One thing that is supported.

    Attributes:
        detail: opsets of an operator, first sentence of an op's description.
        package: whose it is; empty for ours.
        bounded: whether it may depend on the network's input.
    """

    name: str
    detail: str = ""
    package: str = ""
    bounded: bool = True


def onnx_operators(others: Sequence[OpSet] = ()) -> list[Entry]:
    """The operators of the ONNX standard that are read, with the opsets in which they are, sorted by name.

    Args:
        others: sets of other packages.
    """
    from verifier.frontend.converters import CONSTANTS_ONLY, Foreign, since_versions
    from verifier.frontend.onnx_module import converter

    versions = since_versions()
    have: dict[str, set[int]] = {}
    for key, found in converter().registry.items():
        ours = key.domain == "" and not isinstance(found, Foreign)
        if ours and key.version in versions.get(key.operation_type, ()):
            have.setdefault(key.operation_type, set()).add(key.version)
    bounded = {name for s in our_sets() for name in s.converters} | (have.keys() - CONSTANTS_ONLY)
    entries = [Entry(name, opsets(sorted(versions[name]), found), "", name in bounded) for name, found in have.items()]
    for s in others:
        every = ((name, sorted(versions[name])) for name in s.converters)
        entries += [Entry(name, opsets(since, set(since)), s.plugin.distribution) for name, since in every]
    return sorted(entries, key=lambda e: e.name)


def opsets(since: Sequence[int], have: set[int]) -> str:
    """The opsets of an operator in words, such as ``7-12, 14 on``.

    Args:
        since: opsets at which its versions begin, ascending.
        have: those of them that are read.
    """
    parts: list[str] = []
    start: int | None = None
    for k, version in enumerate(since):
        if version in have and start is None:
            start = version
        ends = k + 1 == len(since) or since[k + 1] not in have
        if start is not None and ends:
            last = None if k + 1 == len(since) else since[k + 1] - 1
            parts.append(f"{start} on" if last is None else f"{start}" if last == start else f"{start}-{last}")
            start = None
    return ", ".join(parts)


def aten_functions(others: Sequence[OpSet] = ()) -> list[Entry]:
    """The functions that are translated when torch records them, sorted by name.

    Args:
        others: sets of other packages.
    """
    from verifier.frontend.lower import translators

    theirs = [Entry(name, package=s.plugin.distribution) for s in others for name in s.translators]
    return sorted([*map(Entry, translators()), *theirs], key=lambda e: e.name)


def graph_ops(others: Sequence[OpSet] = ()) -> list[Entry]:
    """The ops that graphs consist of and bounds are computed for: affine ones first, each sorted by name.

    Args:
        others: sets of other packages.
    """
    packages: dict[type[Op], str] = dict.fromkeys(our_classes(), "")
    packages |= {cls: s.plugin.distribution for s in others for cls in s.ops}
    ordered = sorted(packages, key=lambda cls: (not issubclass(cls, AffineOp), cls.__name__))
    return [Entry(cls.__name__, _first_sentence(cls), packages[cls]) for cls in ordered]


def usable_sets() -> tuple[list[OpSet], list[ConfigError]]:
    """The sets of other packages that can be used, and what is wrong with the others.

    Each is looked at with those before it: of two that share a name the first can be used.
    """
    from verifier.frontend.converters import check_converters
    from verifier.frontend.lower import check_translators
    from verifier.frontend.onnx_module import converter

    usable: list[OpSet] = []
    wrong: list[ConfigError] = []
    try:
        plugins = foreign(OPS, folders.OPS).values()
    except ConfigError as error:
        return [], [error]
    for plugin in plugins:
        try:
            found = op_set(plugin)
            check_classes([*usable, found])
            check_translators([*usable, found])
            check_converters(converter(), [*usable, found])
            usable.append(found)
        except ConfigError as error:
            wrong.append(error)
    return usable, wrong


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return next(_sentences(text), "")


def _sentences(text: str) -> Iterator[str]:
    head, dot, _ = text.partition(". ")
    yield head.removesuffix(".") + ("." if head or dot else "")
