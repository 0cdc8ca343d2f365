"""``verifier bounds``: one case of a property, one method, every output."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click
import numpy as np

from verifier.cli.instances import existing
from verifier.cli.options import BoundsOptions, QueryFiles
from verifier.config import Config
from verifier.core.errors import InputError, RankFailed
from verifier.core.plugins import noted
from verifier.report.bounds import Pair, bounds_record
from verifier.report.contents import Hashes
from verifier.report.record import to_json, versions
from verifier.runtime.rank import is_other_rank

if TYPE_CHECKING:
    from verifier.core.interval import Interval
    from verifier.frontend.network import Network


def bounds_json(files: QueryFiles, config: Config, wanted: BoundsOptions) -> str | None:
    """Bounds over the input box of a property's case, as JSON text; nothing on a rank other than the first.

    Raises:
        InputError: a file is malformed, or the property has no such case.
    """
    start = time.monotonic()
    from verifier import api

    if is_other_rank():  # rank 0 alone needs the files
        from verifier.solver.phases import BoundsReport
        from verifier.solver.ranks import rank_loop

        with api.job(config, _lost) as ranks:
            rank_loop(ranks.join(), BoundsReport)
        return None
    onnx, vnnlib = existing(files.onnx, "network"), existing(files.vnnlib, "property")
    with noted() as used:
        problem = api.load_problem(vnnlib)
    if wanted.case >= problem.n_cases:
        raise InputError(f"--case {wanted.case}: {vnnlib} has {problem.n_cases} cases, counted from 0")
    box = int(problem.case_box[wanted.case])
    loaded = start

    def load() -> Network:
        nonlocal loaded
        network = api.load_any(onnx, ())
        api.check_sizes(network, problem)
        loaded = time.monotonic()
        return network

    with api.job(config, _lost) as ranks, noted() as more:
        from verifier.solver.phases import BoundNetwork, BoundsReport

        request = BoundNetwork(
            problem.lower[box], problem.upper[box], wanted.method, wanted.intermediate, wanted.slopes
        )
        report = api.bound_network(ranks, load, config, request, BoundsReport)
    found = report.bounds
    record = bounds_record(
        {name: _arrays(bounds) for name, bounds in found.plain.items()},
        {name: _arrays(bounds) for name, bounds in found.certified.items()},
        {name: values.detach().cpu().numpy() for name, values in found.slopes.items()} if wanted.slopes else None,
        [rank.entry() for rank in report.memory],
        {
            "onnx": {"path": str(onnx), "sha256": Hashes().of(onnx, network=True)},
            "vnnlib": {"path": str(vnnlib), "sha256": Hashes().of(vnnlib, network=False)},
            "case": wanted.case,
            "method": wanted.method,
            "seed": config.seed,
            "device": report.device,
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
