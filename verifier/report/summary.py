"""The table at the end of a run: per category how many instances ended how, and how long they took."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Truths = Mapping[tuple[str, str, str], str]

_COLUMNS = ("category", "instances", "solved", "sat", "unsat", "unknown", "timeout", "error", "median s", "total s")


def is_wrong(record: Mapping[str, Any], truth: str | None) -> bool:
    """A verdict that contradicts a known one."""
    return {record["verdict"], truth} == {"sat", "unsat"}


def summary_rows(records: Iterable[Mapping[str, Any]], truths: Truths) -> list[list[str]]:
    """One row per category and one for all; a column ``wrong`` when true verdicts are known.

    Args:
        records: with ``category``, ``verdict``, ``seconds.total``.
        truths: true verdicts by category, ONNX path and VNN-LIB path as in the records.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record.get("category", ""), []).append(record)
    everything = [record for group in groups.values() for record in group]
    rows = [_row(name, group, truths) for name, group in groups.items()]
    return [*rows, _row("all", everything, truths)] if len(groups) != 1 else rows


def _row(name: str, group: Sequence[Mapping[str, Any]], truths: Truths) -> list[str]:
    verdicts = [record["verdict"] for record in group]
    number = {verdict: verdicts.count(verdict) for verdict in ("sat", "unsat", "unknown", "timeout", "error")}
    times = [record["seconds"]["total"] for record in group]
    solved = [r["seconds"]["total"] for r in group if r["verdict"] in ("sat", "unsat")]
    cells = [name, str(len(group)), str(len(solved)), *(str(n) for n in number.values())]
    cells += [f"{statistics.median(solved):.2f}" if solved else "-", f"{sum(times):.1f}"]
    if truths:
        cells.append(str(sum(is_wrong(r, truths.get(_key(r))) for r in group)))
    return cells


def _key(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record.get("category", ""), record["onnx"]["path"], record["vnnlib"]["path"]


def summary_table(records: Iterable[Mapping[str, Any]], truths: Truths | None = None) -> str:
    """The rows as text with aligned columns; ``median s`` is over the solved instances."""
    header = [*_COLUMNS, *(["wrong"] if truths else [])]
    rows = [header, *summary_rows(records, truths or {})]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
