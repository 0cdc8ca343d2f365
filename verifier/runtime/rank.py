"""The life of a rank that another process started: join the job, take part in its phases, die with it."""

from __future__ import annotations

import os
import sys
import traceback

from verifier.runtime.processes import die_with_parent


def is_other_rank() -> bool:
    """Whether torchrun has started this process as a rank other than the first."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def serve(address: str, rank: int, size: int, device: str, parent: int) -> int:
    """Take part in a job until it ends.

    Args:
        address: host and port of the job's store.
        parent: process id of rank 0, which started this one.

    Returns:
        exit code; on a failure the others are told first.
    """
    die_with_parent(True)
    if os.getppid() != parent:
        return 1
    from verifier.core.allocator import keep_freed_blocks
    from verifier.parallel.launch import join_leader
    from verifier.solver.ranks import rank_loop

    keep_freed_blocks()
    world = join_leader(address, rank, size, device)
    try:
        rank_loop(world, object)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0
