"""What networks may consist of, from the tables themselves: ONNX operators, ATen functions, ops of the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from verifier.graph.op import AffineOp, Op
from verifier.ops.registry import op_sets, our_classes

# Operators that are evaluated where they depend on constants or shapes alone: nothing bounds them.
CONSTANTS_ONLY = frozenset(
    [
        *("Acos", "ArgMax", "ArgMin", "Asin", "Atan", "Constant", "ConstantOfShape", "CumSum", "Equal", "EyeLike"),
        *("IsInf", "IsNaN", "Mod", "NonZero", "OneHot", "Range", "ReduceLogSumExp", "ReduceProd", "Shape", "Size"),
        *("Tan", "TopK", "Xor"),
    ]
)


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


def onnx_operators() -> list[Entry]:
    """The operators of the ONNX standard that are read, with the opsets in which they are, sorted by name.

    Raises:
        ConfigError: a converter of another package cannot be used.
    """
    from verifier.frontend.converters import Foreign, since_versions
    from verifier.frontend.onnx_module import extended

    versions, registry = since_versions(), extended().registry
    have: dict[str, dict[int, str]] = {}
    for key, converter in registry.items():
        if key.domain == "" and key.version in versions.get(key.operation_type, ()):
            package = converter.plugin.distribution if isinstance(converter, Foreign) else ""
            have.setdefault(key.operation_type, {})[key.version] = package
    return [
        Entry(name, opsets(sorted(versions[name]), set(found)), next(iter(found.values())), name not in CONSTANTS_ONLY)
        for name, found in sorted(have.items())
    ]


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


def aten_functions() -> list[Entry]:
    """The functions that are translated when torch records them, sorted by name.

    Raises:
        ConfigError: a translator of another package cannot be used.
    """
    from verifier.frontend.lower import foreign_translators, translators

    theirs = [Entry(name, package=plugin.distribution) for name, (plugin, _) in foreign_translators().items()]
    return sorted([*map(Entry, translators()), *theirs], key=lambda e: e.name)


def graph_ops() -> list[Entry]:
    """The ops that graphs consist of and bounds are computed for: affine ones first, each sorted by name."""
    packages: dict[type[Op], str] = dict.fromkeys(our_classes(), "")
    packages |= {cls: found.plugin.distribution for found in op_sets() for cls in found.ops}
    ordered = sorted(packages, key=lambda cls: (not issubclass(cls, AffineOp), cls.__name__))
    return [Entry(cls.__name__, _first_sentence(cls), packages[cls]) for cls in ordered]


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return next(_sentences(text), "")


def _sentences(text: str) -> Iterator[str]:
    head, dot, _ = text.partition(". ")
    yield head.removesuffix(".") + ("." if head or dot else "")
