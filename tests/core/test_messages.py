"""Messages between processes: what is sent is what comes, and everything else is an error that says why."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier.core.messages import Json, Message, MessageError, _types, decode, encode
from verifier.parallel.heartbeat import RankFailure, RankHeartbeat
from verifier.report.record import Outcome
from verifier.runtime import messages


@dataclass(frozen=True)
class Inner:
    number: int
    share: float


@dataclass(frozen=True)
class Outer:
    name: str
    path: Path
    inner: Inner
    sizes: tuple[int, ...]
    by_name: Mapping[str, Inner]
    figure: float | int | str | None = None
    anything: Json = None
    yes: bool = False


@dataclass(frozen=True)
class Nothing: ...


texts = st.text()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)
inners = st.builds(Inner, st.integers(), st.floats(allow_nan=False) | st.integers())
outers = st.builds(
    Outer,
    texts,
    st.just(Path(os.fsdecode(b"a\xff b"))),
    inners,
    st.lists(st.integers()).map(tuple),
    st.dictionaries(texts, inners),
    st.none() | st.integers() | st.floats(allow_nan=False) | texts,
    json_values,
    st.booleans(),
)


@given(outers)
def test_what_is_sent_is_what_comes(message: Outer) -> None:
    data = encode(message)
    assert b"\n" not in data
    assert decode(data, Nothing, Outer) == message


def test_numbers_that_are_none() -> None:
    assert math.isnan(decode(encode(Inner(1, math.nan)), Inner).share)
    assert decode(encode(Inner(1, -math.inf)), Inner).share == -math.inf


GOOD = Outer("n", Path("p"), Inner(1, 2.0), (1, 2), {"a": Inner(3, 4.0)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "Other"}, r"a message is 'Other'; expected was Outer or Nothing"),
        ({"kind": None}, r"a message is None; expected was Outer or Nothing"),
        ({"kind": ["Outer"]}, r"a message is \['Outer'\]; expected"),
        ({"nmae": "x"}, r"Outer has the unknown field 'nmae'; it has name, path, inner"),
        ({"name": 3}, r"Outer\.name is '3', which is no str"),
        ({"path": None}, r"Outer\.path is 'None', which is no Path"),
        ({"yes": 1}, r"Outer\.yes is '1', which is no bool"),
        ({"sizes": [1, "2"]}, r"Outer\.sizes\[1\] is '2', which is no int"),
        ({"sizes": [1, True]}, r"Outer\.sizes\[1\] is 'True', which is no int"),
        ({"sizes": 1}, r"Outer\.sizes is '1', which is no tuple"),
        ({"inner": {"number": 1}}, r"Outer\.inner has no field 'share'"),
        ({"inner": {"number": 1.5, "share": 1}}, r"Outer\.inner\.number is '1\.5', which is no int"),
        ({"by_name": {"a": {}}}, r"Outer\.by_name\.a has no field 'number'"),
        ({"by_name": []}, r"Outer\.by_name is '\[\]', which is no"),
        ({"figure": [1]}, r"Outer\.figure is '\[1\]', which is no float \| int \| str \| NoneType"),
    ],
)
def test_wrong_fields_are_named(change: dict[str, object], words: str) -> None:
    values = {**json.loads(encode(GOOD)), **change}
    with pytest.raises(MessageError, match=words):
        decode(json.dumps(values), Outer, Nothing)


@pytest.mark.parametrize("name", [field.name for field in fields(Outer)])
def test_every_field_must_be_there(name: str) -> None:
    """Also those that have a default: a sender that does not know a field is another program."""
    values = json.loads(encode(GOOD))
    del values[name]
    with pytest.raises(MessageError, match=f"Outer has no field '{name}'"):
        decode(json.dumps(values), Outer)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"3", b'"Outer"'])
def test_nonsense(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data, Outer)


@pytest.mark.parametrize("value", [object(), {1: 2}, b"bytes", {1, 2}])
def test_what_cannot_travel_is_named(value: object) -> None:
    with pytest.raises(MessageError, match=r"Outer\.anything"):
        encode(Outer("n", Path("p"), Inner(1, 2.0), (), {}, anything=value))  # type: ignore[arg-type]


KINDS: list[type[Message]] = [
    *messages.WORKER_MESSAGES,
    *messages.REQUESTS,
    *messages.REPLIES,
    messages.HandOver,
    RankHeartbeat,
    RankFailure,
]


def leaves(kind: object) -> set[object]:
    """The plain types that a field's type is made of."""
    if isinstance(kind, type) and is_dataclass(kind):
        return {leaf for inner in _types(kind).values() for leaf in leaves(inner)}
    inner = [arg for arg in get_args(kind) if arg is not ...]
    return {leaf for arg in inner for leaf in leaves(arg)} if get_origin(kind) else {kind}


def test_every_message_has_fields_that_can_be_checked() -> None:
    names = [kind.__name__ for kind in dict.fromkeys(KINDS)]
    assert len(set(names)) == len(names) > 15
    for kind in KINDS:
        assert leaves(kind) <= {str, int, float, bool, type(None), Path, Json}, kind
        if kind not in (messages.Standing, messages.Finished):
            assert Json not in leaves(kind), kind  # records are JSON; nothing else is


def test_an_outcome_travels() -> None:
    covers = {"real": True, "float32": False, "run": "", "reason": "x", "margin": None, "error": 0.5}
    outcome = Outcome(
        "sat",
        "found",
        "((X_0 1))",
        {"inputs": [0.1, 1 / 3], "margin": 0.5},
        seconds={"attack": 0.25},
        statistics={"rate": "nan", "deep": {"domains": [3, 4]}},
        covers=covers,
        notes=("a", "b"),
        error={"kind": "E", "message": "m"},
    )
    again = decode(encode(messages.Finished(outcome)), *messages.WORKER_MESSAGES)
    assert again == messages.Finished(outcome)
