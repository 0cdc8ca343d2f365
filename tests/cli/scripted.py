"""The command line with a scripted solver: ``python -m tests.cli.scripted ARGS``.

The text of the property file says what the solver does: words are separated by blanks, ``sleep S``, ``spin S`` (never
looks at the clock, as in a library), ``phase NAME``, ``open N``, ``note TEXT``, ``print TEXT``, then one of ``sat``,
``unsat``, ``unknown``, ``mismatch``, ``wait`` (until the deadline), ``crash``, ``kill``, ``segv``, ``input``,
``unsupported``, ``memory``. ``state FILE`` writes what the process looks like as JSON (with torch after ``torch``), and
``disturb`` changes all of it.

The warm-up of a resident worker does what the variable SCRIPTED_WARM_UP says: nothing, ``crash`` or ``sleep``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

import verifier.api
import verifier.runtime.warm_up
from verifier.api import Terms
from verifier.cli.main import main
from verifier.config import Config
from verifier.core.errors import InputError, MemoryExceeded, UnsupportedError
from verifier.core.result import Result, Verdict, Witness

WITNESS = Witness(np.array([0.1, 1 / 3]), np.array([-2.5]), margin=0.5, case=1)


def answer(network: Path, property: Path, config: Config, terms: Terms) -> Result:
    deadline, progress = terms.deadline, terms.progress
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
        elif word == "state":
            path = Path(next(words))
            path.with_suffix(".part").write_text(json.dumps(state()))
            path.with_suffix(".part").rename(path)
        elif word == "torch":
            importlib.import_module("torch")
        elif word == "disturb":
            disturb()
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
            return Result(
                Verdict.SAT,
                "found",
                WITNESS,
                False,
                {"attack": 0.25},
                {"domains": 3, "rate": float("nan")},
                device="cpu",
            )
        elif word == "unsat":
            return Result(Verdict.UNSAT, "proved", None, True, {}, {"bounds": {"worst": 0.5}}, device="cpu")
        elif word == "unknown":
            return Result(Verdict.UNKNOWN, "1 domain left, final gap 0.1", device="cpu")
        elif word == "mismatch":
            return Result(Verdict.ERROR, "the graph does not agree", device="cpu")
        else:
            raise AssertionError(word)
    raise AssertionError("the script has no end")


def state() -> dict[str, object]:
    """What one query could leave to the next, and what a query inherits."""
    torch = sys.modules.get("torch")
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgrp(),
        "folder": os.getcwd(),
        "variables": dict(os.environ),
        "streams": [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "torch": torch and [torch.get_num_threads(), str(torch.get_default_dtype()), torch.initial_seed() == 1234],
        "draws": [random.random() == SEEDED.random(), float(np.random.random()) == 0.5488135039273248],
        "handlers": len(logging.getLogger("verifier").handlers),
        "modules": "disturbed" in sys.modules,
    }


SEEDED = random.Random(0)


def disturb() -> None:
    """Change everything that :func:`state` shows."""
    import torch

    torch.set_num_threads(torch.get_num_threads() + 3)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1234)
    random.seed(0)
    np.random.seed(0)
    logging.getLogger("verifier").addHandler(logging.NullHandler())
    sys.modules["disturbed"] = sys
    os.environ["DISTURBED"] = "1"
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def warm_up() -> None:
    """Quick, or unlucky."""
    match os.environ.get("SCRIPTED_WARM_UP"):
        case "crash":
            raise ZeroDivisionError("cold")
        case "sleep":
            time.sleep(60)


if __name__ == "__main__":
    verifier.runtime.warm_up.warm_up = warm_up
    verifier.api.answer = answer  # type: ignore[assignment]
    main(sys.argv[1:])
