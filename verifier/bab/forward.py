"""Linear bounds of every node in few inputs, propagated forward: the cheap bounds of a search over input boxes.

After Weng et al., *Fast-Lin*, ICML 2018.

On a box with centre c and radii r a value is written ``sum_i J_i d_i + e`` with |d_i| <= r_i and e in an interval that
collects what relaxations lose. One sweep costs k + 3 forward passes for k varying inputs, whatever the number of
neurons. With rounding, every error ends up in e: a computed J is exact by definition, and what it misses is added
where it arises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from verifier.bounds.engine import Engine
from verifier.bounds.walk import Magnitudes
from verifier.core.interval import Interval
from verifier.core.numerics import ROUNDING_SAFETY, gamma, tiny, underflow, unit_roundoff, widen
from verifier.graph.graph import Node
from verifier.graph.op import AffineOp, NonlinearOp, UnaryPlanes


@dataclass(frozen=True)
class Affine:
    """jacobian: (B, k, *shape); rest: (B, *shape)."""

    jacobian: Tensor
    rest: Interval


class Forward:
    """The sweep; nodes must be stepped in order.

    Args:
        box: whole, (B, *input_shape) in the dtype of the sweep.
        varying: (k,) flat coordinates; the others enter by their intervals.
        magnitudes: those of the interval sweep, which is one node ahead; not looked at unless the engine accounts for
            rounding errors.
    """

    def __init__(self, engine: Engine, box: Interval, varying: Tensor, magnitudes: Magnitudes) -> None:
        graph, backend = engine.graph, engine.backend
        self._graph, self._backend, self._magnitudes, self._rounding = graph, backend, magnitudes, engine.rounding
        low, up = box.lower.flatten(1), box.upper.flatten(1)
        batch, n = low.shape
        self._dtype = low.dtype
        u = unit_roundoff(self._dtype)
        some_low, some_up = low[:, varying], up[:, varying]
        centre = (some_low / 2 + some_up / 2).clamp(some_low, some_up)
        self._radius = torch.maximum(some_up - centre, centre - some_low) * (1 + 4 * u) + tiny(self._dtype)
        # Underflow costs every entry of a Jacobian up to the smallest normal number, times its coordinate's radius;
        # so much in a magnitude pays for all that a sum can lose, see ``core.numerics.underflow``.
        self._floor = underflow(self._dtype) * (2 + varying.shape[0] + self._radius.sum(1))
        jacobian = low.new_zeros(varying.shape[0], n)
        jacobian.scatter_(1, varying[:, None], 1.0)
        low, up = low.clone(), up.clone()
        low[:, varying], up[:, varying] = centre, centre
        shape = graph.whole.input_shape
        self._values: dict[int, Affine] = {
            0: Affine(
                backend.local_part(0, jacobian.expand(batch, -1, -1).reshape(batch, -1, *shape)),
                Interval(
                    backend.local_part(0, low.reshape(batch, *shape)), backend.local_part(0, up.reshape(batch, *shape))
                ),
            )
        }
        self._reach: dict[int, Tensor] = {}

    def step(self, node: Node, bounds: Mapping[int, Interval]) -> Interval:
        """Bounds of one node's value, (B, *shape).

        Args:
            bounds: valid bounds of the node and of its inputs.
        """
        if isinstance(node.op, AffineOp):
            value = self._affine(node, node.op)
        else:
            assert isinstance(node.op, NonlinearOp)
            value = self._nonlinear(node, node.op, bounds)
        self._values[node.index] = value
        reach = self._spread(node.index)
        for i in self._graph.last_read[node.index]:
            if i != self._graph.output:
                self._values.pop(i, None)
                self._reach.pop(i, None)
        return self._widen(value.rest.lower - reach, value.rest.upper + reach, reach, 4)

    def _affine(self, node: Node, op: AffineOp) -> Affine:
        values = [self._values[i] for i in node.inputs]
        shapes = self._graph.in_shapes(node)
        batch, k = values[0].jacobian.shape[:2]
        with self._backend.weights.fetch(op.handles, self._dtype) as p:
            jacobian = op.linear([v.jacobian.reshape(-1, *s) for v, s in zip(values, shapes, strict=True)], p)
            rest = op.interval([v.rest for v in values], p)
            terms = op.forward_terms(shapes, node.shape)
            if self._rounding and terms:
                sizes = [self._size(v.rest, i) for i, v in zip(node.inputs, values, strict=True)]
                sums = op.magnitude(sizes, p) * ROUNDING_SAFETY
                rest = self._widen(rest.lower, rest.upper, sums, 4 * (terms + 4), self._run_rate(node))
        return Affine(jacobian.reshape(batch, k, *node.shape), rest)

    def _nonlinear(self, node: Node, op: NonlinearOp, bounds: Mapping[int, Interval]) -> Affine:
        """f(z) = s z + e for any slope s; the planes bound e on [l, u] by its values at the two ends."""
        xs = [bounds[i] for i in node.inputs]
        planes = op.parallel(xs)
        if not isinstance(planes, UnaryPlanes) or len(xs) != 1:
            like = self._values[node.inputs[0]].jacobian
            return Affine(like.new_zeros(*like.shape[:2], *node.shape), bounds[node.index])
        value, z = self._values[node.inputs[0]], xs[0]
        ls, us = planes.lower_slope[:, 0], planes.upper_slope[:, 0]
        li, ui = planes.lower_intercept[:, 0], planes.upper_intercept[:, 0]
        chord = op.pieces is not None
        slope = us if chord else (ls + us) / 2
        low = torch.minimum((ls - slope) * z.lower, (ls - slope) * z.upper) + li
        up = torch.maximum((us - slope) * z.lower, (us - slope) * z.upper) + ui
        low = low + torch.minimum(slope * value.rest.lower, slope * value.rest.upper)
        up = up + torch.maximum(slope * value.rest.lower, slope * value.rest.upper)
        floor = self._floored(z.lower)
        moved, at_ends = self._size(value.rest, node.inputs[0]), z.magnitude() + floor
        # The smallest numbers may be lost: slopes times what they multiply.
        size = slope.abs() * moved + li.abs() + ui.abs() + (moved + at_ends) * underflow(self._dtype)
        if chord:
            # Parallel planes leave nothing at the ends; others do.
            size = size + (ls - slope).abs() * at_ends
        else:
            size = size + (ls.abs() + us.abs()) * at_ends
        rest = self._widen(low, up, size, 12)
        noise = self._magnitudes.noise.get(node.index)
        return Affine(value.jacobian * slope[:, None], rest if noise is None else widen(*rest, noise))

    def _run_rate(self, node: Node) -> float:
        """Error of a run of an affine node relative to the magnitude of its sums."""
        return self._magnitudes.rates.get(node.index, 0.0)

    def _spread(self, index: int) -> Tensor:
        """sum_i |J_i| r_i, (B, *shape): how far the linear part moves."""
        if index not in self._reach:
            jacobian = self._values[index].jacobian
            reach = torch.matmul(self._radius[:, None], jacobian.flatten(2).abs())
            self._reach[index] = reach.reshape(jacobian.shape[0], *jacobian.shape[2:])
        return self._reach[index]

    def _floored(self, like: Tensor) -> Tensor:
        """What underflow of an entry costs, (B, 1, ...), beside (B, *shape)."""
        return self._floor.reshape(-1, *[1] * (like.dim() - 1))

    def _size(self, rest: Interval, index: int) -> Tensor:
        """(B, *shape), the largest absolute value of a node, never below what underflow can have cost."""
        return rest.magnitude() + self._spread(index) + self._floored(rest.lower)

    def _widen(self, low: Tensor, up: Tensor, size: Tensor, terms: int, rate: float = 0.0) -> Interval:
        """Account for ``terms`` roundings of quantities of a size, and ``rate`` times it; NaN is no bound."""
        if not self._rounding:
            return Interval(low, up)
        terms += self._radius.shape[1] + 2
        return widen(low, up, (gamma(terms, self._dtype) + rate) * size * ROUNDING_SAFETY + self._floored(low))
