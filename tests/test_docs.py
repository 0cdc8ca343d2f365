"""What the documentation says exists, exists; its Python runs; its keys are known; the site has every page."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
SETTINGS = re.compile(r"`((?:attack|bounds|bab|parallel|memory|numerics)\.[a-z_.]+)(?:=[^`]*)?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])((?:verifier|scripts|configs|examples|tests|docs|vnncomp_scripts)/[\w./-]*\w)", text)
    assert [name for name in named if not (ROOT / name).exists() and "CATEGORY" not in name] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
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


# ----------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What the site does with files outside ``docs/``."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def listed(nav: list[Any]) -> Iterator[str]:
    """Pages of a nav, its sections opened."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from listed(value) if isinstance(value, list) else [value]


def test_nav_has_every_page_once(hooks: ModuleType) -> None:
    pages = list(listed(site()["nav"]))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert len(pages) == len(set(pages))
    assert set(pages) == written | set(hooks.PUBLISHED)
    assert not written & set(hooks.PUBLISHED)
    assert [file for file in hooks.PUBLISHED.values() if not (ROOT / file).is_file()] == []


def test_site_loads_nothing_from_other_hosts() -> None:
    config = site()
    assert config["theme"]["font"] is False
    assert not any("://" in str(value) for key in ("extra_javascript", "extra_css") for value in config.get(key, []))
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert not any("```mermaid" in page or re.search(r"!\[[^]]*\]\(\w+://", page) for page in pages)


def test_links_lead_to_pages_of_the_site(hooks: ModuleType) -> None:
    pages = list(listed(site()["nav"]))
    known = {*pages, *(f"files/{name}" for name in hooks.linked_files(pages))}
    assert "files/configs/default.yaml" in known
    for page in pages:
        text = hooks.relinked(hooks.source_of(page).read_text(encoding="utf-8"), page)
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            target = os.path.normpath(os.path.join(os.path.dirname(page), link))
            assert "://" in link or target in known or (ROOT / "docs" / target).is_file(), (page, link)


def test_api_pages_name_what_exists() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: ([\w.]+)$", text, re.M)
    assert len(named) == len(set(named)) > 10
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert attribute in dir(importlib.import_module(module)) or importlib.util.find_spec(name), name


def test_api_pages_have_all_of_the_package() -> None:
    import verifier

    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    places = {name: {f"{where}.{name}", where} for name, where in verifier._WHERE.items()}  # alone, or with its module
    assert set(places) == set(verifier.__all__)
    assert [name for name, where in places.items() if not where & named] == []
