"""Packages with entry points, as an installer would leave them in a folder on the path."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from verifier.core import plugins
from verifier.frontend import lower, onnx_module
from verifier.ops import registry

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ROOT / "examples" / "extending"

Points = Mapping[str, Mapping[str, str]]  # targets by group and name


def install(folder: Path, package: str, points: Points, version: str = "1.0", **modules: str) -> Path:
    """Modules with their sources, and a ``.dist-info`` that names their entry points; the folder."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    sections = [f"[{group}]\n" + "".join(f"{n} = {t}\n" for n, t in names.items()) for group, names in points.items()]
    (info / "entry_points.txt").write_text("\n".join(sections))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def install_extras(folder: Path) -> Path:
    """The example package, as its pyproject.toml says."""
    project = tomllib.loads((EXTRAS / "pyproject.toml").read_text(encoding="utf-8"))
    (package,) = project["tool"]["setuptools"]["packages"]
    (folder / package).mkdir(parents=True)
    for source in EXTRAS.glob("*.py"):
        (folder / package / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    described = project["project"]
    return install(folder, described["name"], described["entry-points"], described["version"])


def forget() -> None:
    """What this process knows of plug-ins; converters that it has adopted stay until it adopts others."""
    plugins._installed.cache_clear()
    plugins.load.cache_clear()
    lower.foreign_translators.cache_clear()
    onnx_module.extended.cache_clear()
    registry.op_sets.cache_clear()


def on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process find what is installed in a folder, until the test ends."""
    monkeypatch.syspath_prepend(folder)
    forget()
