"""Answers in the formats of ours, and of other packages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.plugins import forget, install, on_path
from verifier.config import Config
from verifier.core.errors import ConfigError
from verifier.core.plugins import FORMATS as GROUP
from verifier.core.plugins import Plugin, noted
from verifier.report.formats import FORMATS, Answer, output_format, plugin_of, result_text
from verifier.report.record import Asked, Outcome, schema, to_json, verify_record, versions

jsonschema = pytest.importorskip("jsonschema")

WITNESS = "((X_0 0.5)\n (Y_0 1.0))\n"
MARK = Plugin(GROUP, "mark", "one", "1.0", "marked")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def recorded(outcome: Outcome, *plugins: Plugin) -> dict:
    file = {"path": "a", "sha256": "0" * 64}
    config = Config().model_dump(mode="json")
    return verify_record(outcome, Asked(file, file, 10.0, config, versions()), 1.0, plugins=plugins)


def test_formats_of_ours() -> None:
    numbers = {"inputs": [0.5], "outputs": [1.0], "margin": 0.0, "case": 0}
    found = Outcome("sat", "it was found", WITNESS, numbers)
    answer = Answer(found, lambda: recorded(found))
    assert FORMATS["vnncomp"].render(answer) == result_text("sat", WITNESS) == f"sat\n{WITNESS}"
    assert FORMATS["line"].render(answer) == "sat: it was found\n"
    assert FORMATS["line"].render(Answer(Outcome("unknown"))) == "unknown\n"
    text = FORMATS["json"].render(answer)
    assert text == to_json(answer.record, indent=2) + "\n"
    jsonschema.validate(json.loads(text), schema("verify"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outcome", [Outcome("unsat"), Outcome("unknown", "it is\nopen"), Outcome("sat", "", WITNESS)])
def test_every_format_writes_every_answer(name: str, outcome: Outcome) -> None:
    text = output_format(name).render(Answer(outcome, lambda: recorded(outcome)))
    assert outcome.verdict in text and text.endswith("\n")


def test_the_record_is_made_once_and_only_when_it_is_wanted() -> None:
    calls: list[int] = []
    answer = Answer(Outcome("unsat"), lambda: {"calls": calls.append(1)})
    FORMATS["vnncomp"].render(answer)
    assert calls == []
    _ = answer.record, answer.record
    assert calls == [1]


def test_formats_of_other_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def render(answer):\n    return answer.outcome.verdict.upper()\n"
    points = {GROUP: {"mark": "marked", "mute": "json"}}
    on_path(install(tmp_path, "one", points, marked=source), monkeypatch)
    with noted() as used:
        assert (plugin_of("json"), plugin_of("mark"), used) == (None, MARK, [])
        assert output_format("mark").render(Answer(Outcome("unsat"))) == "UNSAT"
        assert used == [MARK]
    with pytest.raises(ConfigError, match="'mute' writes nothing"):
        output_format("mute")
    known = ", ".join([*FORMATS, "mark (package one)", "mute (package one)"])
    for find in (output_format, plugin_of):
        with pytest.raises(ConfigError) as caught:
            find("xml")
        assert str(caught.value) == f"there is no format 'xml'; there are {known}"


def test_records_name_the_plugins() -> None:
    ops = Plugin("verifier.ops", "asinh", "two", "2.0", "m").entry()
    made = recorded(Outcome("unsat", certified=True, statistics={"plugins": [ops], "open": 0}), MARK)
    assert made["plugins"] == [ops, MARK.entry()] and made["statistics"] == {"open": 0}
    jsonschema.validate(made, schema("verify"))
    assert recorded(Outcome("timeout", statistics={"plugins": json.dumps([ops])}))["plugins"] == [ops]
    assert recorded(Outcome("unknown"))["plugins"] == []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made, "plugins": [{"name": "asinh"}]}, schema("verify"))
