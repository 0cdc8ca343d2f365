"""Bounds as JSON that two runs can be compared by, bit for bit, as text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verifier.report.record import SCHEMA_VERSION

Pair = tuple[np.ndarray, np.ndarray]


def hex_floats(values: np.ndarray, absent: float) -> list[str]:
    """``float.hex()`` of float32 values in C order, or ``inf``/``-inf``.

    Args:
        absent: what a NaN becomes: the infinity that says nothing on this side.
    """
    numbers = np.asarray(values, dtype=np.float32).reshape(-1).tolist()
    return [_hex(absent if math.isnan(number) else number) for number in numbers]


def _hex(number: float) -> str:
    return number.hex() if math.isfinite(number) else ("inf" if number > 0 else "-inf")


def intervals(bounds: Mapping[str, Pair]) -> dict[str, dict[str, list[str]]]:
    """Lower and upper bounds by name."""
    return {
        name: {"lower": hex_floats(lower, -math.inf), "upper": hex_floats(upper, math.inf)}
        for name, (lower, upper) in bounds.items()
    }


def fingerprint(values: np.ndarray) -> dict[str, Any]:
    """Shape and hash of the little-endian float32 values in C order."""
    data = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(data.shape), "sha256": hashlib.sha256(data.tobytes()).hexdigest()}


def bounds_record(
    plain: Mapping[str, Pair],
    certified: Mapping[str, Pair],
    slopes: Mapping[str, np.ndarray] | None,
    ranks: Sequence[Mapping[str, Any]],
    head: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of ``verifier bounds``; its JSON Schema is ``schemas/bounds.schema.json``.

    Args:
        plain, certified: bounds by name before and after certification; nothing is certified when it was turned off.
        slopes: by name, or ``None`` when not asked for.
        ranks: every rank's memory, see :class:`verifier.core.inventory.Inventory`.
        head: what the query was (files, method, settings, versions, seconds).
    """
    return {
        "schema_version": SCHEMA_VERSION,
        **head,
        "bounds": intervals(plain),
        "certified": intervals(certified),
        **({} if slopes is None else {"slopes": {name: fingerprint(values) for name, values in slopes.items()}}),
        "memory": {"ranks": [dict(rank) for rank in ranks]},
    }
