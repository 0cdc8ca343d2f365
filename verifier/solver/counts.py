"""What searches did and left, as it stands in a record."""

from __future__ import annotations

import math
from typing import Any, Literal

from verifier.bab.statistics import SearchTotals

SearchKind = Literal["input_split", "relu_split", "value_split"]

_OF_KIND: dict[SearchKind, tuple[str, ...]] = {
    "input_split": ("depth",),
    "relu_split": ("leaves", "uncertified", "forced", "programs", "clauses"),
    "value_split": ("uncertified",),
}


def entry(kind: SearchKind, totals: SearchTotals) -> dict[str, Any]:
    """Domains bounded, closed and left open, rounds, and what only searches of this kind count; ``worst``, the lowest
    bound minus threshold, while domains are open; with several groups, what each of them bounded and received."""
    done = totals.statistics
    found: dict[str, Any] = {
        "domains": done.bounded,
        "closed": done.closed,
        "open": totals.left,
        "rounds": done.rounds,
        **{name: getattr(done, name) for name in _OF_KIND[kind]},
    }
    if math.isfinite(done.worst):
        found["worst"] = done.worst
    if totals.groups:
        found["groups"] = [{"domains": g.bounded, "received": g.received} for g in totals.groups]
    return found
