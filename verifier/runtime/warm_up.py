"""What a process does before the first query, so that the query need not."""

from __future__ import annotations

import gc
import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import suppress

from verifier.core.errors import DeadlineExceeded, MemoryExceeded

_LIBRARIES = ("torch", "torch.nn.attention", "numpy.random", "onnx", "onnxruntime", "highspy")


def warm_up() -> None:
    """Import what instances need and have the GPU's kernels loaded; no result is left that a query could see."""
    for name in (*_LIBRARIES, *_modules()):
        importlib.import_module(name)
    importlib.import_module("verifier.frontend.onnx_module").converter()
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        with suppress(DeadlineExceeded, MemoryExceeded, torch.OutOfMemoryError):  # a query does without
            importlib.import_module("verifier.runtime.warm_kernels").warm_kernels()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _modules() -> Iterator[str]:
    """Everything of ours that a query may import, also late."""
    for package in ("attack", "bab", "bounds", "frontend", "ops", "parallel", "solver", "spec"):
        found = importlib.import_module(f"verifier.{package}")
        for module in pkgutil.walk_packages(found.__path__, f"{found.__name__}."):
            yield module.name
