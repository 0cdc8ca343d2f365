"""Words of a VNN-LIB 2.0 text, and errors that name line and column."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedPropertyError

_TOKEN = re.compile(
    r"(?P<skip>\s+|;[^\r\n]*)|(?P<text>\"(?:[^\"\\]|\\.)*\")|(?P<version><[^\s()\[\]\"<>=;]+>)"
    r"|(?P<mark>[()\[\],])|(?P<word>[^\s()\[\],\";]+)",
    re.ASCII | re.DOTALL,
)
_CHECK_EVERY = 4096
_SHOWN = 40
END = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A word, a bracket, a comma or a text in quotation marks, and its offset."""

    text: str
    position: int

    @property
    def shown(self) -> str:
        """For messages."""
        if self.text == END:
            return "the end of the file"
        return f"'{self.text}'" if len(self.text) <= _SHOWN else f"'{self.text[: _SHOWN - 3]}...'"


class Text:
    """A file's text, one character per byte."""

    def __init__(self, name: str, data: bytes, deadline: Deadline | None = None) -> None:
        self.name = name
        self.characters = data.decode("latin-1")
        self.deadline = deadline

    def at(self, position: int) -> str:
        """``file, line n, column m`` of an offset, both from 1."""
        before = self.characters.count("\n", 0, position)
        column = position - (self.characters.rfind("\n", 0, position) + 1)
        return f"{self.name}, line {before + 1}, column {column + 1}"

    def wrong(self, token: Token | int, message: str) -> InputError:
        """The error of a text that the grammar or the types do not allow."""
        return InputError(f"{self.at(token if isinstance(token, int) else token.position)}: {message}")

    def unsupported(self, token: Token | int, message: str) -> UnsupportedPropertyError:
        """The error of what is correct, but outside of what is handled."""
        return UnsupportedPropertyError(f"{self.at(token if isinstance(token, int) else token.position)}: {message}")

    def tokens(self) -> Iterator[Token]:
        """All words in order, then :data:`END` without end.

        Raises:
            InputError: a quotation mark is never closed.
        """
        position, count, end = 0, 0, len(self.characters)
        while position < end:
            match = _TOKEN.match(self.characters, position)
            if match is None:
                raise self.wrong(position, "the quotation mark here is never closed")
            if match.lastgroup != "skip":
                yield Token(match.group(), position)
                count += 1
                if self.deadline is not None and count % _CHECK_EVERY == 0:
                    self.deadline.check(f"the reading of {self.name}")
            position = match.end()
        while True:
            yield Token(END, end)


class Cursor:
    """Reads tokens one by one."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self._tokens = text.tokens()
        self.next = next(self._tokens)

    def take(self) -> Token:
        """The next token, which is passed."""
        taken, self.next = self.next, next(self._tokens)
        return taken

    def expect(self, wanted: str, why: str = "") -> Token:
        """Pass a certain token.

        Raises:
            InputError: another one stands there.
        """
        if self.next.text != wanted:
            raise self.text.wrong(self.next, f"{self.next.shown} found where '{wanted}' should stand{why}")
        return self.take()
