"""Whole lists of instances: every instance in its own process, one JSON line each, a table at the end."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.instances import Instance, existing, read_instances
from verifier.cli.ledger import DECIDED, Key, Ledger, Wanted, key_of
from verifier.cli.watch import Signals, wait
from verifier.cli.worker import Job, Worker
from verifier.config import Config
from verifier.core.errors import InputError, printable
from verifier.report.contents import Hashes
from verifier.report.record import Outcome, verify_record, versions
from verifier.report.summary import summary_table

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

_TEARDOWN_SECONDS = 10.0

Pair = tuple[str | None, str | None]  # hashes of network and property


@dataclass(frozen=True)
class Repeat:
    """What is done again of what ``out`` holds.

    Attributes:
        resume: go on with a file that holds something.
        fresh: answer every instance of the lists again.
        verdicts: answer those with these verdicts again.
    """

    resume: bool = False
    fresh: bool = False
    verdicts: frozenset[str] = frozenset()

    @property
    def goes_on(self) -> bool:
        return self.resume or self.fresh or bool(self.verdicts)


def run_lists(
    lists: Sequence[Path],
    out: Path,
    cap: float | None,
    config: Config,
    repeat: Repeat,
    jobs: int,
    verdicts: Path | None,
) -> int:
    """Answer every instance; returns the exit code.

    Args:
        lists: CSV files.
        out: JSON lines are written here, one for every instance; those of instances in no list stay.
        cap: upper limit in seconds for every instance.
        repeat: what to do with what ``out`` holds.
        jobs: instances at a time.
        verdicts: CSV of true verdicts, to count wrong ones.
    """
    instances = [instance for path in lists for instance in read_instances(path)]
    truths = read_truths(verdicts, instances) if verdicts is not None else {}
    session = _Session(config, cap, jobs)
    with Ledger(out) as ledger:
        if ledger.filled and not repeat.goes_on:
            raise InputError(
                f"{out} already exists; give --resume to go on with it, --fresh to repeat it, or another --out"
            )
        earlier = _sort_out(ledger, instances, session, repeat)
        todo = deque(instance for instance in instances if _key(instance) not in earlier)
        records = [earlier[_key(instance)] for instance in instances if _key(instance) in earlier]
        with Signals() as signals, _bar(len(instances)) as bar:
            bar.update(len(records))
            for record in session.records(todo, signals):
                ledger.append(record)
                records.append(record)
                if record["verdict"] == "error":
                    _say_failed(record)
                solved = sum(record["verdict"] in DECIDED for record in records)
                bar.update(1, f"{solved} solved")
            received = signals.received
    click.echo(summary_table(records, truths))
    return 0 if received is None else 128 + received


def _sort_out(
    ledger: Ledger, instances: Sequence[Instance], session: _Session, repeat: Repeat
) -> dict[Key, dict[str, Any]]:
    """The records that still hold, by instance; the others leave the file to be made again, and stderr says why."""
    written = ledger.read()
    found = {key_of(record): record for record in written}
    reasons: Counter[str] = Counter()
    for instance in instances:
        record = found.get(_key(instance))
        if record is None:
            continue
        why = "all are repeated" if repeat.fresh else session.wanted(instance).why_not(record)
        if why is None and record["verdict"] in repeat.verdicts:
            why = f"was {record['verdict']}"
        if why is not None:
            reasons[why] += 1
            del found[_key(instance)]
    if len(found) < len(written):
        ledger.keep(list(found.values()))
    elif ledger.torn:
        ledger.keep(written)
    if reasons:
        counts = ", ".join(f"{count} ({why})" for why, count in sorted(reasons.items()))
        click.echo(f"repeated: {counts}", err=True)
    return found


def _say_failed(record: Mapping[str, Any]) -> None:
    """Which files an error belongs to."""
    where = f"{record['category']}: {record['onnx']['path']}, {record['vnnlib']['path']}"
    click.echo(printable(f"Error: {where}: {record['reason']}"), err=True)


class _Session:
    """Keeps up to ``jobs`` workers busy."""

    def __init__(self, config: Config, cap: float | None, jobs: int) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 and config.threads == "auto" else None
        self._config = config if threads is None else config.model_copy(update={"threads": threads})
        self._recorded = config.model_dump(mode="json")
        self._cap, self._jobs = cap, jobs
        self._hashes = Hashes()
        self._versions = versions()

    def records(self, todo: deque[Instance], signals: Signals) -> Iterator[dict[str, Any]]:
        """The records in the order in which the instances end; stops early at a signal."""
        running: list[tuple[Instance, Worker, Pair]] = []
        try:
            while (todo or running) and signals.received is None:
                while todo and len(running) < self._jobs:
                    instance = todo.popleft()
                    hashes = self.hashes(instance)  # of what is read, not of what it may have become meanwhile
                    try:
                        running.append((instance, Worker.start(self._job(instance)), hashes))
                    except InputError as error:
                        yield self._missing(instance, error)
                if not running:
                    continue
                wait([worker for _, worker, _ in running], signals)
                if signals.received is not None:
                    break
                for item in [item for item in running if item[1].outcome is not None]:
                    running.remove(item)
                    yield self._finish(*item)
        finally:
            for _, worker, _ in running:
                worker.close()

    def _limit(self, instance: Instance) -> float:
        return instance.timeout if self._cap is None else min(instance.timeout, self._cap)

    def _job(self, instance: Instance) -> Job:
        onnx = existing(instance.folder / instance.onnx, "network")
        vnnlib = existing(instance.folder / instance.vnnlib, "property")
        return Job(onnx, vnnlib, self._config, self._limit(instance), time.monotonic())

    def _finish(self, instance: Instance, worker: Worker, hashes: Pair) -> dict[str, Any]:
        outcome, seconds = worker.outcome, time.monotonic() - worker.job.start
        if outcome is None:
            raise RuntimeError("a worker without an outcome is not finished")
        worker.close()
        worker.process.reap(_TEARDOWN_SECONDS)
        return self._record(instance, outcome, seconds, hashes)

    def _missing(self, instance: Instance, error: InputError) -> dict[str, Any]:
        outcome = Outcome("error", str(error), error={"kind": type(error).__name__, "message": str(error)}, exit_code=2)
        return self._record(instance, outcome, 0.0, self.hashes(instance))

    def _record(self, instance: Instance, outcome: Outcome, seconds: float, hashes: Pair) -> dict[str, Any]:
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

    def hashes(self, instance: Instance) -> Pair:
        """Of network and property as they are now; ``None`` for what cannot be read."""
        return self._hash(instance.folder / instance.onnx, True), self._hash(instance.folder / instance.vnnlib, False)

    def _hash(self, path: Path, network: bool) -> str | None:
        try:
            return self._hashes.of(existing(path, "file"), network)
        except (OSError, InputError):
            return None

    def wanted(self, instance: Instance) -> Wanted:
        """What a record of the instance must have been made with to hold."""
        return Wanted(self.hashes(instance), self._limit(instance), self._recorded, self._versions)


def _key(instance: Instance) -> Key:
    return instance.category, instance.index, instance.onnx, instance.vnnlib


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
