"""What the C library does with memory that CPU tensors have freed."""

from __future__ import annotations

import ctypes
import sys

# Of <malloc.h>: give the end of the heap back only beyond so many free bytes; take larger blocks from the system.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_LARGEST_BLOCK = 32 << 20  # the most that the library accepts


def keep_freed_blocks() -> bool:
    """Have this process keep freed blocks of up to 32 MiB for its next ones, instead of giving each back to the system.

    Every step of an optimisation frees and takes tensors of the same sizes. By default the C library returns those
    of over 128 KiB at once, and the system clears and maps each page again, some percent of a search's time. The end
    of the heap is still given back when over 256 MiB of it are free.

    Returns:
        whether the C library took the advice; only glibc knows it.

    Source: mallopt(3). Meant for processes of one query: it holds for the whole process.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
