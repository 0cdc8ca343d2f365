"""An op: Asinh, which the ONNX standard has and the verifier has not. From now on networks may contain it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verifier.frontend.capture import Call
from verifier.frontend.converters import Attributes, Function
from verifier.frontend.lowering import Lowering
from verifier.ops.curves import Curve, CurveOp
from verifier.testing import Sample


def _slope(z: Tensor) -> Tensor:
    return 1 / torch.hypot(z, torch.ones_like(z))


def _bend(z: Tensor) -> Tensor:
    return -z * _slope(z) ** 3


ASINH = Curve(torch.asinh, _slope, _bend, inflection=0.0)


@dataclass(frozen=True)
class Asinh(CurveOp):
    """f(z) = log(z + sqrt(z^2 + 1)). It increases, and is convex up to 0 and concave from there on: all that its planes
    are made from, so they are sound if f and f' are evaluated as exactly as the curve says."""

    @property
    def curve(self) -> Curve:
        return ASINH


def translate(state: Lowering, call: Call) -> int:
    """What torch records as ``aten::asinh(self)`` becomes a node of the graph."""
    x = state.the_node(call.args["self"])
    return state.emit(Asinh(), [x], state.shape(x), call.names[0])


def convert(attributes: Attributes) -> Function:
    """The ONNX operator has no attributes and one input."""
    return torch.asinh


def exact(z: Any) -> Any:
    """In as many digits as mpmath is asked for."""
    import mpmath

    return mpmath.asinh(z)


OPS = [Asinh]
TRANSLATORS = {"asinh": translate}
CONVERTERS = {"Asinh": convert}
SAMPLES = [Sample("asinh", Asinh(), ((2, 3),), exact=exact)]
