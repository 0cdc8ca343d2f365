"""A neural-network verifier: certified bounds, branch and bound, counterexamples.

``import verifier`` does one thing: it keeps onnxruntime, which is imported later, from reporting to its maker. torch is
imported on first use of the API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from verifier.core.telemetry import switch_off

__version__ = "0.1.0"
__all__ = [
    "Bounds",
    "Certification",
    "Config",
    "InputError",
    "Problem",
    "Result",
    "UncertifiedBounds",
    "UnsupportedError",
    "Verdict",
    "VerifierError",
    "Witness",
    "certified_radius",
    "certify",
    "compute_bounds",
    "from_box",
    "robustness",
    "verify",
]

if TYPE_CHECKING:
    from verifier.api import verify
    from verifier.bounding import Bounds, UncertifiedBounds, compute_bounds
    from verifier.certification.answers import Certification
    from verifier.certification.campaign import certified_radius, certify
    from verifier.config import Config
    from verifier.core.errors import InputError, UnsupportedError, VerifierError
    from verifier.core.problem import Problem
    from verifier.core.result import Result, Verdict, Witness
    from verifier.spec.build import from_box, robustness

switch_off()

_WHERE = {
    "Bounds": "verifier.bounding",
    "Certification": "verifier.certification.answers",
    "Config": "verifier.config",
    "InputError": "verifier.core.errors",
    "Problem": "verifier.core.problem",
    "Result": "verifier.core.result",
    "UncertifiedBounds": "verifier.bounding",
    "UnsupportedError": "verifier.core.errors",
    "Verdict": "verifier.core.result",
    "VerifierError": "verifier.core.errors",
    "Witness": "verifier.core.result",
    "certified_radius": "verifier.certification.campaign",
    "certify": "verifier.certification.campaign",
    "compute_bounds": "verifier.bounding",
    "from_box": "verifier.spec.build",
    "robustness": "verifier.spec.build",
    "verify": "verifier.api",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'verifier' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
