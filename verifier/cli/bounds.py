"""``verifier bounds``: one case of a property, one method, every output."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from verifier.cli.instances import existing
from verifier.cli.rank import follows
from verifier.config import Config
from verifier.core.errors import InputError, RankFailed
from verifier.core.plugins import noted
from verifier.report.bounds import Pair, bounds_record
from verifier.report.contents import Hashes
from verifier.report.record import to_json, versions

if TYPE_CHECKING:
    from verifier.bounds.api import Method
    from verifier.core.interval import Interval
    from verifier.frontend.network import Network


def bounds_json(
    onnx: Path, vnnlib: Path, config: Config, method: Method, intermediate: bool, slopes: bool, case: int
) -> str | None:
    """Bounds over the input box of a property's case, as JSON text; nothing on a rank other than the first.

    Raises:
        InputError: a file is malformed, or the property has no such case.
    """
    start = time.monotonic()
    from verifier import api

    if follows():  # rank 0 alone needs the files
        from verifier.solver.crew import follow

        with api.job(config, _lost) as ranks:
            follow(ranks.join())
        return None
    onnx, vnnlib = existing(onnx, "network"), existing(vnnlib, "property")
    with noted() as used:
        problem = api.load_problem(vnnlib)
    if case >= problem.n_cases:
        raise InputError(f"--case {case}: {vnnlib} has {problem.n_cases} cases, counted from 0")
    box = int(problem.case_box[case])
    loaded = start

    def load() -> Network:
        nonlocal loaded
        network = api.load_any(onnx, ())
        api.check_sizes(network, problem)
        loaded = time.monotonic()
        return network

    with api.job(config, _lost) as ranks, noted() as more:
        of_all = api.bound_network(
            ranks, load, problem.lower[box], problem.upper[box], config, method, intermediate, slopes
        )
    found = of_all.bounds
    record = bounds_record(
        {name: _arrays(bounds) for name, bounds in found.plain.items()},
        {name: _arrays(bounds) for name, bounds in found.certified.items()},
        {name: values.detach().cpu().numpy() for name, values in found.slopes.items()} if slopes else None,
        of_all.memory,
        {
            "onnx": {"path": str(onnx), "sha256": Hashes().of(onnx, network=True)},
            "vnnlib": {"path": str(vnnlib), "sha256": Hashes().of(vnnlib, network=False)},
            "case": case,
            "method": method,
            "seed": config.seed,
            "device": of_all.device,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            "plugins": [plugin.entry() for plugin in dict.fromkeys((*used, *more))],
            "seconds": {
                "total": round(time.monotonic() - start, 3),
                "load": round(loaded - start, 3),
                "bounds": round(time.monotonic() - loaded, 3),
            },
        },
    )
    return to_json(record, indent=1)


def _lost(message: str) -> None:
    """A rank was lost and the main thread is stuck waiting for it."""
    click.echo(f"Error: {message}", err=True)
    os._exit(RankFailed.exit_code)


def _arrays(bounds: Interval) -> Pair:
    return np.asarray(bounds.lower.detach().cpu()), np.asarray(bounds.upper.detach().cpu())
