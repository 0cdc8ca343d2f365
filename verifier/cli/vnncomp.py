"""The competition's two calls per instance. Whatever happens, a valid result file is left and nothing is raised."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from verifier.cli import resident
from verifier.cli.clock import process_start
from verifier.cli.instances import existing, parse_timeout
from verifier.cli.query import Outputs, run_query, write_last
from verifier.cli.resident_link import Unavailable
from verifier.cli.worker import Job
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, VerifierError
from verifier.report.formats import result_text

if TYPE_CHECKING:
    from verifier.config import Config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_YEAR = re.compile(r"_20\d\d$")
_PREPARE_SECONDS = 100.0
_LIBRARIES = ("torch", "torch.nn.attention", "numpy.random", "onnx", "onnxruntime", "highspy")


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
    category: str,
    onnx: Path,
    vnnlib: Path,
    results: Path,
    timeout: str,
    configs: Path | None,
    parent: int | None,
    folder: Path | None = None,
    patience: float = resident.PATIENCE_SECONDS,
) -> int:
    """Answer one instance into ``results``; 0, or 1 when that could not be written.

    Args:
        timeout: the limit in seconds as the script got it; it counts from the start of ``parent``.
        parent: process id of the script.
        folder: of the resident worker that may do the work.
        patience: seconds to wait for its answer.
    """
    start = process_start(parent)
    try:
        limit = parse_timeout(timeout, "TIMEOUT")
        settings = _settings(category_config(configs, category))
        job = Job(existing(onnx, "network"), existing(vnnlib, "property"), settings, limit, start, quiet=True)
        start_worker = partial(resident.start_worker, folder=folder, patience=patience)
        outcome = run_query(job, Outputs(results), False, parent, start=start_worker)
    except Exception as error:
        words = str(error) if isinstance(error, VerifierError) else f"internal error: {type(error).__name__}: {error}"
        click.echo(f"Error: {words}", err=True)
        return 0 if write_last(results, result_text("error")) else 1
    if outcome.error is not None:
        click.echo(f"Error: {outcome.error['message']}", err=True)
        click.echo(outcome.trace, err=True, nl=False)
    elif outcome.exit_code == 1:
        click.echo(f"Error: {outcome.reason}", err=True)
    click.echo(outcome.verdict)
    return 0 if outcome.written else 1


def prepare(folder: Path, idle: float) -> None:
    """Have a resident worker ready for the next instance, or at least its files in memory; failures are only reported.

    Args:
        folder: of the resident worker.
        idle: seconds without work after which it ends; 0 for no resident worker.
    """
    if idle > 0:
        try:
            resident.make_ready(folder, idle, _PREPARE_SECONDS)
            return
        except Unavailable as why:
            click.echo(f"no resident worker: {why}", err=True)
    try:
        warm_up()
    except Exception as error:
        click.echo(f"warm-up incomplete: {type(error).__name__}: {error}", err=True)


def warm_up() -> None:
    """Import what instances need and have the GPU's kernels loaded; no result is left that a query could see."""
    for name in (*_LIBRARIES, *_modules()):
        importlib.import_module(name)
    importlib.import_module("verifier.frontend.onnx_module").converter()
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        with suppress(DeadlineExceeded, MemoryExceeded, torch.OutOfMemoryError):  # a query does without
            importlib.import_module("verifier.cli.rehearsal").rehearse()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _modules() -> Iterator[str]:
    """Everything of ours that a query may import, also late."""
    for package in ("attack", "bab", "bounds", "frontend", "ops", "parallel", "solver", "spec"):
        found = importlib.import_module(f"verifier.{package}")
        for module in pkgutil.walk_packages(found.__path__, f"{found.__name__}."):
            yield module.name
