"""The command line with a scripted solver: ``python -m tests.cli.scripted ARGS``.

The text of the property file says what the solver does: words are separated by blanks, ``sleep S``, ``spin S`` (never
looks at the clock, as in a library), ``phase NAME``, ``open N``, ``note TEXT``, ``print TEXT``, then one of ``sat``,
``unsat``, ``unknown``, ``mismatch``, ``wait`` (until the deadline), ``crash``, ``kill``, ``segv``, ``input``,
``unsupported``, ``memory``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import verifier.api
from verifier.cli.main import main
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, MemoryExceeded, UnsupportedError
from verifier.core.progress import Progress
from verifier.core.result import Result, Verdict, Witness

WITNESS = Witness(np.array([0.1, 1 / 3]), np.array([-2.5]), margin=0.5, case=1)


def answer(
    network: Path, property: Path, config: Config, deadline: Deadline, progress: Progress, **_: object
) -> Result:
    words = iter(property.read_text().split())
    for word in words:
        if word == "sleep":
            time.sleep(float(next(words)))
        elif word == "spin":
            until = time.monotonic() + float(next(words))
            while time.monotonic() < until:
                pass
        elif word == "phase":
            progress.phase(next(words))
        elif word == "open":
            progress.update(open=int(next(words)), worst=-0.5, domains=50)
        elif word == "note":
            logging.getLogger("verifier.solver").warning(next(words))
        elif word == "print":
            print(next(words), flush=True)
        elif word == "wait":
            while True:
                time.sleep(0.01)
                deadline.check("scripted search")
        elif word == "crash":
            raise ZeroDivisionError("scripted")
        elif word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif word == "input":
            raise InputError("bad line 3")
        elif word == "unsupported":
            raise UnsupportedError("no such op")
        elif word == "memory":
            raise MemoryExceeded("too small")
        elif word == "sat":
            return Result(Verdict.SAT, "found", WITNESS, False, {"attack": 0.25}, {"domains": 3, "rate": float("nan")})
        elif word == "unsat":
            return Result(Verdict.UNSAT, "proved", None, True, {}, {"bounds": {"worst": 0.5}})
        elif word == "unknown":
            return Result(Verdict.UNKNOWN, "1 domain left, final gap 0.1")
        elif word == "mismatch":
            return Result(Verdict.ERROR, "the graph does not agree")
        else:
            raise AssertionError(word)
    raise AssertionError("the script has no end")


if __name__ == "__main__":
    verifier.api.answer = answer  # type: ignore[assignment]
    verifier.api.resolve_device = lambda name: "cpu"
    main(sys.argv[1:])
