"""External settings that change torch's arithmetic: overridden for a query and restored after it, or refused.

Rounding error bounds assume IEEE arithmetic: float32 products in full precision, rounding to nearest, subnormal numbers
preserved by elementwise operations and conversions (matrix products may flush them). A process that calls the verifier
may have configured torch differently, and so may its environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from verifier.core.errors import ConfigError

# torch's precisions of float32 products, as (backend, operation).
_CPU = (("generic", "all"), ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))
_GPU = (("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"))
_FULL = ("none", "ieee")

# What NVIDIA's libraries read: products of float32 or float64 numbers with fewer bits, whatever torch asks for.
_GPU_VARIABLES = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION")
# What oneDNN reads: the precision of convolutions and products whose caller asks for none.
_CPU_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")

# Elements of a tensor per thread that work on it together.
_GRAIN = 32768


def full_precision() -> bool:
    """Whether products of float32 numbers on the CPU are computed in float32."""
    try:
        plain = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's two ways of setting it contradict each other
        return False
    lowered = any(torch._C._get_fp32_precision_getter(*place) not in _FULL for place in _CPU)
    onednn = torch._C._get_mkldnn_enabled() and any(map(_lowered, _CPU_VARIABLES))
    return plain and not lowered and not onednn and not torch.is_autocast_enabled("cpu")


def check_environment(device: torch.device) -> None:
    """Refuse variables that make a GPU's libraries compute in other arithmetic than they are asked for.

    Raises:
        ConfigError: naming one.
    """
    for name in _GPU_VARIABLES if device.type == "cuda" else ():
        if os.environ.get(name, "0").strip() not in ("", "0"):
            raise ConfigError(
                f"the environment variable {name} is {os.environ[name]}, which makes products on the GPU less exact "
                "than proofs suppose; unset it, or use device=cpu"
            )


@contextmanager
def plain_arithmetic(default: torch.dtype | None = torch.float32) -> Iterator[None]:
    """IEEE arithmetic in this thread and in those that torch shares work with; all settings are put back at the end.

    Where threads that exist already flush subnormal numbers, which only they themselves could change, one thread works.

    Args:
        default: dtype of tensors that are made without one; None: the caller's.

    Raises:
        ConfigError: subnormal numbers are flushed, or results rounded, in a way that cannot be set right.
    """
    with ExitStack() as stack:
        stack.enter_context(_full_precision())
        stack.enter_context(_default_dtype(default or torch.get_default_dtype()))
        stack.enter_context(_subnormals())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if not _rounds_to_nearest():
            raise ConfigError("this process rounds results otherwise than to nearest, which proofs suppose")
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32, of every library."""
    places = {place: torch._C._get_fp32_precision_getter(*place) for place in (*_CPU, *_GPU)}
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = None
    cudnn = torch.backends.cudnn
    kernels = cudnn.deterministic, cudnn.benchmark
    onednn = torch._C._get_mkldnn_enabled()
    try:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        for place, value in places.items():
            if value not in _FULL:
                torch._C._set_fp32_precision_setter(*place, "ieee")
        if any(map(_lowered, _CPU_VARIABLES)):
            torch._C._set_mkldnn_enabled(False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        cudnn.deterministic, cudnn.benchmark = kernels
        if precision is not None and torch._C._get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        for place, value in places.items():
            if torch._C._get_fp32_precision_getter(*place) != value:
                torch._C._set_fp32_precision_setter(*place, value)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _subnormals() -> Iterator[None]:
    """Subnormal numbers are kept: by this thread, and by all that work on one tensor."""
    here, threads = _flushes(1), torch.get_num_threads()
    try:
        if here:
            torch.set_flush_denormal(False)
        if threads > 1 and _flushes(threads):
            torch.set_num_threads(1)
        if _flushes(1):
            raise ConfigError("this process flushes subnormal numbers to zero and cannot be told otherwise")
        yield
    finally:
        if here:
            torch.set_flush_denormal(True)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _flushes(threads: int) -> bool:
    """Whether one of so many threads loses subnormal numbers: the smallest one and itself are the second smallest."""
    smallest = torch.ones(_GRAIN * threads if threads > 1 else 1, dtype=torch.int32).view(torch.float32)
    return bool(((smallest + smallest).view(torch.int32) != 2).any())


def _rounds_to_nearest() -> bool:
    """Whether Python's own numbers, which this thread computes like torch's, are rounded to nearest."""
    one, half = float(len("1")), 2.0**-53
    return one + half == one and one + 1.5 * half > one and -one - half == -one and -one - 1.5 * half < -one


def _lowered(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "strict")
