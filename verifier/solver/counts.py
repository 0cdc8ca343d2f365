"""Counts of several searches for one query: what was done adds up, what is left is the last one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ADDED = ("domains", "closed", "rounds", "leaves", "uncertified", "forced")


def add_counts(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of a search, with those of the earlier searches of its kind.

    Args:
        before: of all earlier ones together; ``None`` for none.
        now: of the last one, with ``domains`` bounded, ``open`` ones left and so on; ``groups`` has a part per group.
    """
    if before is None:
        return dict(now)
    found = {**now, **{key: before[key] + now.get(key, 0) for key in _ADDED if key in before}}
    if "depth" in before:
        found["depth"] = max(before["depth"], now.get("depth", 0))
    old, new = before.get("groups", []), now.get("groups", [])
    if old and new and len(old) == len(new):
        found["groups"] = [{key: a.get(key, 0) + b[key] for key in b} for a, b in zip(old, new, strict=True)]
    elif old and not new:
        found["groups"] = old
    return found
