"""``verifier ops``: what is supported, from the tables themselves, as text or as a page of the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verifier.core.errors import ConfigError
    from verifier.frontend.catalogue import Entry

_WIDTH = 100


def overview(markdown: bool) -> tuple[str, list[ConfigError]]:
    """All operators, functions and ops, with the names of other packages; and what is wrong with those left out."""
    from verifier.frontend import catalogue
    from verifier.report.record import versions

    others, wrong = catalogue.usable_sets()
    operators = catalogue.onnx_operators(others)
    made_with = {name: versions()[name] for name in ("onnx", "onnx2torch", "torch")}
    parts = (
        [entry for entry in operators if entry.bounded],
        [entry for entry in operators if not entry.bounded],
        catalogue.aten_functions(others),
        catalogue.graph_ops(others),
    )
    return _page(*parts, made_with) if markdown else _text(*parts), wrong


def _text(operators: Sequence[Entry], constants: Sequence[Entry], aten: Sequence[Entry], ops: Sequence[Entry]) -> str:
    width = max(len(entry.name) for entry in (*operators, *ops))
    lines = ["ONNX operators, and the opsets in which they are supported:", ""]
    lines += [f"  {entry.name:<{width}}  {entry.detail}{_whose(entry)}" for entry in operators]
    lines += ["", "ONNX operators of constants and shapes alone:", "", *_wrapped(constants)]
    lines += ["", "ATen functions (of torch modules):", "", *_wrapped(aten)]
    lines += ["", "Ops of the graph:", ""]
    lines += [f"  {entry.name:<{width}}  {entry.detail.replace('``', '')}{_whose(entry)}" for entry in ops]
    return "\n".join(lines) + "\n"


def _whose(entry: Entry) -> str:
    return f"  (package {entry.package})" if entry.package else ""


def _wrapped(entries: Sequence[Entry]) -> list[str]:
    names = ", ".join(f"{entry.name}{_whose(entry).replace('  ', ' ')}" for entry in entries)
    return textwrap.wrap(names, _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _page(
    operators: Sequence[Entry],
    constants: Sequence[Entry],
    aten: Sequence[Entry],
    ops: Sequence[Entry],
    made_with: dict[str, str | None],
) -> str:
    """docs/operators.md."""
    made = ", ".join(f"{name} {version}" for name, version in made_with.items())
    lines = [
        "# Operators",
        "",
        "`verifier ops` lists what networks may consist of; this page is what `verifier ops --markdown` prints",
        f"(made with {made}). [Other packages](extending.md) can add to each of the lists.",
        "",
        "`verifier inspect NETWORK.onnx` names the nodes of a network that are not supported. An operator may still be",
        "refused for values of its attributes that have no rule; the message says which.",
        "",
        "## ONNX operators",
        "",
        "Operators whose inputs may depend on the network's input, and the opsets in which they are supported:",
        "",
        *_table(("operator", "opsets"), operators),
        "",
        "Operators that are evaluated where they depend on constants and shapes alone:",
        "",
        *_names(constants),
        "",
        "## ATen functions",
        "",
        "Of a torch module these functions are translated, whatever calls in Python lead to them; others may be used",
        "on constants:",
        "",
        *_names(aten),
        "",
        "## Ops of the graph",
        "",
        "What networks are translated to, and bounds are computed for:",
        "",
        *_table(("op", "meaning"), ops),
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, str], entries: Sequence[Entry]) -> list[str]:
    rows = [f"| `{e.name}` | {_escaped(e.detail + _whose(e))} |" for e in entries]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *rows]


def _names(entries: Sequence[Entry]) -> list[str]:
    names = ", ".join(f"`{e.name}`{_whose(e).replace('  ', ' ')}" for e in entries)
    return textwrap.wrap(names, 120, break_on_hyphens=False, break_long_words=False)


def _escaped(text: str) -> str:
    """For a cell of a table; what docstrings mark as code stays code."""
    plain, *rest = text.split("``")
    marked = plain.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")
    return marked if not rest else f"{marked}`{rest[0]}`{_escaped('``'.join(rest[1:]))}"
