"""The outcome of a query: a verdict, the reason, a witness and the statistics of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np


class Verdict(StrEnum):
    """The five words of a VNN-COMP result file."""

    SAT = "sat"
    UNSAT = "unsat"
    UNKNOWN = "unknown"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True)
class Witness:
    """A counterexample that onnxruntime has replayed (or, for a torch network, the module itself).

    Attributes:
        inputs: shape (n_in,), float64, row-major over the network input, exactly as printed in the result file.
        outputs: shape (n_out,), float64, row-major over the network output at ``inputs``.
        margin: the smallest slack ``d - c.y`` over the rows of the violated case (>= 0).
        case: index of the case of the problem that the witness satisfies.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    margin: float = 0.0
    case: int = 0


@dataclass(frozen=True)
class Covers:
    """What an ``unsat`` holds for.

    Attributes:
        real: the network's stored parameters in real arithmetic.
        float32: every run of the network in float32 by ``run``, whatever its threads and graph optimisations are.
        run: runtime, version and processor; empty where nothing is known of any.
        reason: why runs are not covered, one phrase; empty when they are.
        margin: of the closing bound with the least to spare, its distance from the threshold in real arithmetic; None
            without any.
        error: of a run in the row of that bound; None where runs were not looked at.
    """

    real: bool = False
    float32: bool = False
    run: str = ""
    reason: str = ""
    margin: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Result:
    """The answer to one query.

    Attributes:
        verdict: see :class:`Verdict`.
        reason: one sentence on why; for ``unknown`` what is left and the final gap.
        witness: present exactly when the verdict is ``sat``.
        certified: True when an ``unsat`` rests on float64 bounds with every rounding charged.
        seconds: wall time by phase, in seconds.
        statistics: counters of the run (domains, bounds, attack candidates, ...), JSON-serialisable.
        memory: ``{"ranks": [...]}``, see :class:`verifier.core.inventory.Inventory`; None before weights were placed.
        device: ``cpu`` or ``cuda``, where the query ended; a small one may never have needed its GPU.
        covers: what an ``unsat`` holds for; nothing for other verdicts.
    """

    verdict: Verdict
    reason: str = ""
    witness: Witness | None = None
    certified: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] | None = None
    device: str | None = None
    covers: Covers = field(default_factory=Covers)
