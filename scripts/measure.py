"""What measuring scripts share: processes and their times, categories of VNN-COMP, lines of JSON, tables.

Nothing here imports torch; rates of the device and counted work are in ``roofline``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
COMPETITION = ROOT / "vnncomp_scripts"
SOLVED = ("sat", "unsat")

Row = Sequence[str]
Record = Mapping[str, Any]
Known = Mapping[tuple[str, str], str]


# ---------------------------------------------------------------------------------------------------------- processes


class Failed(Exception):
    """A command did not do what is measured."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit status; None when it took too long and was ended.
        seconds: from before its start to its end.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def complaint(self) -> str:
        """The last line of stderr, or else the exit status."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else f"exit status {self.code}"


def environment(variables: Mapping[str, str] | None = None, tree: Path = ROOT) -> dict[str, str]:
    """This process's variables and some more; what it starts runs the code of a tree with its interpreter."""
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {"PYTHONPATH": path, "VERIFIER_PYTHON": sys.executable, "ORT_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **(variables or {}), **ours}


def verifier(*words: str | Path, settings: Iterable[str] = ()) -> list[str]:
    """A command line of the verifier; settings are ``KEY=VALUE``."""
    return [sys.executable, "-m", "verifier", *map(str, words), *(w for s in settings for w in ("--set", s))]


def call(
    words: Sequence[str | Path], variables: Mapping[str, str], timeout: float | None = None, cwd: Path | None = None
) -> Ended:
    """Run a command to its end; one that takes longer than its limit is ended with all that it started.

    Args:
        variables: its whole environment.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [*map(str, words)],
        env=dict(variables),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=timeout is not None,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Ended(None, "", f"no end after {timeout:g} s", time.monotonic() - began)
    finally:
        if process.poll() is None:
            if timeout is None:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Ended(process.returncode, out, err, time.monotonic() - began)


def remarks(command: Sequence[str | Path], variables: Mapping[str, str]) -> tuple[float, str]:
    """Wall time of a command that must succeed, and what it remarked."""
    done = call(command, variables)
    if done.code:
        raise Failed(f"{' '.join(map(str, command))}: exit code {done.code}: {done.err.strip()}")
    return done.seconds, done.err.strip()


def seconds(command: Sequence[str | Path], variables: Mapping[str, str], silent: bool = True) -> float:
    """Wall time of a command that must succeed and, where ``silent``, have nothing to remark."""
    spent, said = remarks(command, variables)
    if silent and said:
        raise Failed(f"{' '.join(map(str, command))}: {said}")
    return spent


# --------------------------------------------------------------------------------------------- categories of VNN-COMP


@dataclass(frozen=True)
class Query:
    """A query as the competition names it."""

    category: str
    onnx: Path
    vnnlib: Path

    @property
    def title(self) -> str:
        return f"{self.category} {self.onnx.stem} {self.vnnlib.stem}"


@dataclass(frozen=True)
class Selection:
    """Which instances of a category are taken: those whose network's file name has ``part`` in it."""

    category: str
    part: str = ""

    @classmethod
    def parse(cls, text: str) -> Selection:
        """From CATEGORY or CATEGORY:PART."""
        category, _, part = text.strip().partition(":")
        return cls(category, part)

    @property
    def title(self) -> str:
        return f"{self.category} {self.part}".strip()


def selections(parser: argparse.ArgumentParser, sample: Path, text: str) -> list[Selection]:
    """From a list with commas; a category that is not there is an error of the command line."""
    found = [Selection.parse(part) for part in text.split(",")]
    for selection in found:
        if not (sample / selection.category / "instances.csv").is_file():
            parser.error(f"{sample / selection.category} has no instances.csv")
    return found


def selected(sample: Path, selection: Selection, limit: int | None = None) -> list[list[str]]:
    """Rows (onnx, vnnlib, timeout) with absolute paths; with ``limit`` evenly spread over the list."""
    folder = sample / selection.category
    with (folder / "instances.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and selection.part in Path(row[0]).name]
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [[str((folder / r[0]).resolve()), str((folder / r[1]).resolve()), r[2]] for r in rows]


def truths(sample: Path) -> dict[tuple[str, str], str]:
    """Known verdicts by absolute paths; empty without a ``verdicts.csv``."""
    path = sample / "verdicts.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (str((sample / row["onnx"]).resolve()), str((sample / row["vnnlib"]).resolve())): row["verdict"]
            for row in csv.DictReader(file)
        }


def key_of(record: Record) -> tuple[str, str]:
    """The paths of a record, by which verdicts are known."""
    return record["onnx"]["path"], record["vnnlib"]["path"]


def name_of(onnx: str, vnnlib: str) -> str:
    """The file names."""
    return f"{Path(onnx).name} {Path(vnnlib).name}"


def contradict(*verdicts: str) -> bool:
    """Whether both answers are among these."""
    return set(SOLVED) <= set(verdicts)


def answered(rows: Sequence[Row], listed: Path, records: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """Answer rows with ``verifier run``, going on where it stopped; the newest record of each.

    Args:
        listed: the file that the rows are written to; the name of its folder says the category.
        records: the file of records.
    """
    write_rows(listed, rows)
    command = verifier("run", listed, "--out", records, "--resume", *options)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    newest = {key_of(r): r for r in read_lines(records)}
    return [newest[row[0], row[1]] for row in rows if (row[0], row[1]) in newest]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A list of instances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


# ------------------------------------------------------------------------------------------------------ lines of JSON


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, none when it is missing; a line that was cut off is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found


def append_line(path: Path, record: Record) -> None:
    """One more line, apart from one before it that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


# ------------------------------------------------------------------------------------------------- options and tables


def parser_of(text: str | None, sample: bool = True) -> argparse.ArgumentParser:
    """A command line that shows a module's docstring; SAMPLE is its first argument unless left out."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sample:
        parser.add_argument("sample", type=Path, help="folder of category folders")
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--set KEY=VALUE``, kept as ``settings``."""
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(map(table_row, lines))


def table_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits and without an exponent up to ten million; a dash for what is not there."""
    if value is None:
        return "-"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e7 else text


def put_section(text: str, name: str, body: str) -> str:
    """A document with the body between the markers of a name; a name that is new comes after the other sections.

    Raises:
        ValueError: the document has neither the name's markers nor the one that ends the sections.
    """
    begin, end, last = f"<!-- begin: {name} -->", f"<!-- end: {name} -->", "<!-- end of sections -->"
    section = f"{begin}\n{body.strip()}\n{end}"
    before, found, rest = text.partition(begin)
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"the section of {name} does not end; put '{end}' after it")
        return before + section + after
    if last not in text:
        raise ValueError(f"there is no place for the section of {name}; put '{last}' where sections end")
    return text.replace(last, f"{section}\n\n{last}")
