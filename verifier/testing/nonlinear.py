"""What holds of every nonlinear op: forward and backward agree, gradients match autograd, planes and intervals enclose
the values. Every function raises AssertionError where it does not. B = 2 domains, S = 3 rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.graph.op import NonlinearOp, Relaxation
from verifier.testing.samples import Sample, coefficients, parameters, points, random_boxes, require

B, S = 2, 3


def nonlinear(s: Sample) -> NonlinearOp:
    """The op of a sample of a nonlinear one."""
    if not isinstance(s.op, NonlinearOp):
        raise TypeError(f"{s.name}: {s.op.kind} is no NonlinearOp")
    return s.op


def linear_value(relaxation: Relaxation, a: Tensor, zs: list[Tensor]) -> Tensor:
    """(B, S): what ``backward`` makes of a . y at points."""
    found, constant = relaxation.backward(a)
    for c, z in zip(found, zs, strict=True):
        require(c.shape == z.shape, f"backward gives coefficients of the shape {list(c.shape)}, not {list(z.shape)}")
    require(constant.shape == a.shape[:2], f"backward gives constants of the shape {list(constant.shape)}")
    return sum(((c * z).flatten(2).sum(-1) for c, z in zip(found, zs, strict=True)), constant)


def planes_enclose_values(s: Sample, seed: int, share: float | None, width: float) -> None:
    """The planes that backward chooses are forward's, and below the values; so is the lower end of the interval."""
    op = nonlinear(s)
    boxes = random_boxes(s, seed, torch.float64, width, B)
    relaxation = op.relax(boxes, parameters(op, boxes, share, S))
    image = op.interval(boxes, ())
    for corners in (False, True):
        zs = points(boxes, seed + 1, S, corners)
        a = coefficients(op, zs, seed + 2)
        value = linear_value(relaxation, a, zs)
        forward = (a * relaxation.forward(a, zs)).flatten(2).sum(-1)
        torch.testing.assert_close(forward, value, rtol=1e-9, atol=1e-9)
        y = op.forward([z.flatten(0, 1) for z in zs], ()).unflatten(0, (B, S))
        exact = (a * y).flatten(2).sum(-1)
        where = f"seed {seed}, share {share}, width {width}"
        require(value <= exact + 1e-9 * (1 + exact.abs()), f"{s.name}: a plane does not bound the values ({where})")
        require(relaxation.constant_magnitude(a) >= 0, f"{s.name}: a magnitude is negative ({where})")
        inside = (image.lower[:, None] <= y + 1e-12) & (y - 1e-12 <= image.upper[:, None])
        require(inside, f"{s.name}: a value lies outside the interval ({where})")


def gradients_match_autograd(s: Sample, seed: int, share: float) -> None:
    """``gradients`` against autograd through relax and backward, inside the parameters' limits.

    Args:
        share: where in their range the parameters are. Planes may have a kink in the middle, where autograd gives a
            subgradient of its own; a share near it but beside it sees the same formulas.
    """
    op = nonlinear(s)
    boxes = random_boxes(s, seed, torch.float64, 2.0, B)
    given = parameters(op, boxes, share, S) or {}
    params = {k: v.clone().requires_grad_() for k, v in given.items()}
    zs = points(boxes, seed + 1, S, False)
    a = coefficients(op, zs, seed + 2)
    relaxation = op.relax(boxes, params)
    found = relaxation.gradients(a, zs)
    require(set(found) == set(params), f"{s.name}: gradients of {sorted(found)}, but parameters {sorted(params)}")
    if not params:
        return
    total = linear_value(relaxation, a, zs).sum()
    expected = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    for (name, value), grad in zip(params.items(), expected, strict=True):
        want = torch.zeros_like(value) if grad is None else grad
        # At a limit autograd of clamp gives a subgradient of its own; compare inside.
        spec = op.parameters(boxes)[name]
        inside = (value > torch.as_tensor(spec.low)) & (value < torch.as_tensor(spec.high))
        got = found[name].expand(value.shape)
        got, want = got[inside].detach(), want[inside]
        off = ~torch.isclose(got, want, rtol=1e-6, atol=1e-7)
        if bool(off.any()):
            k = int(off.nonzero()[0])
            raise AssertionError(
                f"{s.name}: the derivative of the bound by {name} is {got[k]:.9g} where autograd gives {want[k]:.9g} "
                f"(at {int(off.sum())} of {off.numel()} places; seed {seed}, {name} at {share} of its range)"
            )


def infinite_bounds_never_give_nan(s: Sample, seed: int, share: float | None) -> None:
    """Rows that ignore an unbounded entry stay finite; rows that use it get a sound plane or minus infinity."""
    op = nonlinear(s)
    boxes = random_boxes(s, seed, torch.float64, b=B)
    wild = []
    for box in boxes:
        low, up = box.lower.clone(), box.upper.clone()
        low.flatten(1)[:, 0] = -math.inf if s.domain[0] != 0.0 else low.flatten(1)[:, 0]
        up.flatten(1)[:, -1] = math.inf if s.domain[1] != 0.0 else up.flatten(1)[:, -1]
        wild.append(Interval(low, up))
    relaxation = op.relax(wild, parameters(op, wild, share, S))
    zs = points(boxes, seed + 1, S, True)
    a = coefficients(op, zs, seed + 2)
    found, constant = relaxation.backward(a)
    require(all(bool(torch.isfinite(c).all()) for c in found), f"{s.name}: unbounded inputs give infinite slopes")
    require(
        ~constant.isnan() & (constant != math.inf), f"{s.name}: unbounded inputs give a constant of NaN or infinity"
    )
    value = linear_value(relaxation, a, zs)
    y = op.forward([z.flatten(0, 1) for z in zs], ()).unflatten(0, (B, S))
    room = 1e-7 * (1 + value.abs().nan_to_num(0.0, 0.0, 0.0))
    require(value <= (a * y).flatten(2).sum(-1) + room, f"{s.name}: a plane of unbounded inputs does not bound values")
    zero = relaxation.backward(torch.zeros_like(a))
    require(zero[1] == 0, f"{s.name}: a row without coefficients has a constant")
    require(~relaxation.constant_magnitude(a).isnan(), f"{s.name}: a magnitude of unbounded inputs is NaN")
