"""Which neuron to split: one heuristic per file, found by its name in the configuration (``bab.branching``)."""

from __future__ import annotations

from verifier.bab.branching import babsr, kfsb
from verifier.bab.branching.heuristic import Heuristic

HEURISTICS: dict[str, Heuristic] = {"babsr": babsr.HEURISTIC, "kfsb": kfsb.HEURISTIC}
# Where the configuration leaves it open.
DEFAULT = "kfsb"


def named(name: str) -> Heuristic:
    """The heuristic of a name in the configuration; names that are none of neurons mean the default."""
    return HEURISTICS.get(name, HEURISTICS[DEFAULT])
