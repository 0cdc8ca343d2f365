"""Whole lists of instances: every instance in its own process, one JSON line each, a table at the end."""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.instances import Instance, existing, find_networks, read_instances
from verifier.cli.ledger import DECIDED, Key, Ledger, Wanted, key_of
from verifier.cli.options import Repeat
from verifier.config import Config
from verifier.core.errors import InputError, printable
from verifier.report.console import progress_bar
from verifier.report.contents import Hashes
from verifier.report.record import Asked, Outcome, verify_record, versions
from verifier.report.summary import summary_table
from verifier.runtime.handle import WorkerHandle
from verifier.runtime.query import Query
from verifier.runtime.watchdog import Signals, wait

if TYPE_CHECKING:
    from tqdm import tqdm

_TEARDOWN_SECONDS = 10.0

Pair = tuple[str | None, str | None]  # hashes of network and property


def run_lists(lists: Sequence[Path], out: Path, session: Session, repeat: Repeat, verdicts: Path | None) -> int:
    """Answer every instance; returns the exit code.

    Args:
        lists: CSV files.
        out: JSON lines are written here, one for every instance; those of instances in no list stay.
        session: answers the instances.
        repeat: what to do with what ``out`` holds.
        verdicts: CSV of true verdicts, to count wrong ones.
    """
    instances = [instance for path in lists for instance in read_instances(path)]
    truths = read_truths(verdicts, instances) if verdicts is not None else {}
    with Ledger(out) as ledger:
        if ledger.filled and not repeat.goes_on:
            raise InputError(
                f"{out} already exists; give --resume to go on with it, --fresh to repeat it, or another --out"
            )
        earlier = _sort_out(ledger, instances, session, repeat)
        todo = deque(instance for instance in instances if _key(instance) not in earlier)
        records = [earlier[_key(instance)] for instance in instances if _key(instance) in earlier]
        with Signals() as signals, _bar(len(instances), len(records)) as bar:
            for record in session.records(todo, signals):
                ledger.append(record)
                records.append(record)
                if record["verdict"] == "error":
                    _say_failed(record, bar)
                if bar is not None:
                    bar.update()
                    bar.set_postfix_str(f"{sum(record['verdict'] in DECIDED for record in records)} solved")
            received = signals.received
    click.echo(summary_table(records, truths))
    return 0 if received is None else 128 + received


def _sort_out(
    ledger: Ledger, instances: Sequence[Instance], session: Session, repeat: Repeat
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
        if why is None and record["verdict"] in repeat.retry:
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


def _say_failed(record: Mapping[str, Any], bar: tqdm | None) -> None:
    """Which files an error belongs to."""
    where = f"{record['category']}: {record['onnx']['path']}, {record['vnnlib']['path']}"
    text = printable(f"Error: {where}: {record['reason']}")
    if bar is None:
        click.echo(text, err=True)
    else:
        bar.write(text, file=sys.stderr)


class Session:
    """Keeps some workers busy.

    Args:
        config: of every instance.
        cap: upper limit in seconds for every instance.
        jobs: instances at a time.
    """

    def __init__(self, config: Config, cap: float | None, jobs: int) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 and config.threads == "auto" else None
        self._config = config if threads is None else config.model_copy(update={"threads": threads})
        self._recorded = config.model_dump(mode="json")
        self._cap, self._jobs = cap, jobs
        self._hashes = Hashes()
        self._versions = versions()

    def records(self, todo: deque[Instance], signals: Signals) -> Iterator[dict[str, Any]]:
        """The records in the order in which the instances end; stops early at a signal."""
        running: list[tuple[Instance, WorkerHandle, Pair]] = []
        try:
            while (todo or running) and signals.received is None:
                while todo and len(running) < self._jobs:
                    instance = todo.popleft()
                    hashes = self.hashes(instance)  # of what is read, not of what it may have become meanwhile
                    try:
                        running.append((instance, WorkerHandle.start(self._query(instance)), hashes))
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

    def _query(self, instance: Instance) -> Query:
        onnx, networks = find_networks(instance.onnx, instance.folder)
        vnnlib = existing(instance.folder / instance.vnnlib, "property")
        return Query(onnx, vnnlib, self._config, self._limit(instance), time.monotonic(), networks=networks)

    def _finish(self, instance: Instance, worker: WorkerHandle, hashes: Pair) -> dict[str, Any]:
        outcome, seconds = worker.outcome, time.monotonic() - worker.query.start
        if outcome is None:
            raise RuntimeError("a worker without an outcome is not finished")
        worker.close()
        worker.process.reap(_TEARDOWN_SECONDS)
        return self._record(instance, outcome, seconds, hashes)

    def _missing(self, instance: Instance, error: InputError) -> dict[str, Any]:
        outcome = Outcome("error", str(error), error={"kind": type(error).__name__, "message": str(error)}, exit_code=2)
        return self._record(instance, outcome, 0.0, self.hashes(instance))

    def _record(self, instance: Instance, outcome: Outcome, seconds: float, hashes: Pair) -> dict[str, Any]:
        asked = Asked(
            onnx={"path": instance.onnx, "sha256": hashes[0]},
            vnnlib={"path": instance.vnnlib, "sha256": hashes[1]},
            timeout=self._limit(instance),
            config=self._recorded,
            versions=self._versions,
        )
        return verify_record(outcome, asked, seconds, {"category": instance.category, "instance": instance.index})

    def hashes(self, instance: Instance) -> Pair:
        """Of network and property as they are now; ``None`` for what cannot be read."""
        return self._network_hash(instance), self._hash(instance.folder / instance.vnnlib, False)

    def _network_hash(self, instance: Instance) -> str | None:
        """Of the network, or of the hashes of all."""
        if not instance.onnx.startswith("["):
            return self._hash(instance.folder / instance.onnx, True)
        try:
            networks = find_networks(instance.onnx, instance.folder)[1]
        except InputError:
            return None
        hashes = [self._hash(path, True) for _, path in networks]
        return hashlib.sha256(" ".join(map(str, hashes)).encode()).hexdigest() if None not in hashes else None

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


def _bar(total: int, done: int) -> AbstractContextManager[tqdm | None]:
    """A bar on stderr; nothing in a pipe."""
    if not sys.stderr.isatty():
        return nullcontext()
    return progress_bar(sys.stderr, total, "{bar:36} {n_fmt}/{total_fmt} {remaining}{postfix}", done)
