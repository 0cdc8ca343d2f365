"""The original ONNX model, run by onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from verifier.core.errors import InputError

if TYPE_CHECKING:
    from verifier.frontend.onnx_file import OnnxFile


class OnnxRunner:
    """Runs the original model; one session with and one without graph optimisations, created on first use."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self.sessions: dict[bool, Any] = {}

    def __call__(self, x: np.ndarray, optimised: bool) -> np.ndarray:
        if optimised not in self.sessions:
            self.sessions[optimised] = self._session(optimised)
        try:
            return self.sessions[optimised].run(
                [self.file.output_name], {self.file.input_name: x.reshape(self.file.input_shape)}
            )[0]
        except Exception as error:
            raise InputError(f"{self.file.path}: onnxruntime cannot run the network: {_first_line(error)}") from error

    def _session(self, optimised: bool) -> Any:
        from verifier.frontend.normalise import new_session, runs_in_memory

        try:
            # A large file has its data beside it, where onnxruntime finds it.
            inside = runs_in_memory(self.file)
            data = self.file.model.SerializeToString() if inside else str(self.file.path)
            return new_session(data, optimised)
        except Exception as error:
            raise InputError(f"{self.file.path}: onnxruntime cannot load the network: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
