"""The library's functions are at least twice as accurate as the planes assume, on every device there is."""

from __future__ import annotations

import pytest
import torch

from tests.ops.exact import UNARY
from verifier.ops.bent import BentOp
from verifier.ops.curves import CurveOp
from verifier.testing import unary
from verifier.testing.samples import Exact

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SMOOTH = [(op, exact, domain) for op, exact, domain in UNARY if isinstance(op, CurveOp | BentOp)]
every_op = pytest.mark.parametrize("case", SMOOTH, ids=[f"{i}-{c[0].kind}" for i, c in enumerate(SMOOTH)])
Case = tuple[CurveOp | BentOp, Exact, tuple[float, float]]


@devices
@every_op
def test_float32_against_float64(case: Case, device: str) -> None:
    op, _, domain = case
    unary.float32_is_twice_as_exact(op, domain, torch.device(device))


@devices
@every_op
def test_float64_against_60_digits(case: Case, device: str) -> None:
    op, exact, domain = case
    unary.float64_is_twice_as_exact(op, exact, domain, torch.device(device))
