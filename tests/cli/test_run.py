"""``verifier run``: records, resuming, several at a time, limits, the table."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import no_process_mentions, run, start
from verifier.report.record import schema

jsonschema = pytest.importorskip("jsonschema")


def make_list(folder: Path, scripts: list[str], limit: float = 20) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for number, words in enumerate(scripts):
        (folder / f"p{number}.vnnlib").write_text(words)
        lines.append(f"./n.onnx,./p{number}.vnnlib,{limit}")
    (folder / "n.onnx").write_bytes(b"")
    path = folder / "instances.csv"
    path.write_text("\r\n".join(lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_and_table(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["sat", "unsat", "unknown", "crash", "kill", "unsupported", "segv"])
    done = run("run", path, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = records(tmp_path / "o.jsonl")
    assert [r["verdict"] for r in found] == ["sat", "unsat", "unknown", "error", "error", "error", "error"]
    for number, record in enumerate(found):
        jsonschema.validate(record, schema("verify"))
        assert (record["category"], record["instance"]) == ("cat", number)
    header, _, row = done.stdout.splitlines()
    cells = dict(
        zip(header.replace("median s", "median").replace("total s", "total").split(), row.split(), strict=True)
    )
    assert (cells["category"], cells["instances"], cells["solved"]) == ("cat", "7", "2")
    assert (cells["sat"], cells["unsat"], cells["unknown"], cells["error"]) == ("1", "1", "1", "4")


@pytest.mark.timing
def test_limits_cap_and_processes(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["phase x sleep 60", "spin 60", "wait", "unsat"], limit=30)
    began = time.monotonic()
    done = run("run", path, "--out", tmp_path / "o.jsonl", "--timeout", 1)
    assert time.monotonic() - began < 6
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "o.jsonl")
    assert [r["verdict"] for r in found] == ["timeout", "timeout", "timeout", "unsat"]
    assert all(r["timeout"] == 1 and r["seconds"]["total"] < 1.1 for r in found)
    assert no_process_mentions(str(tmp_path))


@pytest.mark.timing
def test_jobs_run_side_by_side(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["sleep 1 unsat"] * 4)
    began = time.monotonic()
    run("run", path, "--out", tmp_path / "o.jsonl", "--jobs", 4)
    assert time.monotonic() - began < 3.5
    found = records(tmp_path / "o.jsonl")
    assert sorted(r["instance"] for r in found) == [0, 1, 2, 3]
    assert {r["verdict"] for r in found} == {"unsat"}
    assert {r["config"]["threads"] for r in found} == {"auto"}


def test_resume_skips_what_is_there_and_mends_a_torn_line(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "sat", "unknown"])
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    whole = out.read_text().splitlines(keepends=True)
    out.write_text(whole[0] + whole[1][: len(whole[1]) // 2])
    (tmp_path / "cat" / "p0.vnnlib").write_text("crash")  # must not be run again
    done = run("run", path, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith(whole[0])
    assert [r["verdict"] for r in records(out)] == ["unsat", "sat", "unknown"]
    again = run("run", path, "--out", out, "--resume")
    assert again.stdout.splitlines()[2].split()[1] == "3"
    assert len(records(out)) == 3


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    out = tmp_path / "o.jsonl"
    out.write_text("precious\n")
    done = run("run", path, "--out", out)
    assert done.returncode == 2 and "--resume" in done.stderr
    resumed = run("run", path, "--out", out, "--resume")
    assert resumed.returncode == 2 and "o.jsonl:1" in resumed.stderr
    assert out.read_text() == "precious\n"


def test_resume_refuses_another_configuration(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    run("run", path, "--out", tmp_path / "o.jsonl")
    done = run("run", path, "--out", tmp_path / "o.jsonl", "--resume", "--seed", 1)
    assert done.returncode == 2 and "another configuration" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_resume_goes_on(number: int, tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "phase x sleep 30 unsat", "sat"])
    out = tmp_path / "o.jsonl"
    process = start("run", path, "--out", out)
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "instances" in stdout
    assert [r["verdict"] for r in records(out)] == ["unsat"]
    (tmp_path / "cat" / "p1.vnnlib").write_text("unsat")
    run("run", path, "--out", out, "--resume")
    assert [r["verdict"] for r in records(out)] == ["unsat", "unsat", "sat"]


def test_kill_leaves_whole_lines_and_no_workers(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "phase x sleep 30 unsat"])
    out = tmp_path / "o.jsonl"
    process = start("run", path, "--out", out)
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert len(records(out)) == 1
    deadline = time.monotonic() + 5
    while not no_process_mentions(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert no_process_mentions(str(tmp_path))


def test_missing_files_are_records_and_gz_is_found(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "unsat"])
    (tmp_path / "cat" / "p0.vnnlib").unlink()
    (tmp_path / "cat" / "p1.vnnlib").rename(tmp_path / "cat" / "p1.vnnlib.gz")
    done = run("run", path, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 0
    found = records(tmp_path / "o.jsonl")
    assert [r["verdict"] for r in found] == ["error", "unsat"]
    assert "p0.vnnlib" in found[0]["reason"]
    for record in found:
        jsonschema.validate(record, schema("verify"))


def test_wrong_answers_are_counted_per_category(tmp_path: Path) -> None:
    first, second = make_list(tmp_path / "a", ["sat", "unsat"]), make_list(tmp_path / "b", ["unsat"])
    truths = tmp_path / "verdicts.csv"
    lines = ["a,a/n.onnx,a/p0.vnnlib,unsat", "a,a/n.onnx,a/p1.vnnlib,unsat", "b,b/n.onnx,b/p0.vnnlib,unsat"]
    truths.write_text("\n".join(["category,onnx,vnnlib,verdict", *lines]) + "\n")
    done = run("run", first, second, "--out", tmp_path / "o.jsonl", "--verdicts", truths)
    header, _, a, b, everything = done.stdout.splitlines()
    assert header.split()[-1] == "wrong"
    assert [row.split()[-1] for row in (a, b, everything)] == ["1", "0", "1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no instances"),
        ("a.onnx,b.vnnlib\n", ":1: expected onnx,vnnlib,timeout"),
        ("a.onnx,b.vnnlib,5\na.onnx,b.vnnlib,soon\n", ":2: a time limit"),
        ("a.onnx,b.vnnlib,-1\n", ":1: a time limit"),
        ("a.onnx,,5\n", ":1: expected"),
        (b"\xff\xff", "not UTF-8"),
    ],
)
def test_malformed_lists(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "instances.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("run", path, "--out", tmp_path / "o.jsonl")
    assert done.returncode == 2
    assert words in done.stderr and str(path) in done.stderr
    assert not (tmp_path / "o.jsonl").exists()
