"""``verifier verify``: exit codes, streams, result file and record, with a scripted solver."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.cli.helpers import command, environment, no_process_mentions, run, script, start
from verifier.report.record import schema
from verifier.runtime.messages import Figures, WorkerMessage
from verifier.runtime.worker import PipeProgress

jsonschema = pytest.importorskip("jsonschema")


@pytest.mark.parametrize(
    ("words", "code", "stdout", "file"),
    [
        ("unsat", 0, "unsat\n", "unsat"),
        ("unknown", 0, "unknown\n", "unknown"),
        ("memory", 0, "unknown\n", "unknown"),
        ("kill", 1, "", "error"),
        ("mismatch", 1, "error\n", "error"),
        ("crash", 1, "", "error"),
        ("segv", 1, "", "error"),
        ("input", 2, "", "error"),
        ("unsupported", 3, "", "error"),
    ],
)
def test_exit_codes_and_streams(words: str, code: int, stdout: str, file: str, tmp_path: Path) -> None:
    results, record = tmp_path / "r.txt", tmp_path / "r.json"
    done = run("verify", *script(tmp_path, words), "--results-file", results, "--json", record)
    assert done.returncode == code, done.stderr
    assert done.stdout == stdout
    assert results.read_text() == file + "\n"
    data = json.loads(record.read_text())
    jsonschema.validate(data, schema("verify"))
    assert data["verdict"] == file
    if code == 0:
        assert done.stderr == ""  # silent in a pipe
    else:
        assert re.fullmatch(r"Error: .*\n", done.stderr)
        assert data["error"] is None or data["error"]["message"] in done.stderr


def test_sat_with_witness(tmp_path: Path) -> None:
    results, record = tmp_path / "r.txt", tmp_path / "r.json"
    done = run("verify", *script(tmp_path, "sat"), "--results-file", results, "--json", record)
    assert (done.returncode, done.stdout) == (0, "sat\n"), done.stderr
    lines = results.read_text().splitlines()
    assert lines[0] == "sat"
    assert lines[1].startswith("((X_0 ") and lines[-1].endswith("))")
    data = json.loads(record.read_text())
    jsonschema.validate(data, schema("verify"))
    assert data["witness"] == {"inputs": [0.1, 1 / 3], "outputs": [-2.5], "margin": 0.5, "case": 1}
    assert data["domains"] == 3
    assert data["statistics"]["rate"] == "nan"


def test_record_is_equal_for_equal_runs_times_aside(tmp_path: Path) -> None:
    records = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.json"
        run("verify", *script(tmp_path, "phase x note fallback sleep 0.1 unsat"), "--json", path, "--seed", 4)
        records.append(json.loads(path.read_text()))
    seconds = [record.pop("seconds") for record in records]
    assert records[0] == records[1]
    assert records[0]["seed"] == records[0]["config"]["seed"] == 4
    assert records[0]["notes"] == ["fallback"]
    assert re.fullmatch("[0-9a-f]{64}", records[0]["onnx"]["sha256"])
    assert seconds[0]["x"] >= 0.1 and seconds[0]["total"] >= seconds[0]["x"]


@pytest.mark.timing
@pytest.mark.parametrize("words", ["wait", "sleep 30", "spin 30"])
def test_time_limit(words: str, tmp_path: Path) -> None:
    """With and without the solver's help, and the process group is gone."""
    results, record = tmp_path / "r.txt", tmp_path / "r.json"
    began = time.monotonic()
    done = run(
        "verify",
        *script(tmp_path, f"phase search open 12 {words}"),
        "--timeout",
        2,
        "--results-file",
        results,
        "--json",
        record,
    )
    assert time.monotonic() - began < 2.2
    assert (done.returncode, done.stdout) == (0, "timeout\n"), done.stderr
    assert results.read_text() == "timeout\n"
    data = json.loads(record.read_text())
    jsonschema.validate(data, schema("verify"))
    assert "2 s" in data["reason"]
    assert no_process_mentions(str(tmp_path))


def test_progress_on_a_terminal_only(tmp_path: Path) -> None:
    args = command(["verify", *script(tmp_path, "phase search open 1234 sleep 0.7 note slow unsat"), "--timeout", 30])
    parent, terminal = pty.openpty()
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=terminal, env=environment(), text=True) as process:
        stdout = process.communicate(timeout=60)[0]
    os.close(terminal)
    shown = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert stdout == "unsat\n"
    for words in ("search", "s left", "1234 open", "worst bound -0.5", "/s", "note: slow", "unsat: proved"):
        assert words in shown


def test_verbose_in_a_pipe(tmp_path: Path) -> None:
    done = run("verify", *script(tmp_path, "phase search note slow unsat"), "-v")
    assert done.stdout == "unsat\n"
    assert "note: slow" in done.stderr and "unsat: proved" in done.stderr
    trace = run("verify", *script(tmp_path, "crash"), "-v")
    assert "Traceback" in trace.stderr


def test_libraries_cannot_spoil_stdout(tmp_path: Path) -> None:
    assert run("verify", *script(tmp_path, "print noise unsat")).stdout == "unsat\n"


def test_a_limit_longer_than_any_clock(tmp_path: Path) -> None:
    assert run("verify", *script(tmp_path, "sleep 0.3 unsat"), "--timeout", "1e300").stdout == "unsat\n"


def test_closed_streams(tmp_path: Path) -> None:
    words = ["verify", *script(tmp_path, "print noise unsat"), "--results-file", tmp_path / "r.txt"]
    shell = ["sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", *command(words)]
    assert subprocess.run(shell, env=environment(), timeout=60, check=False).returncode == 0
    assert (tmp_path / "r.txt").read_text() == "unsat\n"


def test_gz_only(tmp_path: Path) -> None:
    args = script(tmp_path, "unsat")
    (tmp_path / "n.onnx").rename(tmp_path / "n.onnx.gz")
    assert run("verify", *args).stdout == "unsat\n"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--set", "bab.batchsize=3"], "bab.batch_size"),
        (["--set", "seed=x"], "seed must be"),
        (["--config", "none.yaml"], "cannot read"),
        (["--onnx", "none.onnx"], "does not exist"),
        (["--onnx", "/"], "is a folder"),
        (["--timeout", "0"], "positive"),
        (["--timeout", "nan"], "positive"),
        (["--timeout", "soon"], "positive"),
        (["--device", "tpu"], "tpu"),
        (["--seed", "-1"], "-1"),
        (["--frobnicate"], "frobnicate"),
        (["--results-file", "/proc/no/such"], "cannot write"),
    ],
)
def test_bad_usage_is_exit_2(extra: list[str], words: str, tmp_path: Path) -> None:
    done = run("verify", *script(tmp_path, "unsat"), *extra)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_leaves_error_in_the_results_file(tmp_path: Path) -> None:
    results = tmp_path / "deep" / "r.txt"
    done = run("verify", "--onnx", "none.onnx", "--vnnlib", "none.vnnlib", "--results-file", results)
    assert done.returncode == 2
    assert results.read_text() == "error\n"


@pytest.mark.parametrize("option", ["--results-file", "--json"])
def test_a_verdict_whose_file_cannot_be_written_is_said_all_the_same(option: str, tmp_path: Path) -> None:
    done = run("verify", *script(tmp_path, "unsat"), option, "/dev/full")
    assert (done.returncode, done.stdout) == (2, "unsat\n")
    assert done.stderr == "Error: cannot write /dev/full: No space left on device\n"
    assert Path("/dev/full").is_char_device()


def test_a_pipe_gets_the_verdict_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert run("verify", *script(tmp_path, "unsat"), "--results-file", tmp_path / "pipe").returncode == 0
    reader.join(10)
    assert read == ["unsat\n"]


def test_nothing_of_an_earlier_query_survives(tmp_path: Path) -> None:
    results, record = tmp_path / "r.txt", tmp_path / "r.json"
    outputs = ["--results-file", str(results), "--json", str(record)]
    assert run("verify", *script(tmp_path, "unsat"), *outputs).returncode == 0
    assert json.loads(record.read_text())["verdict"] == "unsat"
    process = start("verify", *script(tmp_path, "phase x sleep 30"), *outputs)
    deadline = time.monotonic() + 20
    while record.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=10)
    assert (results.read_text(), record.read_text()) == ("unknown\n", "")
    assert run("verify", *script(tmp_path, "unsat"), *outputs).returncode == 0
    assert run("verify", *script(tmp_path, "unsat"), *outputs, "--set", "seed=x").returncode == 2
    assert (results.read_text(), record.read_text()) == ("error\n", "")


def test_a_full_stdout_is_one_sentence(tmp_path: Path) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            command(["verify", *script(tmp_path, "unsat")]), stdout=full, stderr=subprocess.PIPE, text=True,
            env=environment(), timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "Error: cannot write to stdout: No space left on device\n"


def test_domains_of_all_searches_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search counts from zero; the record of a query that is cut off has what was sent last."""
    sent: list[WorkerMessage] = []
    progress = PipeProgress(sent.append)
    monkeypatch.setattr("verifier.runtime.worker._UPDATE_SECONDS", 0.0)
    for phase, counts in (("inputs", [100, 2282]), ("inputs", [10, 2658]), ("neurons", [5, 50, 1, 7])):
        progress.phase(phase)
        for count in counts:
            progress.update(domains=count, open=1)
    figures = [message.values["domains"] for message in sent if isinstance(message, Figures)]
    assert figures == [100, 2282, 2292, 4940, 4945, 4990, 4991, 4997]
