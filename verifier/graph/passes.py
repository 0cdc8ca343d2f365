"""Canonicalising passes. A pass is a function Graph -> Graph that leaves every value it keeps unchanged.

Parameters that a pass changes are computed in float64 and marked as folded (``bias_magnitude``, ``shift_magnitude``), so
that the certificate charges their rounding.
"""

from __future__ import annotations

from verifier.graph.graph import Graph


def simplify(graph: Graph) -> Graph:
    """All passes in order."""
    return graph
