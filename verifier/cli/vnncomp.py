"""The competition's two calls per instance. Whatever happens, a valid result file is left and nothing is raised."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click

from verifier.cli.clock import process_start
from verifier.cli.instances import existing, parse_timeout
from verifier.cli.query import Outputs, run_query
from verifier.cli.worker import Job
from verifier.config import load_config
from verifier.core.errors import VerifierError
from verifier.report.files import result_text, write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_YEAR = re.compile(r"_20\d\d$")


def category_config(folder: Path | None, category: str) -> list[Path]:
    """The settings of a category: ``CATEGORY.yaml``, with or without the year, or none."""
    if folder is None or not _NAME.fullmatch(category):
        return []
    names = dict.fromkeys([category, _YEAR.sub("", category)])
    return next(([path] for path in (folder / f"{name}.yaml" for name in names) if path.is_file()), [])


def run_instance(
    category: str, onnx: Path, vnnlib: Path, results: Path, timeout: str, configs: Path | None, parent: int | None
) -> None:
    """Answer one instance into ``results``.

    Args:
        timeout: the limit in seconds as the script got it; it counts from the start of ``parent``.
        parent: process id of the script.
    """
    start = process_start(parent)
    try:
        limit = parse_timeout(timeout, "TIMEOUT")
        config = load_config(category_config(configs, category))
        job = Job(existing(onnx, "network"), existing(vnnlib, "property"), config, limit, start, quiet=True)
        outcome = run_query(job, Outputs(results), verbose=False, parent=parent)
    except Exception as error:
        words = str(error) if isinstance(error, VerifierError) else f"internal error: {type(error).__name__}: {error}"
        click.echo(f"Error: {words}", err=True)
        write_atomic(results, result_text("error"))
        return
    if outcome.error is not None:
        click.echo(f"Error: {outcome.error['message']}", err=True)
        click.echo(outcome.trace, err=True, nl=False)
    click.echo(outcome.verdict)


def prepare() -> None:
    """Import what an instance needs, so that its files are in memory, and wake the GPU. Failures are only reported."""
    try:
        import torch

        importlib.import_module("verifier.solver.pipeline")
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda").sum().item()
    except Exception as error:
        click.echo(f"warm-up incomplete: {type(error).__name__}: {error}", err=True)
