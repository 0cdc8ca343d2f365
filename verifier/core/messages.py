"""Messages between processes: frozen dataclasses, as JSON while they travel.

A message is an object with the fields of its class and its class's name under ``kind``. Whoever reads one says which
classes it expects; every field is checked against its type, and one that is unknown, missing or of another type is an
error that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
else:
    Json = object

_KIND = "kind"
# Python's own types, and those that a value of them may come as.
_PLAIN: dict[object, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    NoneType: (NoneType,),
}


class Message(Protocol):
    """A dataclass whose fields are numbers, texts, paths, ``None``, :data:`Json`, other such dataclasses, and tuples
    ``tuple[T, ...]`` and mappings ``Mapping[str, T]`` of these."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


M = TypeVar("M", bound=Message)


class MessageError(ValueError):
    """What came is none of the expected messages, or a field of it is wrong."""


def encode(message: Message) -> bytes:
    """A message as one line of JSON, without the end of the line.

    Raises:
        MessageError: a field holds what has no place in a message.
    """
    values = {_KIND: type(message).__name__, **_written(message, type(message).__name__)}
    return json.dumps(values).encode()


def decode(data: bytes | bytearray | str, *kinds: type[M]) -> M:
    """The message that was encoded.

    Args:
        kinds: the classes that are expected, of different names.

    Raises:
        MessageError: it is none of these, or a field is unknown, missing or of another type.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise MessageError("a message is no JSON") from None
    if not isinstance(values, dict):
        raise MessageError("a message is no object")
    kind = values.pop(_KIND, None)
    for wanted in kinds:
        if wanted.__name__ == kind:
            return _dataclass(wanted, values, wanted.__name__)
    raise MessageError(f"a message is {kind!r}; expected was {' or '.join(k.__name__ for k in kinds)}")


def _written(value: object, where: str) -> dict[str, object]:
    return {name: _plain(held, f"{where}.{name}") for name, held in vars(value).items()}


def _plain(value: object, where: str) -> object:
    """A value in JSON's own types."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value):
        return _written(value, where)
    if isinstance(value, Mapping):
        return {_name(key, where): _plain(held, f"{where}.{key}") for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held, f"{where}[{i}]") for i, held in enumerate(value)]
    raise MessageError(f"{where} is of type {type(value).__name__}, which has no place in a message")


def _name(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise MessageError(f"{where} has the key {key!r}, which is no text")
    return key


@cache
def _types(kind: type) -> dict[str, object]:
    return get_type_hints(kind)


def _dataclass(kind: type[M], values: dict[str, object], where: str) -> M:
    known = {f.name: f for f in fields(kind) if f.init}
    for name in values:
        if name not in known:
            raise MessageError(f"{where} has the unknown field '{name}'; it has {', '.join(known) or 'none'}")
    for name in known:
        if name not in values:
            raise MessageError(f"{where} has no field '{name}'")
    return kind(**{name: _read(_types(kind)[name], value, f"{where}.{name}") for name, value in values.items()})


def _read(wanted: object, value: object, where: str) -> object:
    """A value of the type that a field is declared with."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Json:
        return value
    if origin in (Union, UnionType):
        return _one_of(inner, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], held, f"{where}[{i}]") for i, held in enumerate(value))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _read(inner[1], held, f"{where}.{key}") for key, held in value.items()}
    if isinstance(wanted, type) and is_dataclass(wanted) and isinstance(value, dict):
        return _dataclass(wanted, value, where)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if type(value) in _PLAIN.get(wanted, ()):
        return value
    raise MessageError(f"{where} is {str(value)[:80]!r}, which is no {_named(wanted)}")


def _one_of(kinds: Sequence[object], value: object, where: str) -> object:
    """A value of the first type that it fits."""
    for wanted in kinds:
        with suppress(MessageError):
            return _read(wanted, value, where)
    raise MessageError(f"{where} is {str(value)[:80]!r}, which is no {' | '.join(map(_named, kinds))}")


def _named(wanted: object) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted)
