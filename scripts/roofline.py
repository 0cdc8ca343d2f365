"""What a device could do: its rates, counted work, and the least time that this work takes there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")


# --------------------------------------------------------------------------------------------------------- the device


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device, threads: bool = True) -> str:
    """The device in words; of a CPU the model and, unless left out, the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} x {torch.get_num_threads()}" if threads else _cpu_model()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the device has finished, and the result."""
    synchronise(device)
    start = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - start, result


# ------------------------------------------------------------------------------------------------------- the roofline


@dataclass(frozen=True)
class Rates:
    """What the device does per second: operations of a large product in float32 and float64, bytes of a large copy."""

    flops: float
    flops64: float
    bytes: float

    def __str__(self) -> str:
        return (
            f"product {self.flops / 1e12:.3g} TFLOP/s (float64 {self.flops64 / 1e12:.3g}), "
            f"copy {self.bytes / 1e9:.3g} GB/s"
        )


@dataclass(frozen=True)
class Work:
    """Counted operations in float32 and in float64, and bytes read or written."""

    flops: float = 0.0
    flops64: float = 0.0
    bytes: float = 0.0


def measured(device: torch.device) -> Rates:
    """Rates of products of square matrices and of a copy, the best of a few."""
    n, size = (8192, 1 << 28) if device.type == "cuda" else (1024, 1 << 25)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return 2.0 * n**3 / best_of(5, device, lambda: torch.mm(a, b))

    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    copy = 8.0 * size / best_of(5, device, lambda: target.copy_(source))
    return Rates(product(torch.float32), product(torch.float64), copy)


def best_of(times: int, device: torch.device, work: Callable[[], object]) -> float:
    return min(timed(device, work)[0] for _ in range(times + 1))  # the first one warms up


def roofline(work: Work, rates: Rates, memory: bool = True) -> float:
    """Least seconds that the work could take: products and traffic overlap, the slower of the two decides.

    Args:
        memory: whether traffic is a limit; it is none for what stays in the caches.
    """
    products = work.flops / rates.flops + work.flops64 / rates.flops64
    return max(products, work.bytes / rates.bytes if memory else 0.0)


class Counter(TorchDispatchMode):
    """Counts what runs inside: operations of products and convolutions, bytes that every operation reads and writes.

    An operation's bytes are those of its tensors, each once, as if nothing was left in a cache by the one before; views
    move nothing. Elementwise operations count as traffic alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flops = {torch.float32: 0.0, torch.float64: 0.0}
        self._bytes = 0.0

    @property
    def work(self) -> Work:
        return Work(self._flops[torch.float32], self._flops[torch.float64], self._bytes)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = {id(t): t for t in (*_tensors(args), *_tensors((kwargs or {}).values()), *_tensors(result))}
            # An expanded tensor has more elements than memory.
            self._bytes += sum(
                min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors.values()
            )
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            dtype = result.dtype
            self._flops[dtype] = self._flops.get(dtype, 0.0) + count(*args, **(kwargs or {}), out_val=result)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return []
    return [t for part in value for t in _tensors(part)]
