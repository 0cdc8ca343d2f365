"""Reads the head of a VNN-LIB 2.0 text: its version and the networks that it declares."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from verifier.spec.v2.syntax import REAL, TYPES, Declared, Kind, Tensor
from verifier.spec.v2.tokens import Cursor, Token

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
_DIMENSION = re.compile(r"[0-9]{1,18}", re.ASCII)
_VERSION = re.compile(r"<([0-9]{1,9})\.([0-9]{1,9})>", re.ASCII)
_ORDER = (Kind.INPUT, Kind.HIDDEN, Kind.OUTPUT)
MAX_ELEMENTS = 2**27  # of all tensors of a query


@dataclass
class Names:
    """What was declared so far; names of networks and tensors are all different."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    networks: dict[str, Declared] = field(default_factory=dict)
    elements: int = 0

    def take(self, cursor: Cursor, what: str) -> Token:
        """A new name.

        Raises:
            InputError: it is none, or taken.
        """
        token = cursor.take()
        if not NAME.fullmatch(token.text):
            raise cursor.text.wrong(
                token, f"{token.shown} is no name for {what}; use letters, digits and '_', beginning with a letter"
            )
        if token.text in self.tensors or token.text in self.networks:
            raise cursor.text.wrong(token, f"{token.shown} is declared twice; names of networks and tensors are unique")
        return token


def read_version(cursor: Cursor) -> None:
    """``(vnnlib-version <2.0>)``.

    Raises:
        InputError: something else; UnsupportedPropertyError: another version.
    """
    cursor.expect("(")
    cursor.expect("vnnlib-version", "; a query begins with (vnnlib-version <2.0>)")
    token = cursor.take()
    match = _VERSION.fullmatch(token.text)
    if match is None:
        raise cursor.text.wrong(token, f"{token.shown} is no version; write <2.0>")
    if match.group(1) != "2":
        raise cursor.text.unsupported(
            token, f"version {token.text[1:-1]} is not supported; use 2.0, or the form of 1.0"
        )
    cursor.expect(")")


def read_network(cursor: Cursor, names: Names) -> Declared:
    """The rest of ``(declare-network NAME ...)``, after its first two words; adds what it declares to the names."""
    name = names.take(cursor, "a network")
    relation = {"equal-to": "", "isomorphic-to": ""}
    other: Token | None = None
    tensors: list[Tensor] = []
    while cursor.next.text == "(":
        opening = cursor.take()
        word = cursor.take()
        kind = next((kind for kind in Kind if word.text == f"declare-{kind.value}"), None)
        if word.text in relation:
            if other is not None or tensors:
                raise cursor.text.wrong(
                    opening, f"{word.shown} must stand once and directly after the network's name, before its tensors"
                )
            other = cursor.take()
            relation[word.text] = _referred(cursor, names, name, other)
            cursor.expect(")")
        elif kind is None:
            raise cursor.text.wrong(
                word,
                f"{word.shown} found where equal-to, isomorphic-to, declare-input, declare-hidden or declare-output "
                "should stand",
            )
        else:
            if tensors and _ORDER.index(kind) < _ORDER.index(tensors[-1].kind):
                raise cursor.text.wrong(word, "declare inputs first, then hidden nodes, then outputs")
            tensors.append(_tensor(cursor, names, kind))
    cursor.expect(")")
    found = Declared(name, relation["equal-to"], relation["isomorphic-to"], tuple(tensors))
    for kind in (Kind.INPUT, Kind.OUTPUT):
        if not found.of(kind):
            raise cursor.text.wrong(name, f"the network {name.shown} declares no {kind.value}")
    if other is not None:
        _check_like(cursor, names.networks[other.text], found, other)
    names.networks[name.text] = found
    return found


def _referred(cursor: Cursor, names: Names, name: Token, other: Token) -> str:
    earlier = names.networks.get(other.text)
    if earlier is None:
        what = "itself" if other.text == name.text else f"{other.shown}, which is not declared before it"
        raise cursor.text.wrong(other, f"the network {name.shown} refers to {what}")
    if earlier.equal_to or earlier.isomorphic_to:
        first = earlier.equal_to or earlier.isomorphic_to
        raise cursor.text.wrong(other, f"{other.shown} refers to another network itself; refer to '{first}'")
    return other.text


def _tensor(cursor: Cursor, names: Names, kind: Kind) -> Tensor:
    """The rest of ``(declare-... NAME TYPE [d, ...])``."""
    name = names.take(cursor, "a tensor")
    dtype = cursor.take()
    known = REAL if dtype.text in ("real", "Real") else dtype.text
    if known not in TYPES:
        raise cursor.text.wrong(dtype, f"{dtype.shown} is no element type; use {REAL}, float32, float64, ...")
    at = cursor.next
    shape = read_numbers(cursor, "a size", allow_empty=True)
    if 0 in shape:
        raise cursor.text.wrong(at, f"the shape {list(shape)} has a size of zero; sizes are at least 1")
    node = ""
    if kind is Kind.HIDDEN:
        text = cursor.take()
        if not text.text.startswith('"'):
            raise cursor.text.wrong(text, f'{text.shown} found where the name of an ONNX node in "..." should stand')
        node = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m.group(1), m.group(1)), text.text[1:-1])
        node = node.encode("latin-1").decode("utf-8", "replace")
    if cursor.next.text == "initialized":
        raise cursor.text.unsupported(cursor.next, "'initialized' is not supported; bound the input instead")
    cursor.expect(")")
    found = Tensor(name, kind, known, dtype.text, shape, names.elements, node)
    names.elements += math.prod(shape)
    if names.elements > MAX_ELEMENTS:
        raise cursor.text.unsupported(name, f"the tensors have more than {MAX_ELEMENTS:,} elements")
    names.tensors[name.text] = found
    return found


def read_numbers(cursor: Cursor, what: str, allow_empty: bool = False) -> tuple[int, ...]:
    """``[2,3]``."""
    cursor.expect("[")
    found: list[int] = []
    if allow_empty and cursor.next.text == "]":
        cursor.take()
        return ()
    while True:
        token = cursor.take()
        if not _DIMENSION.fullmatch(token.text):
            raise cursor.text.wrong(token, f"{token.shown} is not {what}; it is a whole number without a sign")
        found.append(int(token.text))
        if cursor.next.text == "]":
            cursor.take()
            return tuple(found)
        cursor.expect(",")


def _check_like(cursor: Cursor, first: Declared, found: Declared, other: Token) -> None:
    """Inputs and outputs of related networks have the same shapes, those of equal ones also the same types."""
    for kind in (Kind.INPUT, Kind.OUTPUT):
        a, b = first.of(kind), found.of(kind)
        if len(a) != len(b):
            raise cursor.text.wrong(
                other, f"'{found.name.text}' has {len(b)} {kind.value}s but {other.shown} has {len(a)}"
            )
        for x, y in zip(a, b, strict=True):
            if x.shape != y.shape:
                raise cursor.text.wrong(
                    y.name,
                    f"the shape {list(y.shape)} of {y.name.shown} is not {list(x.shape)}, that of {x.name.shown}",
                )
            if found.equal_to and x.dtype != y.dtype:
                raise cursor.text.wrong(
                    y.name, f"the type {y.written} of {y.name.shown} is not {x.written}, that of {x.name.shown}"
                )
    if found.equal_to:
        own = {tensor.node: tensor for tensor in found.of(Kind.HIDDEN)}
        for x in first.of(Kind.HIDDEN):
            y = own.get(x.node)
            if y is not None and (x.shape, x.dtype) != (y.shape, y.dtype):
                raise cursor.text.wrong(y.name, f"{y.name.shown} differs from {x.name.shown}, the same hidden node")
