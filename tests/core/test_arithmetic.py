"""What a process or its environment asks of torch's arithmetic is set right for a query, put back, or refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from verifier.core.arithmetic import check_environment, full_precision, plain_arithmetic
from verifier.core.errors import ConfigError

PLACES = [("generic", "all"), *((b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn"))]


def precisions() -> list[str]:
    return [torch._C._get_fp32_precision_getter(*place) for place in PLACES]


def flushes() -> bool:
    smallest = torch.ones(4, dtype=torch.int32).view(torch.float32)
    return bool(((smallest + smallest).view(torch.int32) != 2).any())


def inside(look: Callable[[], object]) -> object:
    with plain_arithmetic():
        return look()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_precision_of_products(precision: str) -> None:
    before = precisions()
    torch.set_float32_matmul_precision(precision)
    try:
        given = precisions()
        assert not full_precision()
        assert inside(torch.get_float32_matmul_precision) == "highest"
        assert inside(full_precision)
        assert inside(lambda: torch.backends.cuda.matmul.allow_tf32) is False
        assert torch.get_float32_matmul_precision() == precision and precisions() == given
    finally:
        torch.set_float32_matmul_precision("highest")
        for place, value in zip(PLACES, before, strict=True):
            torch._C._set_fp32_precision_setter(*place, value)


@pytest.mark.parametrize(
    ("place", "value"), [(p, v) for p in PLACES for v in ("tf32", "bf16") if v == "tf32" or p[0] == "mkldnn"]
)
def test_precision_of_one_library(place: tuple[str, str], value: str) -> None:
    before = precisions()
    torch._C._set_fp32_precision_setter(*place, value)
    try:
        given = precisions()
        assert place[0] == "cuda" or not full_precision()
        assert inside(full_precision)
        assert set(inside(precisions)) <= {"none", "ieee"}  # type: ignore[call-overload]
        assert precisions() == given
    finally:
        for where, old in zip(PLACES, before, strict=True):
            torch._C._set_fp32_precision_setter(*where, old)


def test_tf32_of_a_gpu() -> None:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cuda.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = True
    cudnn.deterministic = False
    try:
        assert inside(lambda: set(precisions()) <= {"none", "ieee"})
        with plain_arithmetic():
            cudnn.deterministic, cudnn.benchmark = True, False
        assert (cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (True, True, False, True)
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
        torch.set_float32_matmul_precision("highest")


def test_subnormal_numbers() -> None:
    torch.set_flush_denormal(True)
    try:
        assert flushes() and not inside(flushes)
        assert flushes()
        with pytest.raises(ZeroDivisionError), plain_arithmetic():
            raise ZeroDivisionError
        assert flushes()
    finally:
        torch.set_flush_denormal(False)
    assert not flushes() and not inside(flushes) and not flushes()


THREADS = """
import torch
from verifier.core.arithmetic import plain_arithmetic

def lost():
    smallest = torch.ones(1 << 18, dtype=torch.int32).view(torch.float32)
    return int(((smallest + smallest).view(torch.int32) != 2).sum())

torch.set_num_threads(2)
torch.set_flush_denormal(True)
lost()
torch.set_flush_denormal(False)
assert lost() > 0  # the other thread goes on
with plain_arithmetic():
    assert lost() == 0 and torch.get_num_threads() == 1
assert torch.get_num_threads() == 2
"""


def test_threads_that_flush_already_are_left_out() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=120)


def test_default_dtype_and_autocast() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert inside(torch.get_default_dtype) == torch.float32
        with plain_arithmetic(default=None):
            assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu"):
        assert not full_precision()
        assert not inside(lambda: torch.is_autocast_enabled("cpu")) and inside(full_precision)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_environment_of_the_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """oneDNN is left out while its default precision is lowered."""
    on = torch._C._get_mkldnn_enabled()
    monkeypatch.setenv(name, "BF16")
    assert not full_precision() or not on
    assert inside(full_precision) and not inside(torch._C._get_mkldnn_enabled)
    assert torch._C._get_mkldnn_enabled() == on
    monkeypatch.setenv(name, "strict")
    assert full_precision() and inside(torch._C._get_mkldnn_enabled) == on


@pytest.mark.parametrize(
    "name", ["NVIDIA_TF32_OVERRIDE", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION"]
)
def test_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=name):
        check_environment(torch.device("cuda"))
    check_environment(torch.device("cpu"))
    monkeypatch.setenv(name, "0")
    check_environment(torch.device("cuda"))


ROUNDING = """
import ctypes
import ctypes.util
from verifier.core.arithmetic import plain_arithmetic
from verifier.core.errors import ConfigError

import torch
libm = ctypes.CDLL(ctypes.util.find_library("m"))
for mode in (0x400, 0x800, 0xC00):
    assert libm.fesetround(mode) == 0
    try:
        with plain_arithmetic():
            raise SystemExit(f"mode {mode:#x} was not seen")
    except ConfigError:
        pass
    finally:
        libm.fesetround(0)
with plain_arithmetic():
    pass
"""


def test_other_rounding_is_refused() -> None:
    subprocess.run([sys.executable, "-c", ROUNDING], check=True, timeout=120)
