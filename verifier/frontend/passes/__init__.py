"""Canonicalising passes. A pass is a function Graph -> Graph that preserves the value of every node it retains.

Weights that a pass changes are computed in float64 and marked as folded (their number of roundings, and the sum of the
magnitudes behind a bias), so that certificates account for these roundings.
"""

from __future__ import annotations

from verifier.core.deadline import Deadline
from verifier.frontend.passes.affine import fold_affine
from verifier.frontend.passes.moves import compose_moves
from verifier.frontend.passes.padding import fold_padding
from verifier.frontend.passes.pairs import cancel_pairs, merge_parallel
from verifier.frontend.passes.sharing import drop_unused, share_equal
from verifier.graph.graph import Graph

# Pairs are looked for where nobody else reads a ReLU: ops that were folded into others must be gone by then.
PASSES = (share_equal, compose_moves, fold_affine, drop_unused, cancel_pairs, fold_padding, drop_unused)


# For networks of whose float32 runs nothing can be claimed.
REAL_PASSES = (*PASSES[:-1], merge_parallel, drop_unused)

# After these, what a nonlinearity reads is a tensor of the file.
ALIGNED_PASSES = (share_equal, compose_moves, fold_affine, fold_padding, drop_unused)


def simplify(graph: Graph, deadline: Deadline | None = None, runs: bool = True, aligned: bool = False) -> Graph:
    """All passes in order; the deadline is looked at between them.

    Args:
        runs: whether bounds may have to hold for float32 runs as well, which some passes would not allow.
        aligned: what a nonlinearity reads stays what it reads in the source.
    """
    for apply in ALIGNED_PASSES if aligned else PASSES if runs else REAL_PASSES:
        if deadline is not None:
            deadline.check("simplifying the network")
        graph = apply(graph)
    return graph
