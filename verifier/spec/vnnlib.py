"""Reads VNN-LIB files: 1.0 into a :class:`Problem`, 2.0 into a :class:`Question`.

``fast`` reads the forms that nearly all files have and declines everything else; ``general`` reads everything that is
supported and formulates the errors. Comparisons are relaxed soundly: strict ones become non-strict for proofs, boxes
and right-hand sides are rounded so that the unsafe set never shrinks.
"""

from __future__ import annotations

import re
from pathlib import Path

from verifier.core.deadline import Deadline
from verifier.core.problem import Problem
from verifier.core.question import Question
from verifier.spec import fast, general
from verifier.spec.source import Source, blank_comments, read_bytes, read_source

_BOM = b"\xef\xbb\xbf"
# How a text of 2.0 begins, after comments.
_SECOND = re.compile(rb"(?:\s+|;[^\r\n]*)*\(\s*(?:vnnlib-version|declare-network)\b")


def parse_any(path: str | Path, deadline: Deadline | None = None) -> Problem | Question:
    """Read a property file of either version; arguments and errors as of :func:`parse_vnnlib`."""
    data = read_bytes(path, deadline).removeprefix(_BOM)
    if _SECOND.match(data):
        from verifier.spec.v2 import reader
        from verifier.spec.v2.question import question

        return question(reader.read(str(path), data, deadline), deadline)
    source = Source(str(path), blank_comments(data))
    problem = fast.read(source, None, None, deadline)
    return problem if problem is not None else general.read(source, None, None, deadline)


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
