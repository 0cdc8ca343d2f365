"""Whole lists of instances: every instance in its own process, one JSON line each, a table at the end."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.instances import Instance, existing, read_instances
from verifier.cli.watch import Signals, wait
from verifier.cli.worker import Job, Worker
from verifier.config import Config
from verifier.core.errors import InputError
from verifier.report.files import sha256
from verifier.report.record import Outcome, to_json, verify_record, versions
from verifier.report.summary import summary_table

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

_TEARDOWN_SECONDS = 10.0

Key = tuple[str, int, str, str]


def run_lists(
    lists: Sequence[Path],
    out: Path,
    cap: float | None,
    config: Config,
    resume: bool,
    jobs: int,
    verdicts: Path | None,
) -> int:
    """Answer every instance; returns the exit code.

    Args:
        lists: CSV files.
        out: JSON lines are appended here.
        cap: upper limit in seconds for every instance.
        resume: keep what ``out`` holds and do the rest.
        jobs: instances at a time.
        verdicts: CSV of true verdicts, to count wrong ones.
    """
    instances = [instance for path in lists for instance in read_instances(path)]
    truths = read_truths(verdicts, instances) if verdicts is not None else {}
    if out.exists() and out.stat().st_size and not resume:
        raise InputError(f"{out} already exists; give --resume to go on with it, or another --out")
    earlier = read_records(out, config.model_dump(mode="json")) if resume and out.exists() else {}
    todo = deque(instance for instance in instances if _key(instance) not in earlier)
    records = [earlier[_key(instance)] for instance in instances if _key(instance) in earlier]
    out.parent.mkdir(parents=True, exist_ok=True)
    session = _Session(config, cap, jobs)
    with open(out, "ab") as handle, Signals() as signals, _bar(len(instances)) as bar:
        bar.update(len(records))
        for record in session.records(todo, signals):
            handle.write(to_json(record).encode() + b"\n")
            handle.flush()
            records.append(record)
            solved = sum(record["verdict"] in ("sat", "unsat") for record in records)
            bar.update(1, f"{solved} solved")
        received = signals.received
    click.echo(summary_table(records, truths))
    return 0 if received is None else 128 + received


class _Session:
    """Keeps up to ``jobs`` workers busy."""

    def __init__(self, config: Config, cap: float | None, jobs: int) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 and config.threads == "auto" else None
        self._config = config if threads is None else config.model_copy(update={"threads": threads})
        self._recorded = config.model_dump(mode="json")
        self._cap, self._jobs = cap, jobs
        self._hashes: dict[Path, str] = {}
        self._versions = versions()

    def records(self, todo: deque[Instance], signals: Signals) -> Iterator[dict[str, Any]]:
        """The records in the order in which the instances end; stops early at a signal."""
        running: list[tuple[Instance, Worker]] = []
        try:
            while (todo or running) and signals.received is None:
                while todo and len(running) < self._jobs:
                    instance = todo.popleft()
                    try:
                        running.append((instance, Worker.start(self._job(instance))))
                    except InputError as error:
                        yield self._missing(instance, error)
                if not running:
                    continue
                wait([worker for _, worker in running], signals)
                if signals.received is not None:
                    break
                for item in [item for item in running if item[1].outcome is not None]:
                    running.remove(item)
                    yield self._finish(*item)
        finally:
            for _, worker in running:
                worker.close()

    def _limit(self, instance: Instance) -> float:
        return instance.timeout if self._cap is None else min(instance.timeout, self._cap)

    def _job(self, instance: Instance) -> Job:
        onnx = existing(instance.folder / instance.onnx, "network")
        vnnlib = existing(instance.folder / instance.vnnlib, "property")
        return Job(onnx, vnnlib, self._config, self._limit(instance), time.monotonic())

    def _finish(self, instance: Instance, worker: Worker) -> dict[str, Any]:
        outcome, seconds = worker.outcome, time.monotonic() - worker.job.start
        if outcome is None:
            raise RuntimeError("a worker without an outcome is not finished")
        worker.close()
        worker.process.reap(_TEARDOWN_SECONDS)
        files = (worker.job.onnx, worker.job.vnnlib)
        return self._record(instance, outcome, seconds, [self._hash(path) for path in files])

    def _missing(self, instance: Instance, error: InputError) -> dict[str, Any]:
        outcome = Outcome("error", str(error), error={"kind": type(error).__name__, "message": str(error)}, exit_code=2)
        return self._record(instance, outcome, 0.0, [None, None])

    def _record(
        self, instance: Instance, outcome: Outcome, seconds: float, hashes: Sequence[str | None]
    ) -> dict[str, Any]:
        return verify_record(
            outcome,
            onnx={"path": instance.onnx, "sha256": hashes[0]},
            vnnlib={"path": instance.vnnlib, "sha256": hashes[1]},
            timeout=self._limit(instance),
            config=self._recorded,
            seconds=seconds,
            versions=self._versions,
            extra={"category": instance.category, "instance": instance.index},
        )

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256(path)
        return self._hashes[path]


def _key(instance: Instance) -> Key:
    return instance.category, instance.index, instance.onnx, instance.vnnlib


def read_records(out: Path, config: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """What an earlier run left. A last line that a kill cut off is removed from the file.

    Raises:
        InputError: for a line that is no record, or a record made with another configuration.
    """
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found: dict[Key, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            key = (record["category"], record["instance"], record["onnx"]["path"], record["vnnlib"]["path"])
            made_with, _ = record["config"], (record["verdict"], record["seconds"]["total"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{out}:{number}: not a record of verifier run; give another --out") from None
        if made_with != config:
            raise InputError(f"{out}:{number}: made with another configuration; give the same one or another --out")
        found[key] = record
    if len(whole) < len(data):
        os.truncate(out, len(whole))
    return found


def read_truths(path: Path, instances: Sequence[Instance]) -> dict[tuple[str, str, str], str]:
    """True verdicts by category and the paths that records hold; the CSV's paths are relative to its own folder.

    Raises:
        InputError: when the file or a column is missing.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read verdicts {path}: {error}") from None
    folder = path.absolute().parent
    try:
        known = {((folder / r["onnx"]).resolve(), (folder / r["vnnlib"]).resolve()): r["verdict"] for r in rows}
    except (KeyError, TypeError):
        raise InputError(f"verdicts {path} must have the columns onnx, vnnlib and verdict") from None
    truths: dict[tuple[str, str, str], str] = {}
    for instance in instances:
        files = (instance.folder / instance.onnx).resolve(), (instance.folder / instance.vnnlib).resolve()
        if files in known:
            truths[instance.category, instance.onnx, instance.vnnlib] = known[files]
    return truths


def _bar(total: int) -> ProgressBar[Any]:
    """A bar on stderr; nothing in a pipe."""
    hidden = not sys.stderr.isatty()
    return click.progressbar(length=total, item_show_func=_as_shown, show_pos=True, hidden=hidden, file=sys.stderr)


def _as_shown(item: str | None) -> str | None:
    """The text beside the bar is the item itself."""
    return item
