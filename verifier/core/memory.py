"""Memory: recognising failed allocations, and how much is free."""

from __future__ import annotations

import os

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed, on any device."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "not enough memory" in text or "out of memory" in text
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
