"""Pictures of certifications; matplotlib is an extra."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verifier.core.errors import InputError

if TYPE_CHECKING:
    from verifier.certification.answers import Certification


def figure() -> Any:
    """An empty figure that needs no screen.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        found: Any = import_module("matplotlib.figure")  # by name: type checks do not need it
    except ImportError:
        raise InputError("pictures need matplotlib; install it, or this package with the extra 'plot'") from None
    return found.Figure(figsize=(6.0, 4.0), layout="constrained")


def accuracy_plot(found: Certification, path: Path) -> None:
    """Certified accuracy and what is not falsified, against the radius; the band between them is unknown."""
    drawn = figure()
    axes = drawn.subplots()
    rows = found.rows()
    clean = float(found.correct.mean()) if len(found.correct) else 0.0
    x = [0.0, *(row["epsilon"] for row in rows)]
    least = [clean, *(row["certified_accuracy"] for row in rows)]
    most = [clean, *(row["robust_accuracy_at_most"] for row in rows)]
    if rows and rows[0]["epsilon"] == 0.0:
        x, least, most = x[1:], least[1:], most[1:]
    axes.plot(x, [100 * v for v in least], "o-", color="C0", label="certified accuracy")
    axes.plot(x, [100 * v for v in most], "s--", color="C3", label="not falsified")
    axes.fill_between(x, [100 * v for v in least], [100 * v for v in most], color="0.85", label="unknown")
    axes.set_xlabel(f"radius ({found.norm})")
    axes.set_ylabel("inputs, %")
    axes.set_ylim(0, 101)
    axes.set_title(f"{len(found.labels)} inputs")
    axes.legend()
    save(drawn, path)


def save(drawn: Any, path: Path) -> None:
    """Write a figure; the file's name says in which format.

    Raises:
        InputError: no such format, or the file cannot be written.
    """
    try:
        drawn.savefig(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: the picture cannot be written: {error}") from None
