"""The library's functions are at least twice as accurate as the planes assume, on every device there is."""

from __future__ import annotations

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from tests.ops.exact import UNARY, Exact
from verifier.ops.bent import BentOp
from verifier.ops.curves import CurveOp
from verifier.ops.power import Power

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SMOOTH = [(op, exact, domain) for op, exact, domain in UNARY if isinstance(op, CurveOp | BentOp)]
every_op = pytest.mark.parametrize("case", SMOOTH, ids=[f"{i}-{c[0].kind}" for i, c in enumerate(SMOOTH)])
Case = tuple[CurveOp | BentOp, Exact, tuple[float, float]]


def arguments(domain: tuple[float, float], n: int, mirrored: bool) -> Tensor:
    """float64 values that are exact in float32, of many sizes and dense near the origin."""
    g = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(n, generator=g) * 8 - 5)
    plain = torch.rand(n, generator=g) * 60 - 30
    both = torch.cat([sizes, -sizes, plain])
    both = both.abs() if domain[0] == 0.0 else both
    both = both[both <= domain[1]]
    return (-both if mirrored else both).float().double()


def measure(op: CurveOp | BentOp, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(computed, claimed error) of value and slope at z; for a mirrored curve z is its own argument."""
    if isinstance(op, CurveOp):
        return [(f(z), op.curve.error(f(z))) for f in (op.curve.value, op.curve.slope)]
    return [(f(z), op.error(z)) for f in (op.value, op.slope)]


@devices
@every_op
def test_float32_against_float64(case: Case, device: str) -> None:
    op, _, domain = case
    z = arguments(domain, 20000, False).to(device)
    for (found, error), (want, _) in zip(measure(op, z.float()), measure(op, z), strict=True):
        usable = torch.isfinite(found) & torch.isfinite(want) & (want.abs() < 1e38)
        assert usable.any()
        worst = ((found.double() - want).abs() / error.double())[usable].max().item()
        assert worst <= 0.5


@devices
@every_op
def test_float64_against_60_digits(case: Case, device: str) -> None:
    op, exact, domain = case
    mirrored = isinstance(op, CurveOp) and op.mirrored
    z = arguments(domain, 120, False)
    (value, value_error), (slope, slope_error) = measure(op, z.to(device))
    for i, x in enumerate(z.tolist()):
        at = mpf(-x) if mirrored else mpf(x)
        want = exact(at)
        if value[i].isfinite() and abs(want) > 1e-290:
            assert abs(mpf(value[i].item()) - want) <= mpf(value_error[i].item()) / 2
        derivative = mpmath.diff(exact, at, h=mpf(10) ** -25) * (-1 if mirrored else 1)
        if slope[i].isfinite() and abs(derivative) > 1e-20 and not isinstance(op, Power):
            noise = abs(derivative) * mpf(10) ** -18 + mpf(10) ** -24
            assert abs(mpf(slope[i].item()) - derivative) <= mpf(slope_error[i].item()) / 2 + noise
