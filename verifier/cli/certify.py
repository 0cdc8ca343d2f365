"""``verifier certify`` and ``verifier radius``: data sets from files, progress on stderr, tables and files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from verifier.cli.instances import existing
from verifier.config import Config
from verifier.core.errors import InputError
from verifier.report.files import write_atomic

if TYPE_CHECKING:
    from verifier.certification.answers import Certification
    from verifier.certification.campaign import CertifyProgress
    from verifier.cli.options import DataSet

# Names under which files hold inputs and labels.
_INPUTS, _LABELS = ("inputs", "x", "X", "images"), ("labels", "y", "Y", "label")
# Seconds between two lines where stderr is no terminal.
_PAUSE = 10.0


def read_data(path: Path, limit: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Inputs and, if there are any, labels of an ``.npz`` file.

    Raises:
        InputError: it is something else, or has no inputs.
    """
    try:
        with np.load(existing(path, "data set"), allow_pickle=False) as file:
            names = list(file.files) if hasattr(file, "files") else []
            x, y = (next((file[n] for n in known if n in names), None) for known in (_INPUTS, _LABELS))
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise InputError(
            f"{path}: is no .npz file ({error}); make one with numpy.savez(inputs=..., labels=...)"
        ) from None
    if x is None:
        raise InputError(f"{path}: has {', '.join(names) or 'nothing'} but no 'inputs'; the labels are called 'labels'")
    return x[:limit], None if y is None else y[:limit]


def parse_radii(text: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        InputError: one is none.
    """
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise InputError(f"--eps: '{text}' is no list of numbers such as 0.01,0.02") from None


def certify_files(
    network: Path, data: DataSet, config: Config, radii: str, norm: str, outputs: dict[str, Path | None]
) -> str:
    """Certify a data set; the table that is printed.

    Args:
        outputs: files by kind: ``out`` (what is answered, to go on from), ``csv``, ``markdown``, ``plot``,
            ``adversarial``.
    """
    from verifier.certification.campaign import certify
    from verifier.certification.plots import figure

    if outputs["plot"] is not None:
        figure()  # a missing package is said before the work, not after it
    x, y = read_data(data.file, data.limit)
    found = certify(
        existing(network, "network"),
        x,
        y,
        parse_radii(radii),
        norm,
        clip=data.clip,
        timeout=data.timeout,
        total_timeout=data.total_timeout,
        config=config,
        resume=outputs["out"],
        progress=_listener(),
    )
    _write(found, outputs)
    return found.table()


def _write(found: Certification, outputs: dict[str, Path | None]) -> None:
    if outputs["csv"] is not None:
        write_atomic(outputs["csv"], found.csv())
    if outputs["markdown"] is not None:
        write_atomic(outputs["markdown"], found.markdown())
    if outputs["plot"] is not None:
        found.plot(outputs["plot"])
    if outputs["adversarial"] is not None:
        examples = found.adversarial
        index, epsilon = [k[0] for k in examples], [k[1] for k in examples]
        stacked = np.stack(list(examples.values())) if examples else np.zeros(0)
        np.savez(outputs["adversarial"], index=np.array(index), epsilon=np.array(epsilon), inputs=stacked)


def _listener() -> Callable[[CertifyProgress], None]:
    last, live = -_PAUSE, sys.stderr.isatty()

    def tell(now: CertifyProgress) -> None:
        nonlocal last
        moment = time.monotonic()
        if moment - last < (0.2 if live else _PAUSE) and now.done < now.total:
            return
        last = moment
        eta = "" if now.eta is None else f", about {now.eta:.0f} s left"
        text = (
            f"{now.step}: {now.done} of {now.total} answers, {now.certified} certified, {now.falsified} falsified, "
            f"{now.unknown} unknown, {now.elapsed:.0f} s{eta}"
        )
        click.echo(f"\r\x1b[K{text}" if live else text, err=True, nl=not live or now.done == now.total)

    return tell


def radius_files(
    network: Path, data: DataSet, config: Config, largest: float, tolerance: float | None, csv_file: Path | None
) -> str:
    """The certified radius of every input: lines for stdout."""
    from verifier.certification.answers import radius_csv
    from verifier.certification.campaign import certified_radius

    x, y = read_data(data.file, data.limit)
    found = certified_radius(
        existing(network, "network"),
        x,
        y,
        largest,
        tolerance,
        clip=data.clip,
        timeout=data.timeout,
        config=config,
        progress=lambda done, total: click.echo(f"{done} of {total} inputs", err=True) if done % 10 == 0 else None,
    )
    labels = np.full(len(found), -1) if y is None else np.asarray(y)
    text = radius_csv(found, labels)
    if csv_file is not None:
        write_atomic(csv_file, text)
    radii = np.array([r.certified for r in found])
    summary = f"# certified radius: median {np.median(radii):.4g}, mean {radii.mean():.4g}, smallest {radii.min():.4g}"
    return text + summary
