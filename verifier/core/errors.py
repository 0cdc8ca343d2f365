"""Errors that a user can meet. Each message is one sentence: what is wrong, where, what to do."""

from __future__ import annotations


class VerifierError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line ends with.

    As text it is one line: what cannot be printed, as it may come from names in a file, is escaped.
    """

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with every character that is not printable (ends of lines, controls, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(VerifierError):
    """Bad usage or a malformed file (network, property, results, CSV)."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong; the message names the nearest known key."""


class UnsupportedError(VerifierError):
    """A well-formed network or property uses something the verifier does not handle."""

    exit_code = 3


class UnsupportedOpError(UnsupportedError):
    """The network contains operators without a rule; all offending nodes are named at once."""


class UnsupportedPropertyError(UnsupportedError):
    """The property uses a construct outside the supported fragment; the line is named."""


class PluginFailed(VerifierError):
    """Code of another package raised an exception; the message names the package and what it was doing."""


class DeadlineExceeded(VerifierError):
    """The time limit was reached; the pipeline turns it into the verdict ``timeout``."""


class MemoryExceeded(VerifierError):
    """The memory budget cannot hold even the smallest chunk; the verdict is ``unknown``."""


class RankFailed(VerifierError):
    """A process of a distributed run was lost; the message names rank and phase."""
