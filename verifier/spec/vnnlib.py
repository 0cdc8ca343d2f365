"""Reads VNN-LIB 1.0 files into a :class:`Problem`.

``fast`` reads the forms that nearly all files have and declines everything else; ``general`` reads everything that is
supported and formulates the errors. Comparisons are relaxed soundly: strict ones become non-strict for proofs, boxes
and right-hand sides are rounded so that the unsafe set never shrinks.
"""

from __future__ import annotations

from pathlib import Path

from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.spec import fast, general
from verifier.spec.source import read_source


def parse_vnnlib(
    path: str | Path, n_in: int | None = None, n_out: int | None = None, deadline: Deadline | None = None
) -> Problem:
    """Read a property file; a missing file falls back to its ``.gz`` sibling.

    Args:
        path: a VNN-LIB 1.0 file, plain or gzip.
        n_in: size of the network's input, if known; a mismatch is an error.
        n_out: size of its output, likewise.
        deadline: checked while reading.

    Raises:
        InputError: the file is missing or malformed; the message names file and line.
        UnsupportedPropertyError: well-formed, but outside the fragment (nonlinear, unbounded, too many cases).
        DeadlineExceeded: no time is left.
    """
    source = read_source(path, deadline)
    problem = fast.read(source, n_in, n_out, deadline)
    return problem if problem is not None else general.read(source, n_in, n_out, deadline)
