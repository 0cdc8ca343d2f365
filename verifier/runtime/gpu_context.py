"""The GPU's context, begun while torch is still being imported."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verifier.config import Config

_DRIVER = "libcuda.so.1"


def begin_context(config: Config) -> threading.Thread | None:
    """Create the first GPU's primary context, the one that torch uses, in a thread; without a GPU that is nothing.

    The driver does its part without Python's lock, and whoever needs the context first waits for it. A rank of torchrun
    may have another GPU, so nothing is begun for it.
    """
    if config.device == "cpu" or "LOCAL_RANK" in os.environ:
        return None
    thread = threading.Thread(target=_create, name="context", daemon=True)
    thread.start()
    return thread


def _create() -> None:
    """Errors are left to torch, which meets them again and knows the words."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
