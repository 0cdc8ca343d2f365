"""The command line with a rank that fails: ``python -m tests.parallel.failing HOW verify ...``.

HOW says what rank 1 does when the query reaches a certain phase: ``raise`` or ``exit`` in the search on neurons,
``memory`` there, ``sleep`` in the root bounds, ``bounds`` in a query for bounds alone, ``late`` after the verdict (when
all say what memory they took), ``start`` before it has joined. With ``impatient`` none fails, but all give up a rank
that has been silent for ``PATIENCE`` seconds.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import verifier.api
from verifier.cli.main import main
from verifier.core.errors import MemoryExceeded
from verifier.parallel import heartbeat
from verifier.runtime import handle

PATIENCE = 8.0


def fail(how: str) -> None:
    if how == "raise":
        raise ZeroDivisionError("planted")
    if how == "memory":
        raise MemoryExceeded("planted")
    if how == "sleep":
        time.sleep(600)
    os._exit(7)


def plant(how: str) -> None:
    if how == "impatient":
        return
    from verifier.solver.boxes import BoundBoxes
    from verifier.solver.phases import BoundRoot, Memory, Phase, RankState, SplitNeurons

    kinds: dict[str, type[Phase[Any]]] = {"sleep": BoundRoot, "late": Memory, "bounds": BoundBoxes}
    kind = kinds.get(how, SplitNeurons)
    run = kind.run

    def planted(phase: Phase[Any], state: RankState) -> Any:
        if state.world.rank == 1:
            fail(how)
        return run(phase, state)

    kind.run = planted  # type: ignore[method-assign]


if __name__ == "__main__":
    how, *arguments = sys.argv[1:]
    if how == "impatient":
        heartbeat.SILENCE_SECONDS = handle.SILENCE_SECONDS = PATIENCE
    verifier.api.RANK_COMMAND = ("-m", "tests.parallel.failing", how, "rank")  # type: ignore[assignment]
    if arguments[0] == "rank":
        if how == "start":
            os._exit(7)
        plant(how)
    main(arguments)
