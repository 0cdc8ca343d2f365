"""``verifier run``: records, resuming, several at a time, limits, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.cli.helpers import environment, no_process_mentions, run, start
from tests.support.mounts import fill, small_disk
from verifier.cli.ledger import Ledger, Wanted
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
    failed = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    for line, number in zip(failed, (3, 4, 5, 6), strict=True):
        assert f"./n.onnx, ./p{number}.vnnlib: " in line
    assert "killed (signal 9)" in failed[1]
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
    os.utime(tmp_path / "cat" / "p0.vnnlib")  # the same bytes: must not be run again
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


def verdicts_and_limits(path: Path) -> list[tuple[int, str, float]]:
    """Number, verdict and limit of every record."""
    return sorted((r["instance"], r["verdict"], r["timeout"]) for r in records(path))


def test_resume_repeats_what_other_files_were_read_for(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "unsat", "sat"])
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    kept = out.read_text().splitlines()[1]
    (tmp_path / "cat" / "p0.vnnlib").write_text("sat")
    (tmp_path / "cat" / "p2.vnnlib").unlink()
    done = run("run", path, "--out", out, "--resume")
    assert "repeated: 2 (files changed)" in done.stderr
    assert [(n, v) for n, v, _ in verdicts_and_limits(out)] == [(0, "sat"), (1, "unsat"), (2, "error")]
    assert kept in out.read_text().splitlines()
    (tmp_path / "cat" / "n.onnx").write_bytes(b"another network")
    assert "repeated: 3 (files changed)" in run("run", path, "--out", out, "--resume").stderr
    assert len(records(out)) == 3


def test_resume_sees_external_data(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    info = [helper.make_tensor_value_info(name, 1, [2]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones(2, np.float32), "w")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", info[:1], info[1:], [weight])
    onnx.save_model(
        helper.make_model(graph), tmp_path / "cat" / "n.onnx", save_as_external_data=True, location="w.bin",
        size_threshold=0,
    )  # fmt: skip
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    assert run("run", path, "--out", out, "--resume").stderr == ""
    (tmp_path / "cat" / "w.bin").write_bytes(np.full(2, 3, np.float32).tobytes())
    assert "repeated: 1 (files changed)" in run("run", path, "--out", out, "--resume").stderr


def test_a_decided_verdict_stays_whatever_limit_and_settings(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "sat", "unknown", "unsupported"])
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    assert run("run", path, "--out", out, "--resume").stderr == ""
    done = run("run", path, "--out", out, "--resume", "--timeout", 10)
    assert "repeated: 2 (another limit)" in done.stderr
    expected = [(0, "unsat", 20.0), (1, "sat", 20.0), (2, "unknown", 10.0), (3, "error", 10.0)]
    assert verdicts_and_limits(out) == expected
    done = run("run", path, "--out", out, "--resume", "--timeout", 10, "--seed", 1)
    assert "repeated: 2 (other settings)" in done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for record in lines:
        record["versions"]["torch"] = "0.1"
    out.write_text("".join(json.dumps(record) + "\n" for record in lines))
    done = run("run", path, "--out", out, "--resume", "--timeout", 10, "--seed", 1)
    assert "repeated: 2 (other versions)" in done.stderr
    assert verdicts_and_limits(out) == expected


def test_a_verdict_does_not_stay_when_certification_changes(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    done = run("run", path, "--out", out, "--resume", "--set", "numerics.certify=false")
    assert "repeated: 1 (certification or semantics changed)" in done.stderr


def test_semantics_count_where_a_record_has_them(tmp_path: Path) -> None:
    """A record without the setting speaks of the real-valued network."""
    path = make_list(tmp_path / "cat", ["unsat"])
    run("run", path, "--out", tmp_path / "o.jsonl")
    (record,) = records(tmp_path / "o.jsonl")
    hashes = record["onnx"]["sha256"], record["vnnlib"]["sha256"]

    def why(semantics: str | None, now: str | None, **changes: Any) -> str | None:
        configs = [{**record["config"], "numerics": dict(record["config"]["numerics"])} for _ in range(2)]
        for config, value in zip(configs, (semantics, now), strict=True):
            config["numerics"].pop("semantics", None)
            if value is not None:
                config["numerics"]["semantics"] = value
        made = {**record, "config": configs[0], **changes}
        return Wanted(hashes, 20.0, configs[1], record["versions"]).why_not(made)

    assert why(None, None) is None and why(None, "real") is None and why("float32", "float32") is None
    assert why(None, "float32") == why("real", "float32") == why("float32", None) != None  # noqa: E711
    assert why(None, None, certified=not record["certified"]) == why("real", "float32")
    assert why(None, None, verdict="sat", certified=False) is None


def test_killed_workers_are_repeated(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["kill", "segv", "unsat"])
    out = tmp_path / "o.jsonl"
    run("run", path, "--out", out)
    assert records(out)[0]["reason"].startswith("killed (signal 9) during")
    done = run("run", path, "--out", out, "--resume")
    assert "repeated: 2 (a process was lost)" in done.stderr
    assert len(records(out)) == 3


@pytest.mark.parametrize(
    ("options", "repeated"),
    [
        (["--retry", "unknown"], {2}),
        (["--retry", "unknown,error"], {2, 3}),
        (["--resume", "--retry", "timeout"], set()),
        (["--fresh"], {0, 1, 2, 3}),
    ],
)
def test_what_is_repeated_on_demand(options: list[str], repeated: set[int], tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "sat", "unknown", "unsupported"])
    other = make_list(tmp_path / "other", ["unsat"])
    out = tmp_path / "o.jsonl"
    run("run", path, other, "--out", out)
    marked = [{**r, "seconds": {**r["seconds"], "total": 1234.5}} for r in records(out)]
    out.write_text("".join(json.dumps(record) + "\n" for record in marked))
    assert run("run", path, "--out", out, *options).returncode == 0
    after = records(out)
    assert len(after) == 5
    again = {(r["category"], r["instance"]) for r in after if r["seconds"]["total"] != 1234.5}
    assert again == {("cat", number) for number in repeated}


@pytest.mark.parametrize("words", ["sat", "unknown,maybe", ",", ""])
def test_what_cannot_be_repeated(words: str, tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    done = run("run", path, "--out", tmp_path / "o.jsonl", "--retry", words)
    assert done.returncode == 2 and "unknown,error,timeout" in done.stderr


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat", "phase x sleep 30 unsat"])
    out = tmp_path / "o.jsonl"
    first = start("run", path, "--out", out)
    deadline = time.monotonic() + 20
    while not (out.exists() and out.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for option in ("--resume", "--fresh"):
        second = run("run", path, "--out", out, option)
        assert second.returncode == 2 and f"another run writes to {out}" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=10)
    (tmp_path / "cat" / "p1.vnnlib").write_text("sat")
    assert run("run", path, "--out", out, "--resume").returncode == 0  # the lock ends with its process
    assert [r["verdict"] for r in records(out)] == ["unsat", "sat"]


def test_a_run_that_came_later_locks_the_file_that_is_there_now(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with Ledger(out) as ledger:
        ledger.append({"a": 1})
        ledger.keep([{"b": 2}])
        code = f"from pathlib import Path\nfrom verifier.cli.ledger import Ledger\nLedger(Path({str(out)!r}))"
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
        assert "another run writes to" in done.stderr
        ledger.append({"c": 3})
    assert records(out) == [{"b": 2}, {"c": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_records_on_a_full_disk_are_one_sentence(tmp_path: Path) -> None:
    path = make_list(tmp_path / "cat", ["unsat"])
    for out in (Path("/dev/full"), None):
        with ExitStack() as stack:
            if out is None:
                out = stack.enter_context(small_disk(tmp_path / "disk", size="64k")) / "o.jsonl"
                out.touch()
                fill(out.parent)
            done = run("run", path, "--out", out)
            assert done.returncode == 2
            assert done.stderr == f"Error: cannot write {out}: No space left on device\n"
    assert no_process_mentions(str(tmp_path))


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
