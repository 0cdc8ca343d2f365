"""Canonicalising passes. A pass is a function Graph -> Graph that preserves the value of every node it retains.

Weights that a pass changes are computed in float64 and marked as folded (their number of roundings, and the sum of the
magnitudes behind a bias), so that certificates account for these roundings.
"""

from __future__ import annotations

from verifier.core.deadline import Deadline
from verifier.frontend.passes.affine import fold_affine
from verifier.frontend.passes.moves import compose_moves
from verifier.frontend.passes.padding import fold_padding
from verifier.frontend.passes.sharing import drop_unused, share_equal
from verifier.graph.graph import Graph

PASSES = (share_equal, compose_moves, fold_affine, fold_padding, drop_unused)


def simplify(graph: Graph, deadline: Deadline | None = None) -> Graph:
    """All passes in order; the deadline is looked at between them."""
    for apply in PASSES:
        if deadline is not None:
            deadline.check("simplifying the network")
        graph = apply(graph)
    return graph
