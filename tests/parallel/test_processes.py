"""Jobs of real processes: equal bits, lost ranks, torchrun, local ranks from every entry point."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import verifier
import verifier.api
from scripts.networks import save_mlp
from tests.parallel.failing import PATIENCE
from verifier.core.errors import ConfigError, DeadlineExceeded, RankFailed
from verifier.parallel import launch, world

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.xdist_group("ranks")


def run_task(task: str, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.parallel.job", "lead", task, str(ranks)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bits_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    found = run_task("bits", ranks)
    assert len(found) > 20
    for name, figures in found.items():
        assert figures["equal"], name
        assert figures["finite"] and figures["unstable"] > 100, name
        assert figures["slopes"] > 0 or "alpha" not in name
    # Rows were really dealt, and gathered in the right order.
    dealt = {name for name, figures in found.items() if figures["dealt"]}
    for name in ("784-256x4-10 crown", "784-256x4-10 alpha-crown", "784-1024x4-10 crown", "resnet crown"):
        assert any(d.startswith(name) for d in dealt), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_features_split_over_processes(ranks: int) -> None:
    found = run_task("features", ranks)
    assert len(found) == 3 * len({1, ranks // 2})
    for name, figures in found.items():
        assert figures["equal"] and figures["unstable"] > 50, name
        assert figures["error"] <= 1e-5, name


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages(ranks: int) -> None:
    assert run_task("talk", ranks) == {"size": ranks}


# ------------------------------------------------------------------------------------------------------ lost ranks


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A query that searches on neurons for minutes."""
    folder = tmp_path_factory.mktemp("hard")
    save_mlp(folder / "net.onnx", (40, 128, 128, 128, 4), gain=2.0)
    lines = [f"(declare-const X_{i} Real)" for i in range(40)] + [f"(declare-const Y_{i} Real)" for i in range(4)]
    lines += [f"(assert (>= X_{i} 0.3))\n(assert (<= X_{i} 0.7))" for i in range(40)]
    (folder / "prop.vnnlib").write_text("\n".join([*lines, "(assert (<= Y_0 -60))"]) + "\n")
    return ["--onnx", str(folder / "net.onnx"), "--vnnlib", str(folder / "prop.vnnlib")]


@dataclass
class Run:
    process: subprocess.Popen[str]
    results: Path
    log: Path

    def wait_for(self, phase: str) -> None:
        until = time.monotonic() + 90
        while phase not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def children(self) -> dict[int, int]:
        """Process ids by rank."""
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == self.process.pid:
                found[0] = int(entry.name)
            if b"rank" in words:
                found.setdefault(-parent, 0)
                found[-parent] = int(entry.name)
        return {0: found[0], 1: found[-found[0]]}

    def end(self, within: float) -> tuple[str, str, float]:
        """Verdict in the file, everything printed, and seconds until the end."""
        began = time.monotonic()
        self.process.wait(within)
        return self.results.read_text().split()[0], self.log.read_text(), time.monotonic() - began


def start(tmp_path: Path, arguments: list[str], module: str = "verifier", how: tuple[str, ...] = ()) -> Run:
    results, log = tmp_path / "results.txt", tmp_path / "log.txt"
    command = [sys.executable, "-m", module, *how, "verify", *arguments, "--results-file", str(results), "-v"]
    command += ["--set", "attack.enabled=false", "--set", "bab.branching=kfsb", "--set", "threads=1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=stream, text=True)
    return Run(process, results, log)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("backend", ["single", "fsdp"])
def test_lost_rank(tmp_path: Path, hard: list[str], number: int, backend: str) -> None:
    query = [*hard, "--ranks", "2", "--timeout", "200", "--set", f"parallel.backend={backend}"]
    run = start(tmp_path, query, "tests.parallel.failing", ("impatient",))
    run.wait_for("branch and bound on neurons")
    time.sleep(1)
    os.kill(run.children()[1], number)
    verdict, text, seconds = run.end(25)
    assert verdict == "error"
    assert seconds < 10
    assert re.search(r"Error: rank 1 .*(branch and bound|split_neurons|look_at_neurons)", text), text
    assert text.count("Error:") == 1


def test_stopped_leader(tmp_path: Path, hard: list[str]) -> None:
    run = start(tmp_path, [*hard, "--ranks", "2", "--timeout", "200"], "tests.parallel.failing", ("impatient",))
    run.wait_for("branch and bound on neurons")
    leader, follower = run.children().values()
    os.kill(leader, signal.SIGSTOP)
    verdict, text, seconds = run.end(25)
    assert verdict == "error" and seconds < 10
    assert f"Error: rank 0 has not responded for {PATIENCE:g} s during branch and bound on neurons" in text
    until = time.monotonic() + 5
    while Path(f"/proc/{follower}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{follower}").exists()


def test_killed_leader(tmp_path: Path, hard: list[str]) -> None:
    run = start(tmp_path, [*hard, "--ranks", "2", "--timeout", "200"])
    run.wait_for("branch and bound on neurons")
    leader, follower = run.children().values()
    os.kill(leader, signal.SIGKILL)
    verdict, _, seconds = run.end(10)
    assert verdict in ("unknown", "error") and seconds < 10
    until = time.monotonic() + 5
    while Path(f"/proc/{follower}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{follower}").exists()


@pytest.mark.parametrize(
    ("how", "verdict", "words"),
    [
        ("raise", "error", "rank 1 failed during split_neurons: ZeroDivisionError: planted"),
        ("exit", "error", "rank 1 ended with exit status 7 during split_neurons"),
        ("memory", "unknown", "rank 1 failed during split_neurons: planted"),
        ("start", "error", "rank 1 ended with exit status 7 during start-up"),
    ],
)
def test_failing_rank(tmp_path: Path, hard: list[str], how: str, verdict: str, words: str) -> None:
    run = start(tmp_path, [*hard, "--ranks", "2", "--timeout", "100"], "tests.parallel.failing", (how,))
    found, text, _ = run.end(60)
    assert found == verdict
    assert words in text


def test_deadline_while_ranks_wait_for_one(tmp_path: Path, hard: list[str]) -> None:
    began = time.monotonic()
    run = start(tmp_path, [*hard, "--ranks", "2", "--timeout", "12"], "tests.parallel.failing", ("sleep",))
    verdict, text, _ = run.end(20)
    assert verdict == "timeout"
    assert time.monotonic() - began < 12.5
    assert "root bounds" in text, text


def test_a_replayed_witness_stands(tmp_path: Path) -> None:
    query = ["--onnx", str(EXAMPLES / "bars.onnx"), "--vnnlib", str(EXAMPLES / "bars_large.vnnlib")]
    run = start(tmp_path, [*query, "--ranks", "2", "--timeout", "100"], "tests.parallel.failing", ("late",))
    verdict, text, _ = run.end(60)
    assert verdict == "sat", text
    assert "X_0" in run.results.read_text()


# --------------------------------------------------------------------------------------------- starting and refusing


def command(*arguments: str, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "verifier", *arguments]
    if torchrun:  # only rank 0 is where relative paths lead to files
        start = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc-per-node", str(torchrun)]
        words = [*start, "sh", "-c", 'test "$RANK" = 0 || cd /; exec "$@"', "rank", *words]
    return subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


MEDIUM = ("--onnx", "examples/bars.onnx", "--vnnlib", "examples/bars_medium.vnnlib")


@pytest.mark.parametrize("backend", ["single", "fsdp", "tp"])
def test_torchrun(backend: str) -> None:
    done = command("verify", *MEDIUM, "--timeout", "100", "--set", f"parallel.backend={backend}", torchrun=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "unsat\n"


def test_torchrun_with_another_number_of_ranks() -> None:
    done = command("verify", *MEDIUM, "--ranks", "3", torchrun=2)
    assert "torchrun started 2 ranks but parallel.ranks is 3" in done.stderr


def test_torchrun_bounds_are_printed_once() -> None:
    done = command("bounds", *MEDIUM, torchrun=2)
    assert len(json.loads(done.stdout)["memory"]["ranks"]) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("parallel.ranks=4", "parallel.domains=3"), "parallel.domains is 3 but there are 4 ranks"),
        (("parallel.backend=tp",), "tp needs at least two ranks in a group"),
        (("parallel.backend=tp", "parallel.ranks=2", "parallel.offload=true"), "parallel.offload does not go with tp"),
        (("parallel.ranks=0",), "parallel.ranks must be an integer at least 1 or 'auto'"),
    ],
)
def test_settings_that_mean_nothing(settings: tuple[str, ...], words: str) -> None:
    done = command("verify", *MEDIUM, *(word for s in settings for word in ("--set", s)))
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_interface() -> None:
    settings = {"parallel.ranks": 2, "parallel.backend": "fsdp", "threads": 1}
    result = verifier.verify(EXAMPLES / "bars.onnx", EXAMPLES / "bars_medium.vnnlib", settings, timeout=100)
    assert result.verdict == "unsat"
    net = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))
    low, up = torch.zeros(1, 3), torch.ones(1, 3)
    alone = verifier.compute_bounds(net, low, up, "crown", config={"threads": 1})
    both = verifier.compute_bounds(net, low, up, "crown", config=settings)
    assert torch.equal(alone.lower, both.lower) and torch.equal(alone.upper, both.upper)
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(os.environ)


def test_ranks_of_one_machine_talk_over_its_loopback_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert launch._loopback() == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen0")
    assert launch._loopback() == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "chosen0"}


BARS = (EXAMPLES / "bars.onnx", EXAMPLES / "bars_medium.vnnlib", {"parallel.ranks": 2, "threads": 1})


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "two"}, "RANK is 'two' but must be a number from 0 to 1"),
        ({"RANK": "2"}, "RANK is '2' but must be a number from 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' but must be a number of at least 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999' but must be a number from 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1' but must be a number from 0 to 0"),
    ],
)
def test_variables_that_mean_nothing(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**usual, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        world.under_torchrun()


def test_a_rank_without_a_place_says_so() -> None:
    environment = {**ENVIRONMENT, "WORLD_SIZE": "2", "RANK": "two"}
    for words in ("verify", "bounds"):
        done = subprocess.run(
            [sys.executable, "-m", "verifier", words, *MEDIUM],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "Error: RANK is 'two'" in done.stderr


def test_what_this_machine_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, property, settings = BARS
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"parallel\.logs is .*rank-1\.log cannot be written"):
        verifier.verify(network, property, {**settings, "parallel.logs": str(tmp_path / "file")})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense0")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME is 'nonsense0' but"):
        verifier.verify(*BARS)


def test_one_job_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier.api, "RANK_COMMAND", ("-c", "import time; time.sleep(60)"))
    with world._in_use, pytest.raises(ConfigError, match="already answers a query with several ranks"):
        verifier.verify(*BARS)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"torch\.distributed is already in use"):
            verifier.verify(*BARS)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier.api, "RANK_COMMAND", ("-c", "import time; time.sleep(60)"))
    with pytest.raises(DeadlineExceeded, match="during the start of the ranks"):
        verifier.verify(*BARS, timeout=3)
    monkeypatch.setattr(verifier.api, "RANK_COMMAND", ("-c", "raise SystemExit('no such thing')"))
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 ended with exit status 1 during start-up: no such thing"):
        verifier.verify(*BARS)
    assert time.monotonic() - began < 10


def test_bounds_of_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier.api, "RANK_COMMAND", ("-m", "tests.parallel.failing", "bounds", "rank"))
    net = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))
    with pytest.raises(RankFailed, match="rank 1 ended with exit status 7 during bounds"):
        verifier.compute_bounds(net, torch.zeros(1, 3), torch.ones(1, 3), config=BARS[2])


def test_device_limit(tmp_path: Path) -> None:
    """Half of the weights fit: one device says what would help, shards and host memory do."""
    save_mlp(tmp_path / "net.onnx", (30, 300, 300, 300, 4))
    lines = [f"(declare-const X_{i} Real)" for i in range(30)] + [f"(declare-const Y_{i} Real)" for i in range(4)]
    lines += [f"(assert (>= X_{i} 0.5))\n(assert (<= X_{i} 0.501))" for i in range(30)]
    (tmp_path / "prop.vnnlib").write_text("\n".join([*lines, "(assert (<= Y_0 -1000))"]) + "\n")
    query = ["--onnx", str(tmp_path / "net.onnx"), "--vnnlib", str(tmp_path / "prop.vnnlib"), "--timeout", "100"]
    limit = sum(4 * (n * m + m) for n, m in ((30, 300), (300, 300), (300, 300), (300, 4))) // 2
    query += ["--set", f"memory.device_limit={limit}", "--set", "parallel.prefetch=false"]
    query += ["--set", "parallel.stream=64KiB"]
    record = tmp_path / "record.json"
    done = command("verify", *query, "--json", str(record))
    assert done.stdout == "unknown\n"
    reason = json.loads(record.read_text())["reason"]
    assert reason.startswith("out of memory") and str(limit) in reason
    assert "parallel.backend=fsdp" in reason and "parallel.offload" in reason
    for settings in (("--set", "parallel.offload=true"), ("--ranks", "3", "--set", "parallel.backend=fsdp")):
        done = command("verify", *query, *settings)
        assert done.stdout == "unsat\n", done.stderr
