"""A neural-network verifier: certified bounds, branch and bound, counterexamples.

``import verifier`` does one thing: it keeps onnxruntime, which is imported later, from reporting to its maker. torch is
imported on first use of the API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from verifier.core.telemetry import switch_off

__version__ = "0.1.0"
__all__ = ["Problem", "Result", "Verdict", "Witness", "compute_bounds", "verify"]

if TYPE_CHECKING:
    from verifier.api import verify
    from verifier.bounding import compute_bounds
    from verifier.core.problem import Problem
    from verifier.core.result import Result, Verdict, Witness

switch_off()

_WHERE = {
    "verify": "verifier.api",
    "compute_bounds": "verifier.bounding",
    "Problem": "verifier.core.problem",
    "Result": "verifier.core.result",
    "Verdict": "verifier.core.result",
    "Witness": "verifier.core.result",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'verifier' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
