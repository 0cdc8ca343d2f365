"""The ONNX operator Softsign. Torch's own function is a quotient of two values, whose planes are looser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verifier.core.interval import Interval
from verifier.frontend.lower_nonlinear import unary
from verifier.frontend.recorded import recorded
from verifier.graph.op import Params
from verifier.ops.curves import Curve, CurveOp
from verifier.testing import Sample


def _value(z: Tensor) -> Tensor:
    most = torch.finfo(z.dtype).max  # beyond it stands inf / inf
    z = z.clamp(-most, most)
    return z / (1 + z.abs())


def _slope(z: Tensor) -> Tensor:
    return (1 / (1 + z.abs())).square()


def _bend(z: Tensor) -> Tensor:
    return -2 * z.sign() * (1 / (1 + z.abs())) ** 3


SOFTSIGN = Curve(_value, _slope, _bend, inflection=0.0)


@dataclass(frozen=True)
class Softsign(CurveOp):
    """f(z) = z / (1 + abs z). Sound: f'' = -2 sign z / (1 + abs z)^3, f is convex up to 0, and concave from there."""

    @property
    def curve(self) -> Curve:
        return SOFTSIGN

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        low, up = super().interval(xs, p)
        return Interval(low.clamp(min=-1), up.clamp(max=1))


def _exact(z: Any) -> Any:
    return z / (1 + abs(z))


_softsign = recorded("softsign", _value)

OPS = [Softsign]
TRANSLATORS = {"softsign": unary(Softsign)}
CONVERTERS = {"Softsign": lambda attributes: _softsign}
SAMPLES = [Sample("softsign", Softsign(), ((2, 3),), exact=_exact)]
