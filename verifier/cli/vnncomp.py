"""The competition's two calls per instance. Whatever happens, a valid result file is left and nothing is raised."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.cli.instances import existing, find_networks, parse_timeout
from verifier.cli.options import CompetitionInstance
from verifier.cli.query import Outputs, run_query, write_last
from verifier.core.errors import VerifierError
from verifier.report.formats import result_text
from verifier.runtime import warm_client, warm_up
from verifier.runtime.clock import process_start
from verifier.runtime.handle import WorkerHandle
from verifier.runtime.query import Query
from verifier.runtime.warm_link import Unavailable

if TYPE_CHECKING:
    from verifier.config import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_YEAR = re.compile(r"_20\d\d$")
_PREPARE_SECONDS = 100.0


def category_config(folder: Path | None, category: str) -> list[Path]:
    """The settings of a category: ``CATEGORY.yaml``, with or without the year, or none."""
    if folder is None or not _NAME.fullmatch(category):
        return []
    names = dict.fromkeys([category, _YEAR.sub("", category)])
    return next(([path] for path in (folder / f"{name}.yaml" for name in names) if path.is_file()), [])


def _settings(files: list[Path]) -> Config | None:
    """What the files say; ``None``, at no cost, when there are none."""
    if not files:
        return None
    from verifier.config import load_config

    return load_config(files)


def run_instance(
    instance: CompetitionInstance,
    configs: Path | None,
    parent: int | None,
    folder: Path | None = None,
    patience: float = warm_client.PATIENCE_SECONDS,
) -> int:
    """Answer one instance into its results file; 0, or 1 when that could not be written.

    Args:
        instance: its limit counts from the start of ``parent``.
        configs: folder of category settings.
        parent: process id of the script.
        folder: of the warm server that may do the work.
        patience: seconds to wait for its answer.
    """
    start = process_start(parent)
    try:
        limit = parse_timeout(instance.timeout, "TIMEOUT")
        settings = _settings(category_config(configs, instance.category))
        onnx, networks = find_networks(str(instance.onnx))
        vnnlib = existing(instance.vnnlib, "property")
        query = Query(onnx, vnnlib, settings, limit, start, quiet=True, networks=networks)
        start_worker = partial(_start_worker, folder=folder, patience=patience)
        outcome = run_query(query, Outputs(instance.results), False, parent, start=start_worker)
    except Exception as error:
        words = str(error) if isinstance(error, VerifierError) else f"internal error: {type(error).__name__}: {error}"
        click.echo(f"Error: {words}", err=True)
        return 0 if write_last(instance.results, result_text("error")) else 1
    if outcome.error is not None:
        click.echo(f"Error: {outcome.error['message']}", err=True)
        click.echo(outcome.trace, err=True, nl=False)
    elif outcome.exit_code == 1:
        click.echo(f"Error: {outcome.reason}", err=True)
    click.echo(outcome.verdict)
    return 0 if outcome.written else 1


def _start_worker(query: Query, folder: Path | None, patience: float) -> WorkerHandle:
    """A worker from the warm server of this folder, else one of our own; why it was not the server's goes to stderr."""
    if folder is not None:
        try:
            worker = warm_client.start_warm(query, folder, patience)
        except Unavailable as why:
            click.echo(f"note: not using the resident worker: {why}", err=True)
        else:
            if worker is not None:
                return worker
    return WorkerHandle.start(query)


def prepare(folder: Path, idle: float) -> None:
    """Have a resident worker ready for the next instance, or at least its files in memory; failures are only reported.

    Args:
        folder: of the resident worker.
        idle: seconds without work after which it ends; 0 for no resident worker.
    """
    if idle > 0:
        try:
            warm_client.make_ready(folder, idle, _PREPARE_SECONDS)
            return
        except Unavailable as why:
            click.echo(f"no resident worker: {why}", err=True)
    try:
        warm_up.warm_up()
    except Exception as error:
        click.echo(f"warm-up incomplete: {type(error).__name__}: {error}", err=True)
