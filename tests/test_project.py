"""The project around the code: packaging, the layering rule that import-linter cannot say, the install script."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


def imported_modules(source: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def attribute_paths(source: Path) -> set[str]:
    """Dotted attribute accesses such as ``torch.distributed.all_reduce``."""
    paths: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            paths.add(".".join([node.id, *reversed(parts)]))
    return paths


def test_scanners_see_imports_and_attributes(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("def f():\n    from torch import distributed\nimport torch\ntorch.distributed.barrier()\n")
    assert "torch.distributed" in imported_modules(source)
    assert "torch.distributed.barrier" in attribute_paths(source)


def test_only_parallel_uses_torch_distributed(root: Path) -> None:
    offenders = []
    for source in sorted((root / "verifier").rglob("*.py")):
        if source.is_relative_to(root / "verifier" / "parallel"):
            continue
        used = imported_modules(source) | attribute_paths(source)
        if any(name.startswith("torch.distributed") for name in used):
            offenders.append(str(source.relative_to(root)))
    assert offenders == []


def test_no_unsafe_readers(root: Path) -> None:
    """Inputs are untrusted: nothing evaluates, unpickles or fully loads them.

    Ranks of one job, which run one program for one user, send each other objects; that is the one place.
    """
    offenders = []
    for source in sorted((root / "verifier").rglob("*.py")):
        if source.relative_to(root).as_posix() == "verifier/parallel/processes.py":
            continue
        used = imported_modules(source) | attribute_paths(source)
        bad = used & {"pickle", "dill", "torch.load", "yaml.unsafe_load", "yaml.full_load", "marshal"}
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        offenders += [f"{source.relative_to(root)}: {name}" for name in sorted(bad | (calls & {"eval", "exec"}))]
    assert offenders == []


def test_every_file_says_what_it_is_for(root: Path) -> None:
    silent = [
        str(source.relative_to(root))
        for source in sorted((root / "verifier").rglob("*.py"))
        if not ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_import_is_free_of_torch() -> None:
    code = "import sys, verifier; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_wheel_holds_code_and_data(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((root / name).read_bytes())
    for source in (root / "verifier").rglob("*"):
        if source.is_file() and "__pycache__" not in source.parts:
            target = copy / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    built = subprocess.run([*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("verifier-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(source.relative_to(root))
        for source in (root / "verifier").rglob("*")
        if source.suffix in {".py", ".json", ".yaml", ".typed"} and "__pycache__" not in source.parts
    }
    assert wanted <= held
    assert not any(name.startswith(("tests", "scripts", "examples")) for name in held)


def test_dependencies_are_unpinned(root: Path) -> None:
    """An exact pin of torch would fight with the wheel that torchvision needs."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not [line for line in project["dependencies"] if "==" in line]


class TestInstallScript:
    def run(self, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(root / "scripts" / "install.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_dry_run_shows_the_steps(self, root: Path, tmp_path: Path) -> None:
        venv = tmp_path / "new venv"
        done = self.run(root, "--dry-run", "--dev", "--editable", "--venv", str(venv), "--python", sys.executable)
        assert done.returncode == 0, done.stderr
        steps = [line for line in done.stderr.splitlines() if line.startswith("+ ")]
        assert steps == [
            f"+ {sys.executable} -m venv {venv}",
            f"+ {venv}/bin/python -m pip install -qq --editable {root}[dev]",
        ]
        assert not venv.exists()

    def test_torch_index_comes_first(self, root: Path, tmp_path: Path) -> None:
        done = self.run(root, "--dry-run", "--torch-index", "https://example.org/cpu", "--venv", str(tmp_path / "v"))
        steps = [line for line in done.stderr.splitlines() if "pip install" in line]
        assert done.returncode == 0
        assert "--index-url https://example.org/cpu torch torchvision" in steps[0]
        assert steps[1].endswith(str(root))

    def test_old_python_is_named(self, root: Path, tmp_path: Path) -> None:
        done = self.run(root, "--dry-run", "--venv", str(tmp_path / "v"), "--python", "false")
        assert done.returncode == 2
        assert "Python 3.11" in done.stderr

    def test_unknown_argument(self, root: Path) -> None:
        done = self.run(root, "--fast")
        assert done.returncode == 2
        assert "--fast" in done.stderr
