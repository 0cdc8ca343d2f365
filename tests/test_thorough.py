"""``make thorough`` and ``make quick``: parts run to their end, one line each; the quick selection exists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import thorough
from tests.conftest import QUICK, pytest_ignore_collect, quick_stride

PARTS = [
    thorough.Part("good", "", [sys.executable, "-c", "print('a'); print('=== 3 passed ===')"]),
    thorough.Part("bad", "", [sys.executable, "-c", "import os; raise SystemExit(os.environ['WHY'])"], {"WHY": "gone"}),
    thorough.Part("lost", "", ["/nowhere/at-all"]),
]


def test_every_part_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(thorough, "parts", lambda *_: PARTS)
    monkeypatch.setattr(thorough.run, "__defaults__", (tmp_path,))
    assert thorough.main([]) == 1
    good, bad, lost = capsys.readouterr().out.splitlines()[-3:]
    assert re.fullmatch(r"good +ok +0:\d\d +3 passed", good)
    assert re.fullmatch(r"bad +FAILED +0:\d\d +gone", bad)
    assert lost.startswith("lost       FAILED") and "at-all" in lost
    assert (tmp_path / "good.log").read_text(encoding="utf-8").startswith("a\n")
    assert thorough.main(["--only", "good,bad", "--skip", "bad"]) == 0


def test_parts_name_what_exists(root: Path) -> None:
    every = thorough.parts("python", 60.0, Path("image"))
    targets = (root / "Makefile").read_text(encoding="utf-8")
    for part in every:
        for word in part.command:
            if word.startswith(("scripts/", "tests/")):
                assert (root / word).exists(), part
        if part.command[0] == "make":
            assert f"\n{part.command[1]}:" in targets
    assert thorough.hypothesis_tests()


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match="no part 'fast'; there are good, bad, lost"):
        list(thorough.chosen(PARTS, ["fast"], []))


def test_the_quick_selection_exists_and_looks_everywhere(root: Path) -> None:
    assert [name for name in QUICK if not (root / name).exists()] == []
    folders = {file.parent for file in (root / "tests").rglob("test_*.py")}
    left_out = {
        folder.name for folder in folders if not any(quick_stride(f) is not None for f in folder.glob("test_*.py"))
    }
    assert left_out == set()


def test_quick_takes_the_nearest_entry(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK, "tests/ops", 7)
    monkeypatch.setitem(QUICK, "tests/ops/test_affine.py", 3)
    assert quick_stride(root / "tests/ops/test_affine.py") == 3
    assert quick_stride(root / "tests/ops/samples.py") == 7
    assert quick_stride(root / "tests/opsets.py") is None


@pytest.mark.parametrize("quick", [True, False])
def test_quick_looks_at_no_other_file(root: Path, quick: bool) -> None:
    config: Any = SimpleNamespace(getoption=lambda name: quick)
    left_out = pytest_ignore_collect(root / "tests" / "test_bench_memory.py", config)
    assert bool(left_out) == (quick and "tests/test_bench_memory.py" not in QUICK)
    assert not pytest_ignore_collect(root / "tests" / "core" / "test_sums.py", config)
    assert not pytest_ignore_collect(root / "tests" / "cli", config)
