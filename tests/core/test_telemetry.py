"""Nothing leaves the machine: no telemetry of onnxruntime, no name server for ranks, no files left behind."""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.networks import from_sequential
from tests.support.onnx_writer import write_onnx
from tests.support.planted import write_vnnlib
from verifier.core import telemetry
from verifier.parallel.names import is_loopback

OTHER = {**os.environ, "ORT_DISABLE_TELEMETRY": "0", "OMP_NUM_THREADS": "1"}
SECONDS = 15  # telemetry begins some seconds after the first session


def said_by(*command: str, root: Path) -> str:
    environment = {**OTHER, "PYTHONPATH": str(root)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60).stdout


def test_importing_the_package_sets_the_variable_for_this_process_and_its_children(root: Path) -> None:
    child = "import subprocess, verifier; print(subprocess.check_output(['env'], text=True))"
    assert "ORT_DISABLE_TELEMETRY=1" in said_by(sys.executable, "-c", child, root=root).splitlines()


def test_scripts_set_it(root: Path) -> None:
    sourced = f'. "{root}/vnncomp_scripts/common.sh"; env'
    assert "ORT_DISABLE_TELEMETRY=1" in said_by("bash", "-c", sourced, root=root).splitlines()
    for name in ("scripts/entrypoint.sh", "Dockerfile", "Makefile", ".ci/run"):
        assert "ORT_DISABLE_TELEMETRY" in (root / name).read_text(encoding="utf-8"), name


def imports_onnxruntime(source: Path) -> bool:
    """Whether a file imports it by a statement, or names it in code that it has others run."""
    text = source.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "onnxruntime" for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "onnxruntime":
            return True
        if isinstance(node, ast.Constant) and re.search(r"import [\w, ]*onnxruntime", str(node.value)):
            return True
    return False


def test_every_script_that_imports_onnxruntime_sets_it(root: Path) -> None:
    for source in sorted((root / "scripts").glob("*.py")):
        if imports_onnxruntime(source):
            text = source.read_text(encoding="utf-8")
            assert telemetry.VARIABLE in text or "environment(" in text or "import verifier" in text, source
    assert [s.name for s in sorted((root / "verifier").rglob("*.py")) if imports_onnxruntime(s)] == ["normalise.py"]


def test_an_import_that_came_earlier_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", sys)
    monkeypatch.setattr(telemetry, "_seen_before", False)
    monkeypatch.setenv(telemetry.VARIABLE, "1")
    with caplog.at_level(logging.WARNING, logger="verifier"):
        telemetry.switch_off()
        telemetry.warn_if_late()
        assert caplog.messages == []
        monkeypatch.delenv(telemetry.VARIABLE)
        telemetry.switch_off()
        telemetry.warn_if_late()
    assert len(caplog.messages) == 1 and "before verifier" in caplog.messages[0]
    assert os.environ[telemetry.VARIABLE] == "1"


@pytest.mark.parametrize(
    ("host", "ours"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("a.b", False)],
)
def test_what_is_this_machine(host: str, ours: bool) -> None:
    assert is_loopback(host) is ours


def hard_query(folder: Path) -> list[str]:
    """A query that takes longer than its limit."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((30, 120), (120, 120), (120, 120)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(120, 2))
    with torch.no_grad():
        for part in network:
            if isinstance(part, nn.Linear):
                part.weight.mul_(2.0)
        lowest = float(network(torch.rand(20000, 30) * 2 - 1)[:, 0].min())
    write_onnx(from_sequential(network, (30,)), folder / "n.onnx")
    box = torch.ones(30)
    write_vnnlib(folder / "p.vnnlib", -box, box, np.array([[1.0, 0.0]]), np.array([3 * lowest - 3]))
    return ["--onnx", str(folder / "n.onnx"), "--vnnlib", str(folder / "p.vnnlib"), "--timeout", str(SECONDS)]


def is_local(call: str) -> bool:
    """Whether a traced system call concerns this machine alone."""
    families = ("AF_UNIX", "AF_NETLINK")
    return any(name in call for name in families) or '"127.0.0.1"' in call or '"::ffff:127.0.0.1"' in call


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", [2, 1])
def test_a_query_opens_local_sockets_only_and_leaves_no_file(ranks: int, root: Path, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    trace, home, temporary = tmp_path / "trace", tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    variables = {**OTHER, "HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(root)}
    variables.pop("XDG_CACHE_HOME", None)
    traced = [strace, "-f", "-qq", "-e", "trace=socket,connect,bind,sendto", "-o", str(trace)]
    command = [sys.executable, "-m", "verifier", "verify", *hard_query(tmp_path), "--ranks", str(ranks)]
    done = subprocess.run([*traced, *command], env=variables, capture_output=True, text=True, timeout=120, check=False)
    if not trace.exists() or "ptrace" in done.stderr:
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()[:200]}")
    assert done.stdout.strip() == "timeout", done.stderr  # it really ran that long
    calls = trace.read_text(errors="replace").splitlines()
    if ranks == 1:
        assert [call for call in calls if "socket(AF_INET" in call] == []
    reached = [call for call in calls if re.search(r"\b(connect|bind)\(", call) and "resumed" not in call]
    assert [call for call in reached if not is_local(call)] == []
    assert [call for call in calls if "htons(53)" in call] == []
    assert [path for folder in (home, temporary) for path in folder.rglob("*")] == []
