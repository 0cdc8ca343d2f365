"""The outcome of a query: a verdict, the reason, a witness and the statistics of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from verifier.core.problem import Variable


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
        variables: the tensors that are printed, for a property that names its tensors.
        input_shape: of one sample as the network takes it, its leading dimension included; None: not known here.
        output_shape: likewise.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    margin: float = 0.0
    case: int = 0
    variables: tuple[Variable, ...] = ()
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None

    @property
    def x(self) -> np.ndarray:
        """The inputs in the shape that the network takes."""
        return self.inputs if self.input_shape is None else self.inputs.reshape(self.input_shape)

    @property
    def y(self) -> np.ndarray:
        """The outputs in the network's shape."""
        return self.outputs if self.output_shape is None else self.outputs.reshape(self.output_shape)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers, nested like the network's input and output."""
        return {"inputs": self.x.tolist(), "outputs": self.y.tolist(), "margin": float(self.margin), "case": self.case}


@dataclass(frozen=True)
class Covers:
    """What an ``unsat`` holds for.

    Attributes:
        real: the network with its stored weights, in real arithmetic.
        float32: every float32 run of the network by ``run``, with any number of threads and any graph optimisations.
        run: runtime, version and processor; empty where no run can be modelled.
        reason: why runs are not covered, one phrase; empty when they are.
        margin: distance of the closing bound with the smallest slack from its threshold, in real arithmetic; None
            without any.
        error: largest error of a run in the row of that bound; None where runs were not considered.
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
        reason: one sentence on why; for ``unknown``, what is left and the final gap.
        witness: present exactly when the verdict is ``sat``.
        certified: True when an ``unsat`` rests on float64 bounds in which all rounding errors are accounted for.
        seconds: wall time by phase, in seconds.
        statistics: counters of the run (domains, bounds, attack candidates, ...), JSON-serialisable; ``plugins`` lists
            what other packages contributed to it, if they did.
        memory: ``{"ranks": [...]}``, see :class:`verifier.core.inventory.Inventory`; None before weights were loaded.
        device: ``cpu`` or ``cuda``, where the query ended; a small query may never use the GPU.
        covers: what an ``unsat`` holds for; empty for other verdicts.
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

    def __bool__(self) -> bool:
        """Refused: it would be true for every verdict.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a result is neither true nor false; its verdict is '{self.verdict.value}': ask for "
            "result.verdict == 'unsat' (proved) or result.verdict == 'sat' (there is a counterexample)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types: strings, numbers, lists and dictionaries; numbers that are not finite are None."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "certified": self.certified,
            "witness": None if self.witness is None else self.witness.to_dict(),
            "covers": asdict(self.covers),
            "seconds": _plain(self.seconds),
            "statistics": _plain(self.statistics),
            "memory": _plain(self.memory),
            "device": self.device,
        }

    def to_json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """A value in types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
