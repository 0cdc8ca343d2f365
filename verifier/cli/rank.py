"""The life of a rank that another process started: join the job, take part in its phases, die with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback

from verifier.core.errors import MemoryExceeded

_PR_SET_PDEATHSIG = 1


def serve(address: str, rank: int, size: int, device: str, parent: int) -> int:
    """Take part in a job until it ends.

    Args:
        address: host and port of the job's store.
        parent: process id of rank 0, which started this one.

    Returns:
        exit code; on a failure the others are told first.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    from verifier.core.memory import out_of_memory
    from verifier.parallel.world import follow_leader
    from verifier.solver.crew import follow

    world = follow_leader(address, rank, size, device)
    try:
        follow(world)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        memory = isinstance(error, MemoryExceeded) or out_of_memory(error)
        kind = "memory" if memory else type(error).__name__
        first = (str(error).strip().splitlines() or [""])[0]
        world.heart.report(kind, first if memory else f"{type(error).__name__}: {first}")
        return 1
    return 0
