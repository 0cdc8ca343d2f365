"""The JSON record of a query. All but ``seconds`` and the peak of memory is the same for the same seed and device.

The record's JSON Schema is ``schemas/verify.schema.json``; ``verifier config schema --of verify`` prints it.
"""

from __future__ import annotations

import json
import math
import numbers
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import verifier
from verifier.core.errors import InputError
from verifier.core.messages import Json
from verifier.core.plugins import Plugin

SCHEMA_VERSION = 1
_PACKAGES = ("numpy", "torch", "onnx", "onnx2torch", "onnxruntime", "highspy")
_SCHEMAS = ("bounds", "verify")
_COVERS_NOTHING: Mapping[str, Json] = {
    "real": False,
    "float32": False,
    "run": "",
    "reason": "",
    "margin": None,
    "error": None,
}


@dataclass(frozen=True)
class Outcome:
    """What a finished query, or one that was cut off, says; all values are JSON.

    Attributes:
        verdict: one of the five words.
        reason: one sentence.
        witness_text: the counterexample as printed in the result file; only after ``sat``.
        witness: the counterexample as numbers; only after ``sat``.
        certified: whether an ``unsat`` rests on certified bounds.
        covers: what an ``unsat`` holds for, see :class:`verifier.core.result.Covers`.
        seconds: wall time by phase.
        statistics: counters of the run.
        memory: what every rank took, ``None`` when the query ended before its end was orderly.
        device: the device that was used last, ``None`` when the query ended before one was chosen.
        notes: settings that were ignored or paths that fell back, in words.
        error: class and message when the query ended in an error.
        exit_code: of the command.
        trace: traceback of an internal error.
        written: whether the files it was meant for could be written; known only once it is over.
    """

    verdict: str
    reason: str = ""
    witness_text: str | None = None
    witness: Mapping[str, Json] | None = None
    certified: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Json] = field(default_factory=dict)
    memory: Mapping[str, Json] | None = None
    device: str | None = None
    covers: Mapping[str, Json] = field(default_factory=lambda: dict(_COVERS_NOTHING))
    notes: tuple[str, ...] = ()
    error: Mapping[str, str] | None = None
    exit_code: int = 0
    trace: str = ""
    written: bool = True


@dataclass(frozen=True)
class Asked:
    """What was asked, and of which software.

    Attributes:
        onnx, vnnlib: ``{"path", "sha256"}`` of the files.
        timeout: the limit in seconds.
        config: every setting.
        versions: see :func:`versions`.
    """

    onnx: Mapping[str, Any]
    vnnlib: Mapping[str, Any]
    timeout: float | None
    config: Mapping[str, Any]
    versions: Mapping[str, str | None]


def verify_record(
    outcome: Outcome,
    asked: Asked,
    seconds: float,
    extra: Mapping[str, Any] | None = None,
    plugins: Iterable[Plugin] = (),
) -> dict[str, Any]:
    """The record of one query.

    Args:
        outcome: how it ended.
        seconds: wall time of the whole query, process start included.
        extra: more entries (``verifier run`` adds the category).
        plugins: what other packages brought to it besides those that the outcome names.
    """
    statistics = dict(outcome.statistics)
    taking_part = [*_listed(statistics.pop("plugins", [])), *(plugin.entry() for plugin in plugins)]
    return {
        "schema_version": SCHEMA_VERSION,
        **(extra or {}),
        "onnx": dict(asked.onnx),
        "vnnlib": dict(asked.vnnlib),
        "timeout": asked.timeout,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "certified": outcome.certified,
        "covers": dict(outcome.covers),
        "parity": statistics.pop("parity", None),
        "bounds": statistics.pop("bounds", statistics.pop("root", None)),
        "domains": _domains(statistics),
        "statistics": statistics,
        "memory": outcome.memory,
        "witness": outcome.witness,
        "error": outcome.error,
        "notes": list(outcome.notes),
        "seed": asked.config["seed"],
        "device": outcome.device,
        "config": dict(asked.config),
        "versions": dict(asked.versions),
        "plugins": taking_part,
        "seconds": {"total": round(seconds, 3), **{k: round(float(v), 3) for k, v in outcome.seconds.items()}},
    }


def _listed(plugins: Any) -> list[Any]:
    """A list, which is a text in JSON where it was reported as a figure."""
    return json.loads(plugins) if isinstance(plugins, str) else list(plugins)


def _domains(statistics: Mapping[str, Any]) -> int | None:
    """How many domains all searches bounded; ``None`` when no search began. Their own counts stay in the statistics."""
    counts = [part.get("domains") for part in (statistics, *statistics.values()) if isinstance(part, Mapping)]
    numbers = [count for count in counts if isinstance(count, int)]
    return sum(numbers) if numbers else None


def versions() -> dict[str, str | None]:
    """Versions of everything a verdict rests on, found without importing it; ``None``: not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {"verifier": verifier.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def to_json(record: Any, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become the strings ``nan``, ``inf`` and ``-inf``."""
    return json.dumps(plain(record), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """The value in JSON's own types; what JSON has no type for becomes its text, so that a record is never lost."""
    match value:
        case None | bool():
            return value
        case str():
            return _encodable(value)
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            number = float(value)
            return number if math.isfinite(number) else str(number)
        case Mapping():
            return {_encodable(str(k)): plain(v) for k, v in value.items()}
        case list() | tuple():
            return [plain(v) for v in value]
    return _encodable(str(value))


def _encodable(text: str) -> str:
    """The text, with lone surrogates, which file names that are no UTF-8 have in Python, escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a record: ``verify`` (also the lines of ``run``) or ``bounds``."""
    if name not in _SCHEMAS:
        raise InputError(f"no schema '{name}'; there are {', '.join(_SCHEMAS)}")
    from importlib import resources

    text = resources.files("verifier.report").joinpath("schemas", f"{name}.schema.json").read_text(encoding="utf-8")
    return json.loads(text)
