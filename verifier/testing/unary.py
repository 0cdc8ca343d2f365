"""What holds of unary elementwise ops in exact arithmetic: intervals and planes, for every box, parameter value and
dtype; and how exactly functions are evaluated. Every function raises AssertionError where something does not hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, UnaryPlanes
from verifier.ops.bent import BentOp
from verifier.ops.curves import CurveOp
from verifier.ops.power import Power
from verifier.testing.samples import DIGITS, Exact, chosen, numbers, require

# Each of the zooms at the place of an extremum divides the interval into so many.
_ZOOMS, _PLACES = 6, 33
_FRACTIONS = [0.01, 0.2, 0.5, 0.77, 0.99]


def exact_number(value: float) -> Any:
    """A number of mpmath's, which computes with :data:`DIGITS` digits from now on."""
    from mpmath import mp, mpf

    mp.dps = DIGITS
    return mpf(value)


def plane_at(slope: float, intercept: float, z: float) -> Any:
    """slope z + intercept, exactly."""
    return exact_number(slope) * exact_number(z) + exact_number(intercept)


def interval_contains_exact_values(op: NonlinearOp, exact: Exact, box: Interval) -> None:
    """Of a (1, n) box."""
    image = op.interval([box], ())
    found = _extremes(op, box)
    for i, zs in enumerate(numbers(box, [0.25, 0.5, 0.9])):
        zs = [*zs, *found[i]]
        low, up = image.lower[0, i].item(), image.upper[0, i].item()
        where = f"{op.kind} on [{box.lower[0, i].item()!r}, {box.upper[0, i].item()!r}] in {box.lower.dtype}"
        require(not math.isnan(low) and not math.isnan(up), f"{where}: the interval has NaN")
        for z in zs:
            require(low <= exact(exact_number(z)) <= up, f"{where}: f({z!r}) is not in [{low!r}, {up!r}]")


def _extremes(op: NonlinearOp, box: Interval) -> list[list[float]]:
    """Where, in every interval of a (1, n) box, values in float64 are smallest and largest; seldom sampled points."""
    low, up = (b[0].double() for b in box)
    width, sides = up - low, []
    for sign in (1.0, -1.0):
        first, last = low, up
        for _ in range(_ZOOMS):
            z = first + (last - first) * torch.linspace(0, 1, _PLACES, dtype=torch.float64, device=low.device)[:, None]
            y = (sign * op.forward([z.clamp(low, up)], ())).nan_to_num(math.inf)
            at = z.gather(0, y.argmin(0)[None])[0]
            step = (last - first) / (_PLACES - 1)
            first, last = torch.maximum(at - step, low), torch.minimum(at + step, up)
        sides.append(at.to(box.lower.dtype).double().clamp(low, up))
    usable = torch.isfinite(width)
    return [[float(side[i]) for side in sides] if usable[i] else [] for i in range(low.shape[0])]


def planes_hold_exactly(op: NonlinearOp, exact: Exact, box: Interval, share: float | None) -> None:
    """Of a (1, n) box, with parameters at a share of their range or the initial ones."""
    specs = op.parameters([box])
    params = None if share is None else {k: chosen(spec, share, 1) for k, spec in specs.items()}
    planes = op.relax([box], params)
    require(isinstance(planes, UnaryPlanes), f"{op.kind}: the planes of a unary op are UnaryPlanes")
    assert isinstance(planes, UnaryPlanes)
    shape = torch.broadcast_shapes(*(t.shape for t in (planes.lower_slope, planes.upper_slope)), (1, 1, 1))
    parts = [
        t.expand(shape)[0, 0].tolist()
        for t in (planes.lower_slope, planes.lower_intercept, planes.upper_slope, planes.upper_intercept)
    ]
    for i, zs in enumerate(numbers(box, _FRACTIONS)):
        ls, li, us, ui = (p[i] for p in parts)
        ends = f"[{box.lower[0, i].item()!r}, {box.upper[0, i].item()!r}]"
        where = f"{op.kind} on {ends} in {box.lower.dtype}, share {share}"
        require(not any(map(math.isnan, (ls, li, us, ui))), f"{where}: a plane has NaN")
        require(math.isfinite(ls) and math.isfinite(us), f"{where}: a slope is infinite")
        for z in zs:
            value = exact(exact_number(z))
            require(
                li == -math.inf or plane_at(ls, li, z) <= value,
                f"{where}: the lower plane {ls!r}, {li!r} fails at {z!r}",
            )
            require(
                ui == math.inf or plane_at(us, ui, z) >= value,
                f"{where}: the upper plane {us!r}, {ui!r} fails at {z!r}",
            )


# ------------------------------------------------------------------------------------------------------- accuracy


def arguments(domain: tuple[float, float], n: int, mirrored: bool) -> Tensor:
    """float64 values that are exact in float32, of many sizes and dense near the origin."""
    g = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(n, generator=g) * 8 - 5)
    plain = torch.rand(n, generator=g) * 60 - 30
    both = torch.cat([sizes, -sizes, plain])
    both = both.abs() if domain[0] == 0.0 else both
    both = both[(both >= domain[0]) & (both <= domain[1])]
    return (-both if mirrored else both).float().double()


def measure(op: CurveOp | BentOp, z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(computed, claimed error) of value and slope at z; for a mirrored curve z is its own argument."""
    if isinstance(op, CurveOp):
        return [(f(z), op.curve.error(f(z))) for f in (op.curve.value, op.curve.slope)]
    return [(f(z), op.error(z)) for f in (op.value, op.slope)]


def float32_is_twice_as_exact(op: CurveOp | BentOp, domain: tuple[float, float], device: torch.device) -> None:
    """Value and slope in float32 against float64: at most half of the error that the planes account for."""
    z = arguments(domain, 20000, False).to(device)
    for (found, error), (want, _) in zip(measure(op, z.float()), measure(op, z), strict=True):
        usable = torch.isfinite(found) & torch.isfinite(want) & (want.abs() < 1e38)
        require(bool(usable.any()), f"{op.kind}: no value is finite")
        worst = ((found.double() - want).abs() / error.double())[usable].max().item()
        require(worst <= 0.5, f"{op.kind}: float32 errs by {worst:.2f} of the claimed error, more than half of it")


def float64_is_twice_as_exact(
    op: CurveOp | BentOp, exact: Exact, domain: tuple[float, float], device: torch.device
) -> None:
    """Value and slope in float64 against 60 digits."""
    import mpmath

    mirrored = isinstance(op, CurveOp) and op.mirrored
    z = arguments(domain, 120, False)
    (value, value_error), (slope, slope_error) = measure(op, z.to(device))
    for i, x in enumerate(z.tolist()):
        at = exact_number(-x if mirrored else x)
        want = exact(at)
        if value[i].isfinite() and abs(want) > 1e-290:
            _near(f"{op.kind}: f({x!r})", value[i].item(), want, exact_number(value_error[i].item()) / 2)
        derivative = mpmath.diff(exact, at, h=exact_number(10) ** -25) * (-1 if mirrored else 1)
        if slope[i].isfinite() and abs(derivative) > 1e-20 and not isinstance(op, Power):
            noise = abs(derivative) * exact_number(10) ** -18 + exact_number(10) ** -24
            half = exact_number(slope_error[i].item()) / 2
            _near(f"{op.kind}: f'({x!r})", slope[i].item(), derivative, half + noise)


def _near(what: str, found: float, want: Any, room: Any) -> None:
    error = abs(exact_number(found) - want)
    require(bool(error <= room), f"{what} is off by {float(error):.3g}, more than half of the claimed error")
