"""Unary ops in 60-digit arithmetic, and boxes that are hard for them."""

from __future__ import annotations

import math

import mpmath
import torch
from hypothesis import strategies as st
from mpmath import mp, mpf

from tests.support.device import DEVICE
from verifier.core.interval import Interval
from verifier.ops.bent import Cos, Gelu, Silu, Sin
from verifier.ops.exponential import Exp, Log, Softplus
from verifier.ops.power import Power, Sqrt, Square
from verifier.ops.reciprocal import Reciprocal
from verifier.ops.registry import our_sets
from verifier.ops.relu import Relu
from verifier.ops.sigmoid import Erf, Sigmoid, Tanh
from verifier.ops.step import Ceil, Floor, Heaviside, Round, Sign, Single
from verifier.testing.samples import DIGITS, Exact, within

mp.dps = DIGITS


def _leaky(k: float) -> Exact:
    return lambda z: z if z >= 0 else z * mpf(k)


def _single(z: mpf) -> mpf:
    """To the nearest float32, by integers."""
    if z == 0 or not mpmath.isfinite(z):
        return z
    step = mpf(2) ** max(int(mpmath.floor(mpmath.log(abs(z), 2))) - 23, -149)
    return mpmath.nint(z / step) * step


SLOPE = Relu(0.01).negative_slope  # rounded to float32

# op, exact function, domain of boxes
UNARY = [
    (Relu(), _leaky(0), (-math.inf, math.inf)),
    (Relu(0.01), _leaky(SLOPE), (-math.inf, math.inf)),
    (Relu(2.5), _leaky(2.5), (-math.inf, math.inf)),
    (Relu(-1.0), _leaky(-1), (-math.inf, math.inf)),
    (Sigmoid(), lambda z: 1 / (1 + mpmath.exp(-z)), (-math.inf, math.inf)),
    (Tanh(), mpmath.tanh, (-math.inf, math.inf)),
    (Erf(), mpmath.erf, (-math.inf, math.inf)),
    (Exp(), mpmath.exp, (-math.inf, 1e3)),
    (Log(), mpmath.log, (0.0, math.inf)),
    (Softplus(), lambda z: mpmath.log1p(mpmath.exp(z)), (-math.inf, math.inf)),
    (Square(), lambda z: z * z, (-math.inf, math.inf)),
    (Power(3), lambda z: z**3, (-math.inf, math.inf)),
    (Power(4), lambda z: z**4, (-math.inf, math.inf)),
    (Power(1.5), lambda z: z ** mpf(1.5), (0.0, math.inf)),
    (Power(0.3), lambda z: z ** mpf(0.3), (0.0, math.inf)),
    (Power(-2.5), lambda z: z ** mpf(-2.5), (0.0, math.inf)),
    (Sqrt(), mpmath.sqrt, (0.0, math.inf)),
    (Reciprocal(), lambda z: 1 / z, (0.0, math.inf)),
    (Reciprocal(), lambda z: 1 / z, (-math.inf, 0.0)),
    (Sin(), mpmath.sin, (-math.inf, math.inf)),
    (Cos(), mpmath.cos, (-math.inf, math.inf)),
    (Gelu(), lambda z: z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2, (-math.inf, math.inf)),
    (Silu(), lambda z: z / (1 + mpmath.exp(-z)), (-math.inf, math.inf)),
    (Sign(), mpmath.sign, (-math.inf, math.inf)),
    (Heaviside(0.5), lambda z: mpf(0.5) if z == 0 else mpf(1) if z > 0 else mpf(0), (-math.inf, math.inf)),
    (Floor(), mpmath.floor, (-math.inf, math.inf)),
    (Ceil(), mpmath.ceil, (-math.inf, math.inf)),
    (Round(), mpmath.nint, (-math.inf, math.inf)),
    (Single(), _single, (-math.inf, math.inf)),
]
# Samples of the sets in verifier/contrib; those that have an exact function are tested like the ops above.
ADDED = [sample for found in our_sets() for sample in found.samples]
UNARY += [(s.op, s.exact, s.domain) for s in ADDED if s.exact is not None]


@st.composite
def boxes(draw: st.DrawFn, domain: tuple[float, float], dtype: torch.dtype, n: int = 8) -> Interval:
    """(1, n) intervals: tiny, huge, degenerate, touching and crossing zero, one-sided infinite."""
    lows, ups = [], []
    for _ in range(n):
        kind = draw(st.sampled_from(["wide", "tiny", "point", "kink", "huge", "sides", "infinite"]))
        centre = draw(st.floats(-8, 8) | st.floats(-1e-3, 1e-3) | st.floats(-200, 200))
        width = draw(st.floats(0, 12))
        if kind == "tiny":
            width = draw(st.floats(0, 1e-6))
        elif kind == "point":
            width = 0.0
        elif kind == "huge":
            centre, width = draw(st.floats(-1e6, 1e6)), draw(st.floats(0, 1e7))
        low, up = centre - width, centre + width
        if kind == "kink":
            low, up = draw(
                st.sampled_from([(0.0, width), (-width, 0.0), (-width, 1e-30), (-1e-30, width), (-0.0, 0.0)])
            )
        elif kind == "sides":
            low, up = -draw(st.floats(0, 1e4)), draw(st.floats(0, 1e4))
        elif kind == "infinite":
            low, up = draw(st.sampled_from([(-math.inf, centre), (centre, math.inf), (-math.inf, math.inf)]))
        low, up = within(domain, low, up)
        lows.append(low)
        ups.append(up)
    low, up = (torch.tensor(ends, dtype=dtype, device=DEVICE) for ends in (lows, ups))
    return Interval(torch.minimum(low, up)[None], torch.maximum(low, up)[None])
