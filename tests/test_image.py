"""The container image without a container: its steps are scripts, and these are run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_dockerfile_runs_only_scripts_of_the_repository(root: Path) -> None:
    text = (root / "Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^RUN (\S+)", text, re.M)
    assert steps == ["scripts/image.sh"]
    (entry,) = re.findall(r'^ENTRYPOINT \["/opt/verifier/(\S+)"\]', text, re.M)
    for script in (*steps, entry):
        assert os.access(root / script, os.X_OK), script


@pytest.mark.parametrize(("variant", "indexes"), [("cpu", 1), ("cuda", 0)])
def test_variants(root: Path, tmp_path: Path, variant: str, indexes: int) -> None:
    done = run(
        "bash", str(root / "scripts/image.sh"), variant, str(tmp_path / "v"), "--dry-run", TORCH_CPU_INDEX="file:///x"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--index-url file:///x torch torchvision") == indexes
    assert f"--editable {root}" in done.stderr


def test_unknown_variant(root: Path, tmp_path: Path) -> None:
    done = run("bash", str(root / "scripts/image.sh"), "tpu", str(tmp_path))
    assert done.returncode == 2
    assert "tpu" in done.stderr


def test_entry_point_is_the_command_line(root: Path) -> None:
    done = run(str(root / "scripts/entrypoint.sh"), "--version", VERIFIER_PYTHON=sys.executable, PYTHONPATH=str(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verifier")


def test_entry_point_runs_the_competition_scripts(root: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.txt"
    query = [str(root / "examples" / name) for name in ("rings.onnx", "rings_outer.vnnlib")]
    done = run(
        str(root / "scripts/entrypoint.sh"), "run_instance.sh", "v1", "test", *query, str(results), "120",
        VERIFIER_PYTHON=sys.executable,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results.read_text(encoding="utf-8").startswith("sat\n((X_0 ")


@pytest.mark.parametrize("script", ["image.sh", "entrypoint.sh", "install.sh", "demo.sh"])
def test_shell_syntax(root: Path, script: str) -> None:
    assert run("bash", "-n", str(root / "scripts" / script)).returncode == 0
