"""Memory used by tensors: every live storage of one device counted once, and the peak.

On a GPU the allocator keeps this count itself; on a CPU nothing does. The resident set of the process is no substitute:
it includes libraries, the parsed network and pages that the allocator has not returned.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from verifier.core.inventory import PeakKind


class ByteTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is active.

    A storage enters the count with the first result that lies in it and leaves it when it is freed, also after the
    tracker has ended. Views share their base's storage and add nothing; a storage that an in-place or ``out=``
    operation resizes is counted anew. Storages that existed before are counted when :meth:`add` names them, or when
    an operation returns a view of them.

    What it cannot see: scratch space inside a kernel, memory outside of tensors, and operations of other threads (a
    dispatch mode belongs to the thread that entered it). Storages that were counted here may be freed by any thread.

    Attributes:
        current: bytes alive now.
        peak: the most that were alive at once since the start or :meth:`reset_peak`.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._device = device
        # By address of the storage: an address is used again only after its storage has died and left this table.
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._lock = threading.RLock()  # storages die in any thread, and inside this class when garbage is collected

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages, as a baseline."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Restart the peak from what is alive now."""
        with self._lock:
            self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._see_all(result)
        return result

    def _see_all(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._see(value)
        elif isinstance(value, list | tuple):
            for part in value:
                self._see_all(part)

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key not in self._alive:
                self._alive[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._set(key, size)

    def _forget(self, key: int) -> None:
        with self._lock:
            self._set(key, 0)
            self._alive.pop(key, None)
            self._sizes.pop(key, None)

    def _set(self, key: int, size: int) -> None:
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)


@dataclass
class Peak:
    """The most bytes that tensors of a device took at once; filled when the measuring ends."""

    bytes: int = 0
    kind: PeakKind = "tensors"


@contextmanager
def measured_peak(device: torch.device, baseline: Iterable[Tensor] = ()) -> Iterator[Peak]:
    """Measure the peak of what runs inside the context, in this thread.

    Args:
        device: where the work is done. A GPU's own allocator is asked, which counts everything that is on it; on the
            CPU a :class:`ByteTracker` counts tensors.
        baseline: CPU tensors that exist before and stay, such as the weights.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield found
        finally:
            found.bytes, found.kind = int(torch.cuda.max_memory_allocated(device)), "allocator"
        return
    tracker = ByteTracker()
    tracker.add(baseline)
    try:
        with tracker:
            yield found
    finally:
        found.bytes = tracker.peak
