"""How an answer is written, by name: one format per file of this folder, which has a function ``render``.

Other packages add theirs in the group ``verifier.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from verifier.core.errors import ConfigError
from verifier.core.folders import FORMATS
from verifier.core.formats import READ
from verifier.core.plugins import FORMATS as GROUP
from verifier.core.plugins import Plugin, foreign, lookup
from verifier.report.record import Outcome


@dataclass(frozen=True)
class Answer:
    """What a query ended with.

    Attributes:
        outcome: verdict, reason, witness and figures.
        recorded: makes the record, which waits for the hashes of the files.
    """

    outcome: Outcome
    recorded: Callable[[], Mapping[str, Any]] = dict

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The JSON record as a mapping, see ``schemas/verify.schema.json``."""
        return self.recorded()


class OutputFormat(Protocol):
    """Writes an answer as text. A module with a function ``render`` is one."""

    def render(self, answer: Answer, /) -> str:
        """All that the file holds."""
        ...


def output_format(name: str) -> OutputFormat:
    """The format of a name; one of another package is imported.

    Raises:
        ConfigError: there is none, or it writes nothing.
    """
    found = lookup(GROUP, name, FORMATS, READ)
    if not callable(getattr(found, "render", None)):
        raise ConfigError(f"the format '{name}' writes nothing: it has no function 'render'")
    return found


def plugin_of(name: str) -> Plugin | None:
    """Whose format it is, without importing it; None for ours.

    Raises:
        ConfigError: there is none of this name.
    """
    if name in FORMATS:
        return None
    others = foreign(GROUP, {*FORMATS, *READ})
    if name not in others:
        lookup(GROUP, name, FORMATS, READ)  # says what there is
    return others[name]


def result_text(verdict: str, witness: str | None = None) -> str:
    """The text of a VNN-COMP result file: the verdict, and after ``sat`` the witness."""
    return f"{verdict}\n" if witness is None else f"{verdict}\n{witness.rstrip()}\n"
