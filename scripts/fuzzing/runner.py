"""Runs kinds of cases in worker processes, each case from a seed of its own, and collects what they find.

A worker tells on a pipe what it begins, so that a case that hangs or takes the process down is a finding too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.measure import ROOT, environment

# Shares of the time.
KINDS = {
    "search": 0.3,
    "frontend": 0.15,
    "numerics": 0.2,
    "vnnlib": 0.05,
    "files": 0.08,
    "ranks": 0.09,
    "warm": 0.06,
    "parts": 0.07,
}
_LATER = ("ranks", "warm")
_HANG = 150.0  # seconds without a word from a worker
_REDUCE = 30.0  # seconds for making one finding small


# ------------------------------------------------------------------------------------------------------- in the worker


def work(
    kinds: Sequence[str], seed: int, first: dict[str, int], stride: int, device: str, until: float, ignore: str
) -> None:
    """Cases of all kinds in turn, by their shares of the time; speaks JSON lines on stdout.

    Args:
        first: number of the first case of every kind.
        stride: between the cases of this worker.
        until: ``time.time()`` of the end.
        ignore: a pattern; complaints that it matches are not reported.
    """
    import numpy as np

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with what we say
    say = lambda **words: print(json.dumps(words), file=stdout)  # noqa: E731
    _prepare(device)
    modules = {kind: importlib.import_module(f"scripts.fuzzing.{kind}") for kind in kinds}
    # Kinds that start processes come when the others have had a minute.
    spent = {kind: 60 * KINDS[kind] if kind in _LATER and len(kinds) > 2 else 0.0 for kind in kinds}
    index, told = dict(first), 0
    while time.time() < until or index == first:  # one case at least, however slow the start was
        kind = min(kinds, key=lambda k: spent[k] / KINDS[k])
        say(begin=kind, index=index[kind])
        began, cases = time.monotonic(), 0
        rng = np.random.default_rng([seed, list(KINDS).index(kind), index[kind]])
        for found in _guarded(modules[kind].run(rng, device)):
            cases += 1
            if found is not None:
                where = f"{kind} {seed} {index[kind]}"
                words = _described(kind, found, where, told < 8, ignore)
                if words is not None:
                    told += 1
                    say(kind=kind, index=index[kind], **words)
                say(begin=kind, index=index[kind])
            if time.time() > until + 5 and index != first:
                break
        spent[kind] += time.monotonic() - began
        say(done=kind, index=index[kind], cases=cases, seconds=time.monotonic() - began)
        index[kind] += stride


def _guarded(found: Iterator[Any]) -> Iterator[Any]:
    """What a kind finds; its own failure is a finding as well."""
    from scripts.fuzzing import checks

    try:
        yield from found
    except Exception as error:
        yield (None, checks.Complaint("crash", f"outside of a query: {checks.last_words(error)}"))


def _prepare(device: str) -> None:
    """Everything that would make the first answer slow."""
    import scipy.optimize  # noqa: F401
    import torch

    import verifier

    torch.set_num_threads(1)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    verifier.compute_bounds(module, [[0.0, 0.0]], [[1.0, 1.0]], "alpha-crown", config={"device": device})


def _described(kind: str, found: Any, where: str, reduce: bool, ignore: str) -> dict[str, str] | None:
    """What was found, small, as words and as a test; None when it is ignored or did not come again."""
    from scripts.fuzzing import checks, ranks, reducer, search, written

    complaint = found.complaint if isinstance(found, search.Found) else found[1]
    if ignore and re.search(ignore, complaint.detail):
        return None
    if not isinstance(found, search.Found) and found[0] is None:
        return {"what": complaint.what, "detail": complaint.detail, "test": ""}
    if not isinstance(found, search.Found):
        write: Callable[..., str] = {
            "frontend": written.test_of_node,
            "vnnlib": written.test_of_text,
            "files": written.test_of_files,
            "parts": written.test_of_part,
        }[kind]
        return {"what": complaint.what, "detail": complaint.detail, "test": write(found[0], complaint, where)}
    query, label = found.query, ""
    examine: Callable[[Any], Any] = {"ranks": ranks.confirmed}.get(kind, checks.examine)
    if kind != "warm" and reduce:
        query, complaint, again = reducer.reduced(query, complaint, examine, _REDUCE)
        if not again and complaint.what == "late":
            return None  # a busy machine
        label = "" if again else " (only in a process that has answered other queries)"
    try:
        test = written.test_of_query(query, complaint, where)
    except Exception as error:
        test = f"# no test could be written: {type(error).__name__}: {error}\n"
    return {"what": complaint.what, "detail": f"{complaint.detail}{label}; {query.label}", "test": test}


# ------------------------------------------------------------------------------------------------------- around workers


@dataclass
class Tally:
    """What came out."""

    cases: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    first: dict[str, int]
    doing: tuple[str, int] = ("start", 0)
    heard: float = 0.0
    buffer: str = ""


def fuzz(
    kinds: Sequence[str], seed: int, minutes: float, device: str, jobs: int, ignore: str, show: Callable[[str], None]
) -> Tally:
    """All kinds for so long in so many processes."""
    until = time.time() + 60 * minutes
    tally = Tally()
    workers = [_start(n, dict.fromkeys(kinds, n), kinds, seed, jobs, device, until, ignore) for n in range(jobs)]
    while workers:
        ready = select.select([w.process.stdout for w in workers], [], [], 1.0)[0]
        for worker in list(workers):
            ended = False
            if worker.process.stdout in ready:
                assert worker.process.stdout is not None
                data = os.read(worker.process.stdout.fileno(), 1 << 20).decode(errors="replace")
                ended = not data
                worker.buffer += data
                *lines, worker.buffer = worker.buffer.split("\n")
                for line in lines:
                    _heard(worker, json.loads(line), tally, show, jobs)
            silent = time.monotonic() - worker.heard > _HANG
            if not ended and not silent:
                continue
            if silent:
                os.killpg(worker.process.pid, signal.SIGKILL)
            code = worker.process.wait()
            workers.remove(worker)
            kind, index = worker.doing
            if code != 0 or silent:
                what = "hang" if silent else "crash"
                detail = f"no word for {_HANG:g} s" if silent else f"the process ended with {code}"
                if not (ignore and re.search(ignore, detail)):
                    show(f"{what}: {kind} {seed} {index}: {detail}")
                    tally.findings.append({"kind": kind, "index": index, "what": what, "detail": detail, "test": ""})
                if kind in worker.first:
                    worker.first[kind] = index + jobs
                    if time.time() < until:
                        again = _start(worker.number, worker.first, kinds, seed, jobs, device, until, ignore)
                        workers.append(again)
    return tally


def _start(
    number: int,
    first: dict[str, int],
    kinds: Sequence[str],
    seed: int,
    jobs: int,
    device: str,
    until: float,
    ignore: str,
) -> _Worker:
    given = json.dumps([list(kinds), seed, first, jobs, device, until, ignore])
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.fuzzing.runner", given],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=environment({"OMP_NUM_THREADS": "1"}),
        start_new_session=True,
    )
    return _Worker(number, process, first, heard=time.monotonic())


def _heard(worker: _Worker, words: dict[str, Any], tally: Tally, show: Callable[[str], None], jobs: int) -> None:
    worker.heard = time.monotonic()
    if "begin" in words:
        worker.doing = (words["begin"], words["index"])
    elif "done" in words:
        tally.cases[words["done"]] += words["cases"]
        tally.seconds[words["done"]] += words["seconds"]
        worker.first[words["done"]] = words["index"] + jobs
    else:
        tally.findings.append(words)
        show(f"{words['what']}: {words['kind']}, case {words['index']}: {words['detail'][:600]}")


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
