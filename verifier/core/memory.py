"""Memory: recognising failed allocations, and how much is free."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T", bound="Halvable")


class Halvable(Protocol):
    """A batch that can be worked on in two halves."""

    def halves(self) -> list[Any]: ...


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


def in_halves(parts: list[T], work: Callable[[T], None], failed: Callable[[T, Exception], bool]) -> None:
    """Do some work on every part, the last one first; a part that does not fit into memory is halved and tried again.

    Args:
        parts: the list is emptied.
        failed: told of a part whose allocation failed; whether to go on with its halves.
    """
    while parts:
        part = parts.pop()
        try:
            work(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if failed(part, error):
                parts += part.halves()
