"""Progress of a running query; the solver reports figures without knowing who listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from verifier.core.result import Result


class Progress(Protocol):
    """A listener. Calls are cheap and may be made often; the listener thins them out.

    Figures have plain names and numbers. The console shows ``open`` and ``done`` (domains), ``worst`` (the worst bound)
    and how fast ``domains`` (bounded so far) grows; the JSON record of a run that was cut off holds the last values.
    """

    def phase(self, name: str) -> None:
        """A new phase begins (``load``, ``attack``, ``root bounds``, ``branch and bound``, ...)."""
        ...

    def update(self, **figures: float | int | str | None) -> None:
        """New values of some figures; the others stay as they were."""
        ...

    def standing(self, result: Result) -> None:
        """An ``unsat`` that stands, whatever happens, while it is tried to make it cover more."""
        ...


class SilentProgress:
    """Nobody listens."""

    def phase(self, name: str) -> None:
        pass

    def update(self, **figures: float | int | str | None) -> None:
        pass

    def standing(self, result: Result) -> None:
        pass
