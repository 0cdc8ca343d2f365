"""The proof file of a query: what it asks of the query, and its end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import verifier
from verifier.config import Config
from verifier.core.errors import UnsupportedError
from verifier.core.problem import Problem
from verifier.frontend.network import Network
from verifier.proof.names import tensors
from verifier.proof.writer import Files, Incomplete, Proof, sha256

_LOG = logging.getLogger(__name__)

# What has no form in a proof file.
WITHOUT = (
    "pairs of ReLUs that cancel",
    "clauses learned from refuted domains",
    "linear programs at leaves",
    "input boxes cut by rows",
    "strict rows that only touch their thresholds",
    "bounds that hold for float32 runs",
)


@dataclass(frozen=True)
class Wanted:
    """A proof file that is asked for.

    Attributes:
        path: of the file; property: of the VNN-LIB file.
    """

    path: Path
    property: Path


def settings(config: Config) -> Config:
    """The settings without what has no form in a proof file."""
    bab = config.bab.model_copy(update={"leaf_lp": False, "clip": False, "value_splits": False})
    return config.model_copy(update={"bab": bab})


def question(problem: Problem) -> Problem:
    """The problem as it is proved: strict rows count like the others."""
    return replace(problem, row_strict=None)


def begin(wanted: Wanted, network: Network, problem: Problem, config: Config, ranks: int) -> Proof:
    """Begin a proof file.

    Raises:
        UnsupportedError: the network or the settings allow none.
        InputError: it cannot be written.
    """
    file = network.file
    if file is None or network.path is None:
        raise UnsupportedError("a proof file speaks of an ONNX file")
    if not config.numerics.certify:
        raise UnsupportedError("a proof file needs numerics.certify")
    if ranks > 1:
        raise UnsupportedError(f"a proof file is written by one rank, not by {ranks}")
    names = tensors(network.graph, list(file.model.graph.node), str(network.path))
    files = Files(sha256(network.path), sha256(wanted.property), _external(network.path), names)
    return Proof(wanted.path, files, network.graph, problem, WITHOUT)


def _external(path: Path) -> dict[str, str]:
    """Hashes of the files with external data, by location."""
    import onnx

    if path.suffix == ".gz":
        return {}
    model = onnx.load(str(path), load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    places = sorted({entry.value for entry in entries if entry.key == "location"})
    return {place: sha256(path.parent / place) for place in places}


def end(proof: Proof, proved: bool) -> dict[str, Any]:
    """Finish the file if the query was proved, and leave nothing of it otherwise; what the record says."""
    said: dict[str, Any] = {"written": False, "bytes": None, "without": list(WITHOUT)}
    if not proved:
        proof.archive.drop()
        return said
    try:
        size = proof.finish(f"verifier {verifier.__version__}")
    except (OSError, Incomplete) as error:
        proof.archive.drop()
        _LOG.info("note: no proof file is written: %s", error)
        return said
    return {**said, "written": True, "bytes": size}


__all__ = ["Wanted", "begin", "end", "question", "settings"]
