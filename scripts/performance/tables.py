"""The tables of docs/performance.md: their columns, and the section of one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.measure import figure, put_section, table
from scripts.performance.root import REACHED

MIB = 1 << 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """How a part is shown: a title, and columns with what they show of a row."""

    title: str
    columns: Mapping[str, Callable[[Row], str]]

    def render(self, rows: Sequence[Row]) -> str:
        return table(list(self.columns), [[show(row) for show in self.columns.values()] for row in rows])


def _rate(row: Row) -> str:
    return figure(row["children_per_s"]) if row["seconds"] else "-"


def _share(row: Row) -> str:
    return f"{100 * row['children_per_s'] / row['roofline_per_s']:.0f} %" if row["seconds"] else "-"


_CHILDREN: Mapping[str, Callable[[Row], str]] = {
    "instance": lambda r: r["instance"],
    "children/s": _rate,
    "roofline/s": lambda r: figure(r["roofline_per_s"]),
    "of it": _share,
    "MFLOP a child": lambda r: figure(r["mflop_per_child"]),
    "MB a child": lambda r: figure(r["mbyte_per_child"]),
    "mean bound": lambda r: figure(r["mean_bound"], 4),
    "steps": lambda r: str(r["steps"]),
    "batch": lambda r: str(r["batch"]),
    "columns": lambda r: str(r["columns"]),
}


def _seconds(method: str) -> dict[str, Callable[[Row], str]]:
    work: Callable[[Row], Mapping[str, float]] = lambda r: r[method]["work"]  # noqa: E731
    return {
        "instance": lambda r: r["instance"],
        "rows": lambda r: str(r["rows"]),
        "cold s": lambda r: figure(r[method]["cold"]),
        "warm s": lambda r: figure(r[method]["warm"]),
        "products s": lambda r: figure(r[method]["products"]),
        "roofline s": lambda r: figure(r[method]["roofline"]),
        "of it": lambda r: f"{100 * r[method]['roofline'] / r[method]['warm']:.0f} %",
        "GFLOP": lambda r: figure(work(r)["flops"] / 1e9),
        "GFLOP float64": lambda r: figure(work(r)["flops64"] / 1e9),
        "GB": lambda r: figure(work(r)["bytes"] / 1e9),
        "bound": lambda r: figure(r[method]["bound"], 5),
    }


def _gain(row: Row) -> str:
    """The part of the reference's gain over CROWN that the default schedule has."""
    whole = row["reference"]["bound"] - row["crown"]["bound"]
    return f"{100 * (row['alpha']['bound'] - row['crown']['bound']) / whole:.1f} %" if whole > 0 else "-"


TABLES: Mapping[str, Sequence[Table]] = {
    "search": [Table("Search", {**_CHILDREN, "closed": lambda r: str(r["statistics"].get("closed", "-"))})],
    "bound": [Table("The bound step alone", _CHILDREN)],
    "root": [
        Table("Root: CROWN", _seconds("crown")),
        Table(
            "Root: alpha-CROWN of the rows, after CROWN",
            {
                **_seconds("alpha"),
                "steps": lambda r: str(r["steps"]),
                "reference s": lambda r: figure(r["reference"]["seconds"]),
                "reference bound": lambda r: figure(r["reference"]["bound"], 5),
                "of its gain": _gain,
                f"s to {REACHED:.0%}": lambda r: figure(r["reached"]),
            },
        ),
    ],
    "modes": [
        Table(
            "Root: slopes of the rows alone, layerwise, or joint",
            {
                "instance": lambda r: r["instance"],
                "mode": lambda r: r["mode"],
                "steps": lambda r: str(r["steps"] or "-"),
                "s": lambda r: figure(r["seconds"]),
                "mean bound": lambda r: figure(r["bound"], 5),
            },
        )
    ],
    "start": [
        Table(
            "Start",
            {
                "what": lambda r: r["command"],
                "median s": lambda r: figure(r["median"]),
                "least": lambda r: figure(r["least"]),
                "most": lambda r: figure(r["most"]),
                "of the imports": lambda r: f"{r['imports']:.2f}",
            },
        )
    ],
    "memory": [
        Table(
            "Memory",
            {
                "network": lambda r: r["network"],
                "method": lambda r: r["method"],
                "weights MiB": lambda r: figure(r["weights"] / MIB),
                "with casts MiB": lambda r: figure(r["resident"] / MIB),
                "budget MiB": lambda r: figure(r["budget"] / MIB),
                "peak MiB": lambda r: figure(r["peak"] / MIB),
                "peak / weights": lambda r: figure(r["peak"] / r["weights"]),
                "rest / budget": lambda r: f"{(r['peak'] - r['resident']) / r['budget']:.2f}",
                "counted by": lambda r: r["peak_kind"],
            },
        )
    ],
}


def render(device: str, parts: Mapping[str, Row]) -> str:
    """The section of one device."""
    lines = [f"### {device}"]
    for name, tables in TABLES.items():
        if name in parts:
            found = parts[name]
            for shown in tables:
                lines += ["", f"**{shown.title}**", "", shown.render(found["rows"])]
            lines += ["", f"`{found['command']}`; {found['rates']}; {found['circumstances']}."]
    return "\n".join(lines)


def write(results: Mapping[str, Mapping[str, Row]], page: Path) -> None:
    """Put the tables of the given devices into the document; others' sections stay."""
    text = page.read_text(encoding="utf-8")
    for device, parts in results.items():
        text = put_section(text, device, render(device, parts))
    page.write_text(text, encoding="utf-8")
