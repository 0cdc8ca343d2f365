"""Folders whose modules are the entries of a table: names without an import, and what every module must have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from verifier.bab import branching
from verifier.bab.branching.heuristic import Heuristic
from verifier.config import ATTACK_METHODS, BRANCHING, NOT_NEURONS, load_config
from verifier.core import folders
from verifier.core.errors import ConfigError
from verifier.core.folders import Folder
from verifier.parallel.backends import Placement, placement
from verifier.report.formats import output_format

FOLDERS = {name: value for name, value in vars(folders).items() if isinstance(value, Folder)}
MODULES = [(folder, name) for folder in FOLDERS.values() for name in folder]


@pytest.mark.parametrize(("folder", "name"), MODULES, ids=[f"{f.package.split('.')[-1]}-{n}" for f, n in MODULES])
def test_every_module_is_an_entry(folder: Folder[object], name: str) -> None:
    found = folder[name]
    module = sys.modules[f"{folder.package}.{name}"]
    assert found is (module if folder.whole or folder.attribute is None else getattr(module, folder.attribute))


def test_entries_are_what_they_are_used_as() -> None:
    from verifier.attack.methods import attack

    assert all(isinstance(branching.named(name), Heuristic) for name in BRANCHING)
    assert all(callable(attack(name)) for name in ATTACK_METHODS)
    assert all(callable(output_format(name).render) for name in folders.FORMATS)
    backends = [load_config(values={"parallel.backend": name}) for name in folders.BACKENDS]
    assert all(isinstance(placement(config), Placement) for config in backends)


def test_the_settings_take_the_names_of_the_folders() -> None:
    assert set(folders.HEURISTICS) == set(BRANCHING) - set(NOT_NEURONS) and set(folders.ATTACKS) == set(ATTACK_METHODS)
    with pytest.raises(ConfigError) as caught:
        load_config(assignments=["parallel.backend=mpi"])
    assert str(caught.value).endswith(f"backend must be one of {', '.join(folders.BACKENDS)}, not 'mpi'")


def test_names_cost_no_import() -> None:
    """Neither of torch, nor of any module of the folders."""
    code = (
        "import sys, verifier.config as c, verifier.core.folders as f;"
        "tables = [v for v in vars(f).values() if isinstance(v, f.Folder)];"
        "c.load_config(assignments=['bab.branching=kfsb', 'attack.methods=runs', 'parallel.backend=tp']);"
        "loaded = [m for t in tables for m in sys.modules if m.startswith(t.package)];"
        "sys.exit(str(loaded) if loaded or 'torch' in sys.modules or not all(map(len, tables)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_without_what_it_must_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in {"__init__": "", "fine": "answer = 3\n", "empty": "other = 3\n", "_helper": ""}.items():
        (tmp_path / "added_by_a_test").mkdir(exist_ok=True)
        (tmp_path / "added_by_a_test" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(folders, "_ROOT", tmp_path / "added_by_a_test")
    table: Folder[int] = Folder("added_by_a_test", "answer")
    assert tuple(table) == ("empty", "fine") and "empty" in table and "_helper" not in table
    assert table["fine"] == 3 and table.get("other") is None
    with pytest.raises(
        ConfigError, match=r"^added_by_a_test/empty.py has no 'answer', which every module of its folder"
    ):
        table["empty"]
    assert Folder("added_by_a_test", None)["empty"].other == 3


def test_an_entry_of_the_wrong_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["verifier.parallel.backends"], "BACKENDS", {"single": 3})
    with pytest.raises(ConfigError, match="BACKEND of the parallel backend 'single' is a int, not a Placement"):
        placement(load_config())
