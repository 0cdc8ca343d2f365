"""How a running query says what it is doing; the solver reports figures and never knows who listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

Figure = float | int | str | None | Sequence[Mapping[str, str]]


class Progress(Protocol):
    """A listener. Both calls are cheap and may be made often; the listener thins them out.

    Figures have plain names and numbers. The console shows ``open`` and ``done`` (domains), ``worst`` (the worst bound)
    and how fast ``domains`` (bounded so far) grows; the JSON record of a run that was cut off holds the last values.
    ``plugins`` lists what other packages bring to the query.
    """

    def phase(self, name: str) -> None:
        """A new phase begins (``load``, ``attack``, ``root bounds``, ``branch and bound``, ...)."""
        ...

    def update(self, **figures: Figure) -> None:
        """New values of some figures; the others stay as they were."""
        ...


class SilentProgress:
    """Nobody listens."""

    def phase(self, name: str) -> None:
        pass

    def update(self, **figures: Figure) -> None:
        pass
