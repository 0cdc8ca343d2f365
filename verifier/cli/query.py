"""One query from the command line: start the worker, show progress, write the results file and the JSON record."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from verifier.core.errors import InputError, VerifierError
from verifier.core.plugins import Plugin
from verifier.report.console import Console
from verifier.report.contents import Hashes
from verifier.report.files import is_stream, write_atomic
from verifier.report.formats import FORMATS, Answer, output_format, plugin_of, result_text
from verifier.report.record import Asked, Outcome, verify_record, versions
from verifier.runtime.handle import WorkerHandle
from verifier.runtime.query import Query
from verifier.runtime.watchdog import Signals, wait


@dataclass(frozen=True)
class Outputs:
    """Where the answer goes besides stdout.

    Attributes:
        results: in the form of the competition.
        json: as a record.
        more: names of formats, and files.
    """

    results: Path | None = None
    json: Path | None = None
    more: tuple[tuple[str, Path], ...] = ()

    def plugins(self) -> tuple[Plugin, ...]:
        """The formats of other packages, none of which is imported.

        Raises:
            ConfigError: a format does not exist.
        """
        return tuple(filter(None, (plugin_of(name) for name, _ in self.more)))

    def texts(self, verdict: str) -> list[tuple[Path, str]]:
        """What the files hold as long as there is no answer."""
        held = [(self.results, result_text(verdict)), (self.json, ""), *((path, "") for _, path in self.more)]
        return [(path, text) for path, text in held if path is not None]

    def begin(self, verdict: str) -> None:
        """Leave nothing of an earlier query: the results file holds this verdict, the record is empty.

        Pipes and devices get nothing before the end.

        Raises:
            InputError: one of them cannot be written.
        """
        for name in _ALWAYS:  # imported now: at the end of a query nothing should have to be
            FORMATS[name]
        for path, text in self.texts(verdict):
            if not is_stream(path):
                write_atomic(path, text)


# Formats that every query is answered in.
_ALWAYS = ("vnncomp", "line")


class Background:
    """Hashes of files and versions of packages, found while the worker works; what is not ready in time is ``None``."""

    def __init__(self, onnx: Path, vnnlib: Path) -> None:
        self._files = ((onnx, True), (vnnlib, False))
        self._hashes: dict[Path, str] = {}
        self._versions: dict[str, str | None] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        self._versions = versions()
        hashes = Hashes()
        for path, network in self._files:
            with contextlib.suppress(OSError):
                self._hashes[path] = hashes.of(path, network)

    def wait(self, until: float) -> None:
        """Until it is done, or ``time.monotonic()`` reaches ``until``."""
        self._thread.join(min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX))

    def file(self, path: Path) -> dict[str, Any]:
        return {"path": str(path), "sha256": self._hashes.get(path)}

    @property
    def versions(self) -> Mapping[str, str | None]:
        return self._versions or dict.fromkeys(("verifier", "python", "torch", "onnx", "onnxruntime"))


def run_query(
    query: Query,
    outputs: Outputs,
    verbose: bool,
    parent: int | None = None,
    silent: bool = False,
    start: Callable[[Query], WorkerHandle] = WorkerHandle.start,
) -> Outcome:
    """Answer one query and write everything but stdout.

    An answer whose files cannot be written in the end is an answer all the same: stderr names them, and the exit code
    becomes 2.

    Args:
        parent: process id of the calling script; the query ends with it.
        silent: show nothing at all.
        start: where the worker comes from.
    """
    outputs.begin("unknown")
    end = None if query.timeout is None else query.start + query.timeout
    console = Console(sys.stderr, sys.stderr.isatty() and not silent, verbose, query.start, end)
    with Signals() as signals:
        worker = start(query)
        results = outputs.results
        if results is not None and not is_stream(results):
            worker.told = partial(_write_standing, results)
        background = Background(query.onnx, query.vnnlib) if outputs.json is not None or outputs.more else None

        def tick() -> None:
            console.show(worker.phase, {"rate": worker.rate, **worker.figures}, worker.notes)

        wait([worker], signals, parent, tick if console.wanted else None)
        outcome = worker.outcome or worker.cut("unknown", "the query ended without an outcome", 1)
        answer = Answer(outcome, lambda: _recorded(query, outcome, background, end, outputs.plugins()))
        written = outputs.results is None or write_answer("vnncomp", outputs.results, answer)
        console.show(worker.phase, worker.figures, worker.notes)
        console.close()
        for name, path in (*([] if outputs.json is None else [("json", outputs.json)]), *outputs.more):
            written = write_answer(name, path, answer) and written
        worker.close()
    if query.proof is not None:  # a worker that was ended leaves it
        with contextlib.suppress(OSError):
            query.proof.with_name(query.proof.name + ".part").unlink(missing_ok=True)
    console.line(FORMATS["line"].render(answer).rstrip("\n"))
    if outcome.trace and verbose:
        click.echo(outcome.trace, err=True, nl=False)
    return outcome if written else replace(outcome, written=False, exit_code=outcome.exit_code or InputError.exit_code)


def _write_standing(results: Path, found: Outcome) -> None:
    """An answer that holds whatever comes; what cannot be written now is tried again at the end."""
    with contextlib.suppress(InputError):
        write_atomic(results, result_text(found.verdict))


def write_answer(name: str, path: Path, answer: Answer) -> bool:
    """Write in a format at the end of a query; whether it worked, and stderr says why not."""
    try:
        text = output_format(name).render(answer)
    except VerifierError as error:
        click.echo(f"Error: {error}", err=True)
        return False
    except Exception as error:
        if name in FORMATS:
            raise
        click.echo(f"Error: {path}: the {plugin_of(name)} failed: {type(error).__name__}: {error}", err=True)
        return False
    return write_last(path, text)


def write_last(path: Path, text: str) -> bool:
    """Write at the end of a query; whether it worked, and stderr says why not."""
    try:
        write_atomic(path, text)
    except InputError as error:
        click.echo(f"Error: {error}", err=True)
        return False
    return True


def _recorded(
    query: Query, outcome: Outcome, background: Background | None, end: float | None, plugins: tuple[Plugin, ...]
) -> dict[str, Any]:
    """The JSON record of a finished query, at ``end`` with what is known by then."""
    background = background or Background(query.onnx, query.vnnlib)
    background.wait(float("inf") if end is None else end - 0.1)
    asked = Asked(
        onnx=background.file(query.onnx),
        vnnlib=background.file(query.vnnlib),
        timeout=query.timeout,
        config=query.config.model_dump(mode="json"),
        versions=background.versions,
    )
    return verify_record(outcome, asked, time.monotonic() - query.start, plugins=plugins)
