"""How much of some work's time a GPU computes: the union of its kernels' times, as the profiler notes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


def kernel_share(work: Callable[[], object]) -> float | None:
    """Share of the work's wall time in which a kernel runs; None without a CUDA device. The work is done once."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()  # raw: tables of millions of events take minutes to make
    kernels = [
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.device_type() == DeviceType.CUDA and not e.name().startswith(("Memcpy", "Memset"))
    ]
    return covered(kernels) / 1e9 / seconds


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of spans (start, end)."""
    total, reached = 0, None
    for start, end in sorted(spans):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total
