"""Mutation testing: which changes are made, that each is one, and that a fault is noticed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts import mutants

CODE = '''
def f(x: int, y=2) -> int:
    """Text with 3."""
    if x < y and x != 0:
        raise ValueError(f"{x} < 4")
    return max(x, y) - x.floor()
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    return tmp_path


def test_every_change_is_one_and_parses(tree: Path) -> None:
    plain = ast.unparse(ast.parse(CODE)).splitlines()
    made = [mutants.mutant("code.py", k, tree) for k in range(len(mutants.places(ast.parse(CODE))))]
    for each in made:
        changed = [a for a, b in zip(plain, ast.unparse(ast.parse(each.source)).splitlines(), strict=True) if a != b]
        assert len(changed) == 1, each
        assert each.before != each.after
    texts = {f"{each.before} -> {each.after}" for each in made}
    assert {"x < y -> x <= y", "max(x, y) -> min(x, y)", "x.floor() -> x.ceil()", "0 -> 1", "2 -> 3"} <= texts
    assert "x < y and x != 0 -> x < y or x != 0" in texts
    assert not any("4" in text or "ValueError" in text for text in texts)


def test_mutants_differ_and_depend_on_the_seed(tree: Path) -> None:
    first, again, other = (mutants.mutants(["code.py"], 5, seed, tree) for seed in (0, 0, 1))
    assert first == again != other
    assert len({each.source for each in first}) == 5


def test_files_and_their_tests_exist(root: Path) -> None:
    for file, tests in mutants.TARGETS.items():
        assert mutants.places(ast.parse((root / file).read_text(encoding="utf-8"))), file
        assert [name for name in tests if not (root / name).exists()] == []


def test_survivors_are_told_from_the_rest(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants, "TARGETS", {"code.py": ()})
    monkeypatch.setattr(mutants, "noticed", lambda folder, tests, every=3: "min(" in (folder / "code.py").read_text())
    chosen = mutants.mutants(["code.py"], 100, 0, tree)
    left = list(mutants.survivors(chosen, tree))
    assert {each.after for each in chosen} - {each.after for each in left} == {"min(x, y)"}
    assert capsys.readouterr().out.count("SURVIVED") == len(left)
    assert (tree / "code.py").read_text(encoding="utf-8") == CODE


def test_unknown_files_are_refused() -> None:
    with pytest.raises(SystemExit) as ended:
        mutants.main(["--only", "verifier/nowhere.py"])
    assert ended.value.code == 2
