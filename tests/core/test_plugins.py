"""Plug-ins: found by name, imported late, refused where a name is taken, noted where they take part."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.plugins import forget, install, install_extras, on_path
from verifier.cli import doctor
from verifier.config import ATTACK_METHODS, BRANCHING, Config, load_config
from verifier.core import plugins
from verifier.core.errors import ConfigError, InputError
from verifier.core.formats import read_foreign
from verifier.core.plugins import (
    ATTACKS,
    FORMATS,
    HEURISTICS,
    OPS,
    Plugin,
    foreign,
    installed_versions,
    lookup,
    noted,
    taking_part,
    united,
)

OURS = {"a": 1, "b": 2}


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def test_names_of_ours_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(group: str) -> None:
        raise AssertionError("the entry points were read")

    monkeypatch.setattr(plugins, "_installed", scan)
    with noted() as used:
        assert lookup(HEURISTICS, "a", OURS) == 1
    assert used == []
    load_config(assignments=["bab.branching=kfsb", "attack.methods=pgd"])
    assert read_foreign(Path("n.onnx")) is read_foreign(Path("n.onnx.gz")) is read_foreign(Path("p.vnnlib")) is None


def test_nothing_is_imported_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "one", {HEURISTICS: {"c": "plugged:answer"}}, plugged="answer = 3\n")
    on_path(tmp_path, monkeypatch)
    assert str(foreign(HEURISTICS, OURS)["c"]) == "branching heuristic 'c' of package one"
    assert "plugged" not in sys.modules
    with noted() as used:
        assert taking_part() == ()
        assert lookup(HEURISTICS, "c", OURS) == lookup(HEURISTICS, "c", OURS) == 3
        with noted() as inner:
            assert lookup(HEURISTICS, "c", OURS) == 3
        assert inner == used == list(taking_part()) == [Plugin(HEURISTICS, "c", "one", "1.0", "plugged:answer")]
    assert used[0].entry() == {"group": HEURISTICS, "name": "c", "package": "one", "version": "1.0"}
    assert taking_part() == ()
    monkeypatch.delitem(sys.modules, "plugged")


def test_unknown_names_list_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(install(tmp_path, "one", {HEURISTICS: {"c": "m:x"}}), monkeypatch)
    with pytest.raises(ConfigError, match=r"no branching heuristic 'd'; there are a, b, c \(package one\)$"):
        lookup(HEURISTICS, "d", OURS)


def test_a_name_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(install(tmp_path, "one", {HEURISTICS: {"a": "m:x", "c": "m:y"}}), monkeypatch)
    assert lookup(HEURISTICS, "a", OURS) == 1
    with pytest.raises(ConfigError, match="heuristic 'a' of package one has the name of one of ours"):
        lookup(HEURISTICS, "c", OURS)
    on_path(install(tmp_path / "2", "two", {FORMATS: {"onnx": "m:x"}}), monkeypatch)
    with pytest.raises(ConfigError, match="format 'onnx' of package two"):
        read_foreign(Path("n.npz"))


def test_the_doctor_says_which_package_must_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of ours means ours, without a look at plug-ins: who has one is told here."""
    points = {OPS: {"softsign": "m"}, HEURISTICS: {"input": "m"}, ATTACKS: {"pgd": "m"}, FORMATS: {"onnx": "m"}}
    monkeypatch.setattr(doctor, "_self_test", lambda: (True, "not run"))
    on_path(install(tmp_path / "fine", "one", {ATTACKS: {"c": "m:x"}}), monkeypatch)
    lines, healthy = doctor.examine()
    assert "plug-in      attack 'c' of package one 1.0" in lines and healthy
    on_path(install(tmp_path / "taken", "two", points), monkeypatch)
    lines, healthy = doctor.examine()
    refused = [
        line for line in lines if "REFUSED: the " in line and "of package two has the name of one of ours" in line
    ]
    assert len(refused) == 4 and not healthy


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        install(tmp_path, name, {ATTACKS: {"c": "m:x"}})
    on_path(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"packages (one and two|two and one) both bring the attack 'c'"):
        lookup(ATTACKS, "c", {})


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("missing_module:x", "ModuleNotFoundError: No module named 'missing_module'"),
        ("broken:x", "ZeroDivisionError: division by zero"),
        ("wrong:x", "SyntaxError"),
        ("fine:nothing", "AttributeError"),
    ],
)
def test_failed_imports_are_one_sentence(
    target: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "one", {ATTACKS: {"c": target}}, broken="1 / 0\n", wrong="x = = 1\n", fine="x = 1\n")
    on_path(tmp_path, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        lookup(ATTACKS, "c", {})
    text = str(caught.value)
    assert f"attack 'c' of package one ({target}) cannot be imported: {why}" in text and "\n" not in text


def test_tables_are_united() -> None:
    one, two = (Plugin("verifier.ops", name, name, "1", "m") for name in ("one", "two"))
    assert united("translator", {"x"}, [(one, {"a": 1}), (two, {"b": 2})]) == {"a": 1, "b": 2}
    with pytest.raises(ConfigError, match="'two' of package two brings the translator 'x', and so do we"):
        united("translator", {"x"}, [(one, {"a": 1}), (two, {"x": 2})])
    with pytest.raises(ConfigError, match="package one and the set of ops 'two' of package two both bring"):
        united("translator", {"x"}, [(one, {"a": 1}), (two, {"a": 2})])


# ------------------------------------------------------------------------------------------------------- settings


def test_settings_take_names_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(install(tmp_path, "one", {HEURISTICS: {"c": "m:x"}, ATTACKS: {"d": "m:x"}}), monkeypatch)
    config = load_config(assignments=["bab.branching=c", "attack.methods=d, pgd"])
    assert (config.bab.branching, config.attack.methods) == ("c", ("d", "pgd"))
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert load_config(values={"attack.methods": ["d"]}).attack.methods == ("d",)
    for key, known in (("bab.branching", (*BRANCHING, "c")), ("attack.methods", (*ATTACK_METHODS, "d"))):
        with pytest.raises(ConfigError) as caught:
            load_config(assignments=[f"{key}=e"])
        text = str(caught.value)
        assert text == f"--set {key}: {key} must be one of {', '.join(known)} (package one), not 'e'"
    with pytest.raises(ConfigError, match=r"attack\.methods must be names"):
        load_config(assignments=["attack.methods=3"])
    with pytest.raises(ConfigError, match="must be text, not 3"):
        load_config(assignments=["bab.branching=3"])


# -------------------------------------------------------------------------------------------------------- formats


def test_files_of_other_kinds_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def read(path):\n    return {'good': 1}[path.stem]\n"
    points = {FORMATS: {"mine": "reader", "mute": "json"}}
    on_path(install(tmp_path, "one", points, reader=source), monkeypatch)
    assert read_foreign(Path("good.mine")) == 1
    assert read_foreign(Path("good.other")) is None
    with pytest.raises(InputError, match=r"^bad.mine: cannot be read as a .mine file: KeyError: 'bad'$"):
        read_foreign(Path("bad.mine"))
    with pytest.raises(ConfigError, match="'mute' reads nothing"):
        read_foreign(Path("x.mute"))
    monkeypatch.delitem(sys.modules, "reader")


def test_starting_reads_no_entry_points() -> None:
    """Neither importing nor the settings' defaults do."""
    code = "import sys, verifier.api, verifier.config as c; c.load_config(assignments=['bab.branching=babsr'])"
    code += "; sys.exit('importlib.metadata' in sys.modules and c.plugins._installed.cache_info().currsize > 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ranks_have_the_same_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verifier.parallel.world import _same_versions

    def world(*others: dict[str, str]) -> SimpleNamespace:
        group = SimpleNamespace(objects=lambda mine: [mine, *({**mine, **other} for other in others)])
        return SimpleNamespace(rank=0, everyone=group)

    on_path(install(tmp_path, "one", {HEURISTICS: {"c": "m:x"}, FORMATS: {"f": "m:x"}}), monkeypatch)
    assert installed_versions([HEURISTICS]) == {"branching heuristic 'c' of package one": "1.0"}
    _same_versions(world({}))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"rank 1 runs branching heuristic 'c' of package one 2.0 but rank 0 runs 1.0"
    ):
        _same_versions(world({"branching heuristic 'c' of package one": "2.0"}))  # type: ignore[arg-type]


def _curved() -> Any:
    """asinh(x) + x."""
    from torch import Tensor, asinh, nn

    class Curved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return asinh(x) + x

    return Curved()


def test_a_query_names_what_took_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its result and, for a query that is cut off, among the figures; each plug-in once."""
    import torch

    from verifier import api
    from verifier.core.deadline import Deadline
    from verifier.spec.build import from_box

    class Listener:
        def __init__(self) -> None:
            self.figures: dict[str, Any] = {}

        def phase(self, name: str) -> None:
            pass

        def update(self, **figures: Any) -> None:
            self.figures.update(figures)

    on_path(install_extras(tmp_path), monkeypatch)
    problem = from_box([-1.0], [1.0], [[([-1.0], -2.0)]], 1)  # is asinh x + x >= 2 for some x?
    network = api.load_any(_curved(), (1, 1))
    config = load_config(values={"device": "cpu", "attack.methods": ["corners", "pgd"], "attack.restarts": 5})
    for given, names in ((network, ["asinh", "corners"]), (torch.nn.Linear(1, 1), ["corners"])):
        listener = Listener()
        found = api.answer(given, problem, config, api.Terms(Deadline(60), listener), (1, 1))
        assert [entry["name"] for entry in found.statistics["plugins"]] == names
        reported = [entry["name"] for entry in json.loads(listener.figures["plugins"])]
        assert reported and reported == names[: len(reported)]
    plain_config, terms = load_config(values={"device": "cpu"}), api.Terms(Deadline(60), Listener())
    plain = api.answer(torch.nn.Linear(1, 1), problem, plain_config, terms)
    assert "plugins" not in plain.statistics
