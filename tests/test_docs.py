"""What the documentation says exists, exists; its Python runs; its keys are known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SETTINGS = re.compile(r"`((?:attack|bounds|bab|parallel|memory|numerics)\.[a-z_.]+)(?:=[^`]*)?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])((?:verifier|scripts|configs|examples|tests|docs|vnncomp_scripts)/[\w./-]*\w)", text)
    assert [name for name in named if not (ROOT / name).exists() and "CATEGORY" not in name] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_are_known(page: Path) -> None:
    from verifier.config import Config

    known = set()

    def collect(schema: dict, prefix: str, definitions: dict) -> None:
        for key, value in schema["properties"].items():
            known.add(prefix + key)
            target = value.get("$ref") or next((part.get("$ref") for part in value.get("allOf", [])), None)
            if target:
                collect(definitions[target.rpartition("/")[2]], f"{prefix}{key}.", definitions)

    schema = Config.model_json_schema()
    collect(schema, "", schema["$defs"])
    assert "bounds.alpha.iterations" in known
    assert set(SETTINGS.findall(page.read_text(encoding="utf-8"))) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"^    make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)) <= targets


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    command = [sys.executable, "-c", "import torch; torch.manual_seed(0)\n" + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("unsat - ", "sat - "))


def test_architecture_names_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {p.parent.name for p in (ROOT / "verifier").glob("*/__init__.py")}
    assert {name for name in folders if f"`{name}`" not in text} == set()


def test_contributing_fits_on_a_screen() -> None:
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_the_glossary_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:core|graph|ops|bounds|bab|attack|parallel)/[a-z_/]*(?:\.py)?)`", text)
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "verifier" / name).exists()] == []
