"""The competition's scripts: paths, limits, exit codes, and a valid result file at every moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, SCRIPTS, VERDICTS, environment, no_process_mentions, scripted_python
from tests.support.mounts import NOBODY, SOMEBODY, fill, open_to_all, small_disk
from verifier.cli.vnncomp import category_config

STAGED = "test_category_2023"


def instance(folder: Path, words: str) -> None:
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "n.onnx").write_bytes(b"")
    (folder / "p.vnnlib").write_text(words)


def popen(folder: Path, limit: object, results: str = "r.txt") -> subprocess.Popen[str]:
    """run_instance.sh with paths relative to the folder."""
    args = [SCRIPTS / "run_instance.sh", "v1", STAGED, "onnx/n.onnx", "p.vnnlib", results, str(limit)]
    variables = environment(VERIFIER_PYTHON=str(scripted_python(folder)))
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, args)), cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True)


def first_line(path: Path) -> str:
    """The first line of a whole result file; anything else is refused."""
    text = path.read_text()
    assert text.endswith("\n")
    lines = text.splitlines()
    if lines[0] == "sat":
        assert lines[1].startswith("((X_0 ") and lines[-1].endswith("))")
    else:
        assert len(lines) == 1
    assert lines[0] in VERDICTS
    return lines[0]


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("sat", "sat"),
        ("unsat", "unsat"),
        ("unknown", "unknown"),
        ("crash", "error"),
        ("segv", "error"),
        ("unsupported", "error"),
        ("kill", "error"),
    ],
)
def test_verdicts(words: str, verdict: str, tmp_path: Path) -> None:
    instance(tmp_path, words)
    process = popen(tmp_path, "300.0")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert first_line(tmp_path / "r.txt") == verdict


def test_only_gz_exists_and_folder_of_results_is_made(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    (tmp_path / "onnx" / "n.onnx").rename(tmp_path / "onnx" / "n.onnx.gz")
    process = popen(tmp_path, 60, results="a b/r.txt")
    process.communicate(timeout=60)
    assert first_line(tmp_path / "a b" / "r.txt") == "unsat"


@pytest.mark.parametrize("limit", ["0", "-5", "soon", "nan", ""])
def test_bad_limit_is_an_error_file(limit: str, tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    process = popen(tmp_path, limit)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert first_line(tmp_path / "r.txt") == "error"


def test_missing_files_are_an_error_file(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    (tmp_path / "p.vnnlib").unlink()
    process = popen(tmp_path, 60)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert first_line(tmp_path / "r.txt") == "error"
    assert "p.vnnlib does not exist" in stderr


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/false"])
def test_broken_interpreter_is_an_error_file(python: str, tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    args = [str(SCRIPTS / "run_instance.sh"), "v1", "c", "onnx/n.onnx", "p.vnnlib", "r.txt", "10"]
    done = subprocess.run(
        args,
        cwd=tmp_path,
        env=environment(VERIFIER_PYTHON=python),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert first_line(tmp_path / "r.txt") == "error"
    assert "VERIFIER_PYTHON" in done.stderr


@pytest.mark.timing
@pytest.mark.parametrize("words", ["phase lp sleep 60", "spin 60", "wait", "phase lp sleep 1.6 unsat"])
def test_limit_is_never_exceeded(words: str, tmp_path: Path) -> None:
    instance(tmp_path, words)
    began = time.monotonic()
    process = popen(tmp_path, "2.0")
    process.communicate(timeout=30)
    assert time.monotonic() - began < 2.0
    assert process.returncode == 0
    assert first_line(tmp_path / "r.txt") in {"timeout", "unsat"}
    assert no_process_mentions(str(tmp_path))


@pytest.mark.timing
def test_the_clock_starts_with_the_script(tmp_path: Path) -> None:
    """What the interpreter wastes before our first line counts."""
    instance(tmp_path, "sleep 60")
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 0.7\nexec "{scripted_python(tmp_path)}" "$@"\n')
    slow.chmod(0o755)
    args = [str(SCRIPTS / "run_instance.sh"), "v1", "c", "onnx/n.onnx", "p.vnnlib", "r.txt", "2"]
    began = time.monotonic()
    subprocess.run(args, cwd=tmp_path, env=environment(VERIFIER_PYTHON=str(slow)), timeout=30, check=False)
    assert time.monotonic() - began < 2.0
    assert first_line(tmp_path / "r.txt") == "timeout"


@pytest.mark.timing
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_at_random_moments(number: int, tmp_path: Path) -> None:
    """Whenever it comes: a valid file, a prompt end, no process left, no verdict taken back."""
    rng = random.Random(number)
    instance(tmp_path, "phase search open 3 sleep 0.15 sat")
    seen = set()
    for delay in [0.03, 0.1, *(rng.uniform(0.05, 0.9) for _ in range(6))]:
        results = tmp_path / "r.txt"
        results.unlink(missing_ok=True)
        process = popen(tmp_path, "30")
        time.sleep(delay)
        process.send_signal(number)
        sent = time.monotonic()
        process.communicate(timeout=20)
        assert time.monotonic() - sent < 3.0
        assert process.returncode in (0, -number)
        if results.exists():
            seen.add(first_line(results))
        before = results.read_text() if results.exists() else None
        deadline = time.monotonic() + 3
        while not no_process_mentions(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert no_process_mentions(str(tmp_path))
        after = results.read_text() if results.exists() else None
        assert after == before or first_line(results) in {"sat", "unknown"}
    assert seen <= {"unknown", "sat"} and seen


def test_kill_of_the_worker_or_of_its_parent(tmp_path: Path) -> None:
    instance(tmp_path, "phase search sleep 60")
    for victim in ("parent", "worker"):
        process = popen(tmp_path, "30")
        pids: list[int] = []
        while len(pids) < 2:
            time.sleep(0.05)
            pids = descendants(process.pid)
        os.kill(pids[0 if victim == "parent" else 1], signal.SIGKILL)
        process.communicate(timeout=10)
        assert process.returncode == 0
        assert first_line(tmp_path / "r.txt") in {"unknown", "error"}
        assert no_process_mentions(str(tmp_path))


def descendants(pid: int) -> list[int]:
    """Processes below one, parents first."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    children = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [p for child in children for p in (child, *descendants(child))]


def test_unwritable_results_do_not_hang(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    process = popen(tmp_path, "20", results="/proc/none/r.txt")
    process.communicate(timeout=20)
    assert process.returncode == 0
    (tmp_path / "folder").mkdir()
    process = popen(tmp_path, "20", results=str(tmp_path / "folder"))
    process.communicate(timeout=20)
    assert process.returncode == 0 and not [*(tmp_path / "folder").iterdir()]


@pytest.mark.parametrize("plant", ['ln -s ../victim ".answer.$$"', 'mkfifo ".answer.$$"', 'mkdir ".answer.$$"'])
def test_a_name_that_others_can_guess_is_not_used(plant: str, tmp_path: Path) -> None:
    """The script runs under the process id for which something was left under such a name."""
    folder, victim = tmp_path / "folder", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious\n")
    instance(folder, "unsat")
    shell = ["sh", "-c", f'{plant}; exec "$@"', "sh"]
    args = [*shell, str(SCRIPTS / "run_instance.sh"), "v1", "c", "onnx/n.onnx", "p.vnnlib", "r.txt", "20"]
    variables = environment(VERIFIER_PYTHON=str(scripted_python(folder)))
    done = subprocess.run(args, cwd=folder, env=variables, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    assert first_line(folder / "r.txt") == "unsat"
    assert victim.read_text() == "precious\n"


def broken(folder: Path, results: str) -> subprocess.CompletedProcess[str]:
    """The script with an interpreter that does nothing: what is left is what the script itself wrote."""
    args = [str(SCRIPTS / "run_instance.sh"), "v1", "c", "onnx/n.onnx", "p.vnnlib", results, "10"]
    variables = environment(VERIFIER_PYTHON="/bin/false")
    return subprocess.run(args, cwd=folder, env=variables, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("words", ["unsat", "sat"])
def test_links_and_names_of_results_stay(words: str, tmp_path: Path) -> None:
    instance(tmp_path, words)
    (tmp_path / "real").write_text("old\n")
    (tmp_path / "r.txt").symlink_to("real")
    os.link(tmp_path / "real", tmp_path / "other")
    popen(tmp_path, 20).communicate(timeout=30)
    assert (tmp_path / "r.txt").is_symlink()
    assert first_line(tmp_path / "real") == words
    assert (tmp_path / "other").read_text() == (tmp_path / "real").read_text()


def test_a_pipe_gets_the_verdict_alone(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    os.mkfifo(tmp_path / "r.txt")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "r.txt").read_text()))
    reader.start()
    process = popen(tmp_path, 20)
    process.communicate(timeout=30)
    reader.join(10)
    assert (process.returncode, read) == (0, ["unsat\n"])


def test_a_pipe_that_nobody_reads_does_not_hang_the_script(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    os.mkfifo(tmp_path / "r.txt")
    process = popen(tmp_path, 20)
    assert "nobody reads" in process.communicate(timeout=15)[1]
    assert process.returncode == 0 and stat.S_ISFIFO((tmp_path / "r.txt").stat().st_mode)


def test_a_device_stays_one(tmp_path: Path) -> None:
    instance(tmp_path, "unsat")
    process = popen(tmp_path, 20, results="/dev/full")
    assert "No space left on device" in process.communicate(timeout=30)[1]
    assert Path("/dev/full").is_char_device()


def test_no_verdict_of_an_earlier_instance_survives_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as disk:
        (disk / "r.txt").write_text("unsat\n")
        fill(disk)
        assert broken(tmp_path, str(disk / "r.txt")).returncode == 0
        assert (disk / "r.txt").read_text() in ("", "unknown\n", "error\n")
        (disk / "r.txt").write_text("unsat\n")
        instance(tmp_path, "sat")
        process = popen(tmp_path, 20, results=str(disk / "r.txt"))
        process.communicate(timeout=30)
        assert process.returncode == 0 and first_line(disk / "r.txt") == "sat"  # fits where the old one was
        assert sorted(path.name for path in disk.iterdir()) == ["filling", "r.txt"]


def test_no_verdict_of_an_earlier_instance_survives_where_no_file_can_be_made(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="1m", nr_inodes=2) as disk:
        (disk / "r.txt").write_text("unsat\n")
        assert broken(tmp_path, str(disk / "r.txt")).returncode == 0
        assert (disk / "r.txt").read_text() == "error\n"
        instance(tmp_path, "unsat")
        popen(tmp_path, 20, results=str(disk / "r.txt")).communicate(timeout=30)
        assert (disk / "r.txt").read_text() == "unsat\n"
    with small_disk(tmp_path / "disk", size="1m", nr_inodes=1) as disk:
        done = broken(tmp_path, str(disk / "r.txt"))
        assert done.returncode == 0 and f"cannot write {disk / 'r.txt'}" in done.stderr


@pytest.mark.parametrize(("mode", "code", "left"), [(0o666, 0, "error\n"), (0o644, 1, "unsat\n")])
def test_another_users_file_in_a_sticky_folder(mode: int, code: int, left: str, tmp_path: Path) -> None:
    """It cannot be replaced or removed; where it cannot be written either, the script says so and fails."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    tool = tmp_path / "tool"  # where other users can read it
    shutil.copytree(SCRIPTS, tool)
    results = tmp_path / "folder" / "r.txt"
    results.parent.mkdir()
    with open_to_all(results.parent) as folder:
        results.write_text("unsat\n")
        results.chmod(mode)
        os.chown(results, NOBODY, NOBODY)
        args = ["bash", str(tool / "run_instance.sh"), "v1", "c", "n.onnx", "p.vnnlib", str(results), "10"]
        variables = environment(VERIFIER_PYTHON="/bin/false")
        done = subprocess.run(
            args, cwd=folder, env=variables, user=SOMEBODY, group=SOMEBODY, extra_groups=[], capture_output=True,
            text=True, timeout=30, check=False,
        )  # fmt: skip
    assert (done.returncode, results.read_text()) == (code, left), done.stderr
    assert ("what it held before is still there" in done.stderr) == (code == 1)
    assert [path.name for path in folder.iterdir()] == ["r.txt"]


def test_wrong_usage_still_exits_0(tmp_path: Path) -> None:
    wrong_version = ["run_instance.sh", "v2", "c", "a", "b", "r.txt", "1"]
    for args in (["run_instance.sh"], wrong_version, ["prepare_instance.sh", "v1"]):
        done = subprocess.run(
            [str(SCRIPTS / args[0]), *args[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 0
        assert "usage" in done.stderr
    assert first_line(tmp_path / "r.txt") == "error"


def test_prepare_warms_up_and_exits_0(tmp_path: Path) -> None:
    args = [str(SCRIPTS / "prepare_instance.sh"), "v1", "any", "none.onnx", "none.vnnlib"]
    for python in (sys.executable, "/bin/false"):
        done = subprocess.run(
            args, cwd=tmp_path, env=environment(VERIFIER_PYTHON=python), capture_output=True, timeout=120, check=False
        )
        assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_install_uses_a_given_interpreter_as_it_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SCRIPTS / "install_tool.sh"), "v1"],
        cwd=SCRIPTS,
        env=environment(VERIFIER_PYTHON=str(scripted_python(tmp_path))),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "torch" in done.stdout and "self-test" in done.stdout


def test_a_copy_elsewhere_finds_its_own_environment(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    shutil.copytree(SCRIPTS, tool / "vnncomp_scripts")
    (tool / "verifier").symlink_to(ROOT / "verifier")
    (tool / ".venv" / "bin").mkdir(parents=True)
    (tool / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "used: $PYTHONPATH"\n')
    (tool / ".venv" / "bin" / "python").chmod(0o755)
    environment_ = {k: v for k, v in environment().items() if k not in ("VERIFIER_PYTHON", "PYTHONPATH")}
    args = [str(tool / "vnncomp_scripts" / "run_instance.sh"), "v1", "c", "a", "b", "r.txt", "5"]
    done = subprocess.run(args, cwd=tmp_path, env=environment_, capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == f"used: {tool}\n"


def test_category_settings(tmp_path: Path) -> None:
    (tmp_path / "acasxu.yaml").write_text("seed: 1\n")
    (tmp_path / "vit_2023.yaml").write_text("seed: 1\n")
    assert category_config(tmp_path, "acasxu_2023") == [tmp_path / "acasxu.yaml"]
    assert category_config(tmp_path, "vit_2023") == [tmp_path / "vit_2023.yaml"]
    for unknown in ("unheard_of", "../acasxu", "", "a/b", ".hidden"):
        assert category_config(tmp_path, unknown) == []
    assert category_config(None, "acasxu") == []
