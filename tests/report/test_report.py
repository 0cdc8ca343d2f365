"""Result files, records, the live line, the table, bounds as text."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.config import Config
from verifier.core.errors import InputError
from verifier.core.inventory import Inventory, RowState, Usage
from verifier.report.bounds import bounds_record, fingerprint, hex_floats
from verifier.report.console import Console, count, progress_bar, status_line
from verifier.report.contents import Hashes
from verifier.report.files import write_atomic
from verifier.report.formats import result_text
from verifier.report.record import Asked, Outcome, plain, schema, to_json, verify_record, versions
from verifier.report.summary import summary_table

jsonschema = pytest.importorskip("jsonschema")


# ------------------------------------------------------------------------------------------------------------- files


def test_atomic_write_replaces_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.txt"
    write_atomic(path, "unknown\n")
    first = path.stat().st_ino
    write_atomic(path, "sat\nx\n")
    assert path.read_text() == "sat\nx\n"
    assert path.stat().st_ino != first  # a reader of the old file keeps the old text
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["r.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    write_atomic(path, "unsat\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "unsat\n"
    assert [p.name for p in tmp_path.iterdir()] == ["r.txt"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_atomic(tmp_path / "folder", "x")


def test_every_moment_of_writing_is_valid(tmp_path: Path) -> None:
    """A reader that looks all the time while a child rewrites the file sees whole texts only."""
    path = tmp_path / "r.txt"
    texts = [f"{word}\n" * 2000 for word in ("unknown", "unsat")]
    write_atomic(path, texts[0])
    pid = os.fork()
    if pid == 0:
        for i in range(200):
            write_atomic(path, texts[i % 2])
        os._exit(0)
    seen = 0
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        assert path.read_text() in texts
        seen += 1
    assert seen > 10


def test_result_text() -> None:
    assert result_text("unsat") == "unsat\n"
    assert result_text("sat", "((X_0 1.0)\n (Y_0 2.0))\n") == "sat\n((X_0 1.0)\n (Y_0 2.0))\n"


def test_sha256(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "f").write_bytes(data)
    assert Hashes().of(tmp_path / "f", network=False) == hashlib.sha256(data).hexdigest()
    assert Hashes().of(tmp_path / "f", network=True) == hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------------- records


def record(outcome: Outcome) -> dict:
    file = {"path": "a", "sha256": "0" * 64}
    config = Config().model_dump(mode="json")
    return verify_record(outcome, Asked(file, file, 10.0, config, versions()), 1.23456)


def inventory(rank: int) -> Inventory:
    usage = Usage()
    usage.note_coefficients(400)
    usage.note_rows(RowState(80, 20, 40, 1) + RowState(80, 20, 40, 1))
    usage.note_rows(RowState(100, 50, 50, 1))
    return Inventory(rank, 1000, usage, 5000, "tensors")


def test_an_inventory_keeps_the_largest_of_every_kind() -> None:
    entry = inventory(3).entry()
    assert entry["resident"] == {
        "weights": 1000, "A": 400, "slopes": 160, "gradients": 40, "optimizer": 80, "domains": 0,
    }  # fmt: skip
    assert (entry["rank"], entry["chunks"], entry["peak"], entry["peak_kind"]) == (3, 2, 5000, "tensors")


WITNESS = {"inputs": [0.5], "outputs": [1.0], "margin": 0.0, "case": 0}


PARITY = {"points": 17, "left_out": 0, "boxes": 1, "difference": 0.0, "tolerance": 1e-4, "dtype": "float32"}


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("sat", "found", "((X_0 0.5)\n (Y_0 1.0))", WITNESS),
        Outcome(
            "unsat",
            "proved",
            certified=True,
            statistics={"root": {"worst": 0.1}, "relu_split": {"domains": 4}, "parity": PARITY},
            memory={"ranks": [inventory(0).entry()]},
        ),
        Outcome("unknown", "left", statistics={"input_split": {"domains": 5}, "relu_split": {"domains": 4}}),
        Outcome("timeout", "late", statistics={"open": 3, "domains": 7}, notes=("fell back",)),
        Outcome("error", "broken", error={"kind": "X", "message": "broken"}, exit_code=1),
    ],
    ids=lambda outcome: outcome.verdict,
)
def test_records_follow_the_schema(outcome: Outcome) -> None:
    made = json.loads(to_json(record(outcome)))
    jsonschema.validate(made, schema("verify"))
    assert made["seconds"]["total"] == 1.235
    assert made["parity"] == (PARITY if outcome.verdict == "unsat" else None) and "parity" not in made["statistics"]
    assert made["domains"] == {"unsat": 4, "unknown": 9, "timeout": 7}.get(outcome.verdict)


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "maybe"},
        {"verdict": "sat"},
        {"witness": WITNESS},
        {"certified": "yes"},
        {"surprise": 1},
        {"schema_version": 2},
        {"seconds": {}},
        {"onnx": {"path": "a"}},
        {"onnx": {"path": "a", "sha256": "short"}},
        {"domains": -1},
    ],
    ids=str,
)
def test_the_schema_refuses(change: dict) -> None:
    made = json.loads(to_json(record(Outcome("unsat", "proved", certified=True))))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made, **change}, schema("verify"))


def test_schemas_are_schemas() -> None:
    for name in ("verify", "bounds"):
        jsonschema.Draft202012Validator.check_schema(schema(name))
    with pytest.raises(InputError, match="bounds, verify"):
        schema("other")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_any_value_becomes_strict_json(value: object) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads(to_json({"v": value}), parse_constant=refuse)


def test_plain_values() -> None:
    assert plain(np.float32(0.5)) == 0.5 and plain(np.int64(3)) == 3
    assert plain(math.inf) == "inf" and plain(np.float64("nan")) == "nan"
    assert plain((1, Path("x"))) == [1, "x"]
    assert plain(True) is True


# ----------------------------------------------------------------------------------------------------------- console


def test_status_line() -> None:
    figures = {"open": 1234, "done": 5_600_000, "worst": -0.01234, "rate": 25_000.0}
    line = status_line("search", figures, 12.4)
    assert line == "search | 12 s left | domains 1234 open, 5.6M done | worst bound -0.01234 | 25k/s"
    assert status_line("attack", {}, None) == "attack"
    assert status_line("attack", {"worst": None, "rate": None, "open": "?"}, -1.0) == "attack | 0 s left"


@given(st.floats(min_value=0, max_value=1e12))
def test_counts_are_short(value: float) -> None:
    assert len(count(value)) <= 8


def test_console_is_silent_unless_wanted() -> None:
    stream = io.StringIO()
    console = Console(stream, live=False, verbose=False, start=0.0, end=None)
    console.show("a", {"open": 1}, ["note"])
    console.line("x")
    console.close()
    assert stream.getvalue() == "" and not console.wanted


def shown(text: str) -> list[str]:
    """The lines that a terminal shows after all this."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_the_live_line_is_redrawn_below_what_stays() -> None:
    stream, now = io.StringIO(), time.monotonic()
    console = Console(stream, live=True, verbose=True, start=now - 5.0, end=now + 5.0)
    console.show("search", {"open": 1234}, [])
    for _ in range(2):
        *kept, live = shown(stream.getvalue())
        assert [line.split()[-1] for line in kept] == ["search", "look"][: len(kept)]
        assert live.endswith("search | 5 s left | domains 1234 open")
        assert 4 <= live[:12].count("#") <= 7  # half of the limit has passed
        console.show("search", {"open": 1234}, ["look"])
    console.close()
    assert shown(stream.getvalue())[-1] == ""


def test_a_bar_starts_no_thread() -> None:
    """The process of a bar forks."""
    before = threading.enumerate()
    bar = progress_bar(io.StringIO(), 10, "{bar:12} {n_fmt}", 3)
    bar.update()
    assert bar.n == 4 and threading.enumerate() == before
    bar.close()


def test_console_live_and_verbose() -> None:
    live = io.StringIO()
    console = Console(live, live=True, verbose=False, start=0.0, end=None)
    console.show("a", {"open": 1}, ["look"])
    console.show("b", {"open": 2}, ["look"])
    console.close()
    assert live.getvalue().count("note: look") == 1
    assert shown(live.getvalue()) == ["note: look", ""]
    verbose = io.StringIO()
    console = Console(verbose, live=False, verbose=True, start=0.0, end=None)
    for phase in ("a", "a", "b"):
        console.show(phase, {}, [])
    assert [line.split()[-1] for line in verbose.getvalue().splitlines()] == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------- table


def row(category: str, verdict: str, seconds: float, name: str = "n") -> dict:
    return {
        "category": category,
        "verdict": verdict,
        "seconds": {"total": seconds},
        "onnx": {"path": name},
        "vnnlib": {"path": "p"},
    }


def test_table() -> None:
    rows = [row("a", "sat", 1.0), row("a", "unsat", 3.0), row("a", "timeout", 60.0), row("b", "unknown", 2.0, "m")]
    text = summary_table(rows).splitlines()
    assert text[2].split() == ["a", "3", "2", "1", "1", "0", "1", "0", "2.00", "64.0"]
    assert text[3].split() == ["b", "1", "0", "0", "0", "1", "0", "0", "-", "2.0"]
    assert text[4].split() == ["all", "4", "2", "1", "1", "1", "1", "0", "2.00", "66.0"]
    assert len({len(line) for line in text}) == 1
    judged = summary_table(rows[:1], {("a", "n", "p"): "unsat"}).splitlines()
    assert judged[0].split()[-1] == "wrong" and judged[2].split()[-1] == "1"
    assert summary_table([]).splitlines()[2].split()[:3] == ["all", "0", "0"]


# ------------------------------------------------------------------------------------------------------------ bounds


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_hex_round_trips(values: list[float]) -> None:
    back = [
        math.inf if t == "inf" else -math.inf if t == "-inf" else float.fromhex(t)
        for t in hex_floats(np.array(values), 0.0)
    ]
    assert back == values


def test_nan_says_nothing() -> None:
    assert hex_floats(np.array([np.nan]), -math.inf) == ["-inf"]
    assert hex_floats(np.array([np.nan]), math.inf) == ["inf"]


def test_bounds_record_follows_the_schema() -> None:
    pair = np.array([[-1.5, -np.inf]], dtype=np.float32), np.array([[np.nan, 0.1]], dtype=np.float32)
    file = {"path": "a", "sha256": "0" * 64}
    head = {
        "onnx": file,
        "vnnlib": file,
        "case": 0,
        "method": "crown",
        "seed": 0,
        "device": "cpu",
        "config": {},
        "versions": versions(),
        "seconds": {"total": 0.5},
    }
    ranks = [inventory(rank).entry() for rank in range(2)]
    made = bounds_record({"y": pair}, {"y": pair}, {"z.alpha": np.ones((2, 3))}, ranks, head)
    jsonschema.validate(json.loads(to_json(made)), schema("bounds"))
    assert made["bounds"]["y"] == {"lower": ["-0x1.8000000000000p+0", "-inf"], "upper": ["inf", "0x1.99999a0000000p-4"]}
    jsonschema.validate({**json.loads(to_json(made)), "certified": {}}, schema("bounds"))
    for break_it in (
        lambda r: r["bounds"]["y"]["lower"].__setitem__(0, "-1.5"),
        lambda r: r["memory"]["ranks"][1].pop("peak_kind"),
        lambda r: r["memory"]["ranks"][0].update(peak=None),
        lambda r: r["memory"]["ranks"][0]["resident"].pop("A"),
        lambda r: r["memory"].update(ranks=[]),
    ):
        broken = json.loads(to_json(made))
        break_it(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema("bounds"))


def test_fingerprint_depends_on_values_and_shape() -> None:
    a = np.arange(6, dtype=np.float32)
    assert fingerprint(a) == fingerprint(a.astype(np.float64))
    assert fingerprint(a) != fingerprint(a.reshape(2, 3))
    assert fingerprint(a)["sha256"] == fingerprint(a.reshape(2, 3))["sha256"]
    assert fingerprint(a.reshape(2, 3).T)["sha256"] == fingerprint(np.ascontiguousarray(a.reshape(2, 3).T))["sha256"]
    assert fingerprint(a)["sha256"] != fingerprint(a + 1)["sha256"]


def test_names_that_are_no_text_can_be_written() -> None:
    """File names that are no UTF-8 are lone surrogates in Python."""
    text = to_json({"path": "d\udcff/a.onnx", "k\udc80": 1})
    assert text.encode() and json.loads(text) == {"path": "d\\udcff/a.onnx", "k\\udc80": 1}
