"""Does a counterexample hold? Decided by onnxruntime on the network itself, so that no prover is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verifier.core.errors import InputError

if TYPE_CHECKING:
    from verifier.frontend.runner import OnnxRunner
    from verifier.spec.replay import CheckOutcome


@dataclass(frozen=True)
class _Original:
    """The ONNX file as a reference; it need not be one that the verifier can translate."""

    runner: OnnxRunner

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        """(n, n_in) to (n, n_out)."""
        file = self.runner.file
        if x.shape[1] != int(np.prod(file.input_shape)):
            raise InputError(
                f"the network takes {int(np.prod(file.input_shape))} inputs (shape {list(file.input_shape)}) but the "
                f"property declares {x.shape[1]}; check that the two belong together"
            )
        points = x.astype(file.input_dtype).reshape(-1, *file.input_shape)
        return np.stack([self.runner(point, optimised).reshape(-1) for point in points])


def check_witness(onnx: Path, vnnlib: Path, results: Path, networks: Mapping[str, Path] | None = None) -> CheckOutcome:
    """Check the counterexample in a results file.

    Args:
        networks: files by the names that a property in VNN-LIB 2.0 gives to networks.

    Raises:
        InputError: a file is missing or malformed, or network and property do not belong together.
    """
    from verifier.core.question import Question
    from verifier.frontend import normalise
    from verifier.frontend.runner import OnnxRunner
    from verifier.spec.replay import check_results
    from verifier.spec.vnnlib import parse_any

    if not results.is_file():
        state = "is a folder" if results.is_dir() else "does not exist"
        raise InputError(f"results file {results} {state}; check the path")
    problem = parse_any(vnnlib)
    if isinstance(problem, Question):
        from verifier import api
        from verifier.frontend.product import open_reference

        reference = open_reference(api.network_files(networks or onnx, problem), problem)
        return check_results(reference, problem.problem, results, reference.dtype)
    if networks:
        raise InputError("networks have names in VNN-LIB 2.0 alone; give --onnx for this property")
    file = normalise.load(onnx)
    network = _Original(OnnxRunner(file))
    _check_outputs(network, problem.n_in, problem.n_out)
    return check_results(network, problem, results, file.input_dtype)


def _check_outputs(network: _Original, n_in: int, n_out: int) -> None:
    found = network.evaluate(np.zeros((1, n_in))).shape[1]
    if found != n_out:
        raise InputError(
            f"the network has {found} outputs but the property declares {n_out}; check that the two belong together"
        )
