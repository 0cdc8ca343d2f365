"""What an op must say about itself. One op family is one file in ``verifier/ops``.

Shape letters: N a flat batch axis, B domains, S rows, ``shape`` the value's own shape (the network's leading batch
dimension of 1 included, if it has one). Every value tensor is (N, *shape). Coefficients of linear forms are
(B, S, *shape); affine rules see them flattened to (N, *shape) with N = B * S.

Parameters arrive as a tuple ``p`` in the order of ``Op.handles``; an op never stores tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from verifier.core import sums
from verifier.core.handles import Handle
from verifier.core.interval import Interval
from verifier.core.runtime import RunModel, rate
from verifier.graph.linear_forms import Form, Patches, Shape, windows

Params = tuple[Tensor, ...]

# Roundings that folding (in float64, batch norm into an affine op) and storing a parameter can leave: variance plus
# eps, root, quotient, product, conversion for the weight; a difference and a sum more for the bias.
FOLDED_TERMS = 8


def folded_terms(folded: int, magnitude: Handle | None) -> int:
    """Roundings behind one stored parameter, when some were folded."""
    return folded or (FOLDED_TERMS if magnitude is not None else 0)


class Split(NamedTuple):
    """How an op works on parts of its values, when every value is cut along one dim into a block per rank.

    Attributes:
        dim: dim of the output along which its blocks lie.
        op: the op that gives a block; its handles stand for the same parameters in the same order.
        cut: by handle the dim along which that parameter is cut like the output; None: every rank has all of it.
        whole: the op reads whole inputs; otherwise the blocks of the same rank.
    """

    dim: int
    op: Op
    cut: tuple[int | None, ...]
    whole: bool


class Op(ABC):
    """Base of all ops. Subclasses are frozen dataclasses; fields of type Handle are their parameters.

    Bounds and searches know ops by their traits alone. A trait is a promise, and every default promises nothing: an op
    without traits is treated correctly, but by the slowest way. ``tests/ops/test_traits.py`` tests the promises.

    Attributes:
        rounds: the op does nothing to float32 numbers and something to others: it shows in float64 alone.
        elementwise: every output element is a function of one element of each input, the one that broadcasting puts at
            its place; the inputs broadcast to the output's shape.
    """

    rounds: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False

    @property
    def handles(self) -> tuple[Handle, ...]:
        """The op's parameters in field order."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return tuple(v for v in values if isinstance(v, Handle))

    @property
    def kind(self) -> str:
        """Name shown to users."""
        return type(self).__name__

    @property
    def streamable(self) -> tuple[Handle, ...]:
        """Parameters that the op also takes as :class:`verifier.core.handles.Blocks`."""
        return ()

    def split(self, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape, ranks: int) -> Split | None:
        """How tensor parallelism can split this op; None when it cannot.

        An affine op is then evaluated whole on every rank with all of its parameters; a nonlinear one is refused. An
        elementwise op without parameters works on its blocks as it is, where those of its inputs coincide.

        Args:
            dims: by input the dim along which it is cut into ``ranks`` equal blocks. The last blocks may reach beyond
                the value; what lies there repeats its last entry and never matters.
        """
        return _split_elementwise(self, dims, in_shapes, out_shape) if self.elementwise else None

    @abstractmethod
    def forward(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        """Evaluate: inputs (N, *shape_i) to output (N, *shape)."""

    @abstractmethod
    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """Sound interval image in exact arithmetic on the given bounds; the caller adds the rounding errors of affine
        ops (see ``AffineOp``), and nonlinear ops round outward."""


def _split_elementwise(op: Op, dims: Sequence[int], in_shapes: Sequence[Shape], out_shape: Shape) -> Split | None:
    """Blocks of an op that computes every output from the inputs at the same place, broadcasting aside: they must
    coincide."""
    if not op.handles and dims and len({dim - len(shape) for dim, shape in zip(dims, in_shapes, strict=True)}) == 1:
        dim = dims[0] - len(in_shapes[0]) + len(out_shape)
        ends = {shape[d] if shape else 1 for d, shape in zip(dims, in_shapes, strict=True)}
        if ends == {out_shape[dim] if out_shape else 1}:
            return Split(dim if out_shape else 0, op, (), False)
    return None


class Crossing(NamedTuple):
    """Rows that were taken back through an affine op without becoming dense.

    Attributes:
        form: the rows on the output, as they were taken.
        parts: the rows on every input.
        constant: (B or 1, S), what the bias adds, its products summed over the rows' elements; None without a bias.
        terms: rounded operations behind one coefficient of the parts, like :meth:`AffineOp.backward_terms`.
    """

    form: Form
    parts: Sequence[Form]
    constant: Tensor | None
    terms: int


class AffineOp(Op):
    """y = sum_i W_i x_i + b. Its backward rule is the VJP of its linear part.

    Attributes:
        moves: every output element is one input element or zero, bit for bit; which one depends on no value.
        plain_sums: all results are products that are added, in any order, in float32 as well: rounding costs no more
            than ``gamma`` of their terms times what they sum in magnitude. Kernels that transform what they multiply
            (Winograd, FFT) have no such bound.
        seeks_windows: :meth:`window_backward` takes dense rows too, looks where they are not zero, and makes windows of
            them where these are small. A walk that started from single elements asks the first such op after that, and
            no other: it waits for the device.
    """

    moves: ClassVar[bool] = False
    plain_sums: ClassVar[bool] = False
    seeks_windows: ClassVar[bool] = False

    @property
    def exact_weights(self) -> bool:
        """Whether every entry of W is a stored parameter, or 0 or plus or minus a power of two that is at least 1, and
        b is a stored parameter: nothing was folded and nothing is divided. Where no product and no sum of an op with
        ``plain_sums`` rounds, its results are then those of the network, exactly."""
        return False

    def reads_all(self, mask: Tensor) -> bool:
        """Whether outputs under a mask, bool (*shape), are taken to depend on all elements of every input.

        True is never wrong. Where the op says False, :meth:`transpose` is asked on which elements they do.
        """
        return False

    def linear(self, xs: Sequence[Tensor], p: Params) -> Tensor:
        """The linear part, sum_i W_i x_i, (N, *shape). Default: forward minus forward at zero; a bias rounds there."""
        zero = [torch.zeros_like(x[:1]) for x in xs]
        return self.forward(xs, p) - self.forward(zero, p)

    def transpose(self, a: Tensor, p: Params, in_shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """W_i^T a for every input.

        Args:
            a: coefficients on the output, (N, *shape).
            in_shapes: shapes of the inputs (without N).

        Returns:
            one (N, *shape_i) tensor per input. Default: VJP of :meth:`linear`.
        """
        # torch.func.vjp would import torch's compiler when it is first called, which takes seconds.
        with torch.enable_grad():
            xs = tuple(a.new_zeros((a.shape[0], *s)).requires_grad_() for s in in_shapes)
            y = self.linear(xs, p)
            further = a.requires_grad  # the result is linear in a
            return torch.autograd.grad(y, xs, a, create_graph=further, allow_unused=True, materialize_grads=True)

    def window_backward(self, form: Form, p: Params, in_shapes: Sequence[Shape], total: torch.dtype) -> Crossing | None:
        """What :meth:`transpose` and :meth:`bias_dot` give for rows that are not dense, without making them dense.

        Args:
            form: single elements or windows of the output; dense rows only where the op ``seeks_windows``.
            total: the dtype in which the bias is summed over windows.

        Returns:
            the same linear functions of the inputs, but for rounding. None, the default, where there is no way; then
            the rows become dense.
        """
        return None

    def bias_dot(self, a: Tensor, p: Params) -> Tensor | None:
        """a . b summed over the output, (N,); None when the op has no bias. Float64 when a long sum."""
        return None

    def magnitude(self, ms: Sequence[Tensor], p: Params) -> Tensor:
        """|W| m + |b|, (N, *shape): bounds every partial sum of the op's inner products when |x_i| <= m_i.

        Every entry of W counts as larger by ``underflow``: what its conversion to another dtype, or a kernel, loses.
        For folded parameters |b| is replaced by the sum of the magnitudes that were folded into it.
        """
        raise NotImplementedError

    def spread(self, rs: Sequence[Tensor], p: Params) -> Tensor:
        """|W| r, (N, *shape): how far the output can move when input i moves by at most r_i >= 0."""
        return self.magnitude(rs, p) - self.magnitude([torch.zeros_like(r) for r in rs], p)

    def forward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        """Rounded operations behind one entry of forward (fan-in + bias); 0 when forward only moves numbers."""
        raise NotImplementedError

    def backward_terms(self, in_shapes: Sequence[Shape], out_shape: Shape) -> int:
        """Rounded operations behind one entry of transpose; 0 when it only moves numbers."""
        raise NotImplementedError

    def run_rate(self, in_shapes: Sequence[Shape], out_shape: Shape) -> float:
        """Largest error of one float32 evaluation of an entry, relative to :meth:`magnitude` on the inputs it read."""
        return rate(self.forward_terms(in_shapes, out_shape))

    def interval(self, xs: Sequence[Interval], p: Params) -> Interval:
        """Centre and radius: W c + b -+ |W| r. Exact arithmetic assumed; ``bounds.ibp`` adds the rounding error.

        What is not a number (infinite bounds) becomes no bound at all.
        """
        centre = [(x.lower + x.upper) / 2 for x in xs]
        radius = [torch.maximum(x.upper - c, c - x.lower) for x, c in zip(xs, centre, strict=True)]
        mid = self.forward(centre, p)
        rad = self.spread(radius, p)
        inf = float("inf")
        return Interval((mid - rad).nan_to_num(-inf, inf, -inf), (mid + rad).nan_to_num(inf, inf, -inf))


class Pieces(NamedTuple):
    """A continuous function of one number that is linear between some points.

    Attributes:
        points: where the slope changes, in increasing order; at least one.
        slopes: from left to right, one more than points.
        value: of the function at the first point.
    """

    points: tuple[float, ...]
    slopes: tuple[float, ...]
    value: float = 0.0

    @property
    def negative_slope(self) -> float | None:
        """k where the function is a (leaky) ReLU, max(z, 0) + k min(z, 0); None for every other function."""
        alike = self.points == (0.0,) and self.slopes[1] == 1.0 and self.value == 0.0
        return self.slopes[0] if alike else None


class Cuts(NamedTuple):
    """Where a split of an op's input makes its planes tighter.

    Attributes:
        points: that are worth a try where they lie inside the interval.
        anywhere: so is every other point; otherwise planes gain from no other one.
    """

    points: tuple[float, ...] = ()
    anywhere: bool = True


class ParamSpec(NamedTuple):
    """An optimisable relaxation parameter: initial value (B, 1, *shape), and scalar or tensor limits."""

    initial: Tensor
    low: Tensor | float
    high: Tensor | float


class Relaxation(ABC):
    """Linear planes that enclose a nonlinear op on given input intervals; valid in exact arithmetic.

    Attributes:
        one_sign: whether no term of ``backward``'s constants is positive, so that they say how large all terms are.
    """

    one_sign: ClassVar[bool] = False

    @abstractmethod
    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Lower-bound a . y by linear functions of the inputs.

        Args:
            a: (B, S, *shape) coefficients on the op's output.

        Returns:
            coefficients on each input, (B, S, *shape_i), and the constant, (B, S); float64 when a long sum.
        """

    @abstractmethod
    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        """Value (B, S, *shape) of the planes that ``backward(a)`` chose, at inputs zs[i] (B, S, *shape_i)."""

    @abstractmethod
    def constant_magnitude(self, a: Tensor) -> Tensor:
        """(B, S): sum over elements of |a| |intercept| for the chosen planes; whoever certifies adds its rounding."""

    def gradients(self, a: Tensor, zs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """d(bound)/d(parameter) with intermediate bounds fixed: a+- (dslope/dt z + dintercept/dt); same shapes as the
        parameters the relaxation was built from (which lead with B, S)."""
        return {}


class NonlinearOp(Op):
    """An op that is bounded by planes on [l, u]."""

    @property
    def pieces(self) -> Pieces | None:
        """The function, when it is piecewise linear and applied to every element of the only input; None: not known.

        The op is ``elementwise`` then, and planes on an interval without a point inside coincide with the function, so
        that only the others gain from tighter bounds. Where 0 is the only point, neurons are split there. A parameter
        ``alpha`` of :meth:`relax`, if the op has one, is the slope of the plane that the function itself leaves open:
        the lower one of a convex, the upper one of a concave function.
        """
        return None

    @property
    def splits_at_zero(self) -> bool:
        """Whether the op is linear on either side of 0, so that splits of neurons there make it linear."""
        return self.pieces is not None and self.pieces.points == (0.0,)

    @property
    def cuts(self) -> Cuts | None:
        """Where a search may split the elements of an input; None: planes on parts of the box are not known to be
        tighter.

        Splits are sound whatever is said here. Default: the points of :attr:`pieces`, anywhere for other elementwise
        ops.
        """
        if self.pieces is not None:
            return Cuts(self.pieces.points, anywhere=False)
        return Cuts() if self.elementwise else None

    def cut_gains(self, which: int, at: Tensor, xs: Sequence[Interval], a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        """Estimate of what splitting every element of an input adds to the bound of a . y on the worse side, and a
        quarter of what it adds on the other: how far the planes move at the minimiser and in the middle (BBPS, Shi et
        al., arXiv 2405.21063, with planes instead of their concretised bounds). No proof depends on it.

        Default: for elementwise ops, by relaxing both sides.

        Args:
            which: input that is split. at: (B, *shape_which), where.
            xs: boxes, (B or 1, *shape_i). a: (B, 1, *shape), coefficients. zs: (B, 1, *shape_i), a minimiser.

        Returns:
            (B, *shape_which), not negative.
        """
        whole, gains = self.relax(xs), []
        low, up = (end.expand_as(at) for end in xs[which])
        for part in (Interval(low, at), Interval(at, up)):
            ys = [part if i == which else x for i, x in enumerate(xs)]
            planes = self.relax(ys)
            inside = [torch.clamp(z, y.lower[:, None], y.upper[:, None]) for z, y in zip(zs, ys, strict=True)]
            middle = [((y.lower + y.upper) / 2)[:, None].expand_as(z) for z, y in zip(zs, ys, strict=True)]
            moves = [a * (planes.forward(a, points) - whole.forward(a, points)) for points in (inside, middle)]
            gains.append((moves[0] + moves[1]).nan_to_num(0.0, 0.0, 0.0).clamp(min=0) / 2)
        worse = torch.minimum(*gains) + torch.maximum(*gains) / 4
        shape = at.shape[1:]
        lead = (worse.shape[0], 1, *[1] * (worse.dim() - 2 - len(shape)))
        return worse.sum_to_size(*lead, *shape).reshape(at.shape)

    def parameters(self, xs: Sequence[Interval]) -> Mapping[str, ParamSpec]:
        """Optimisable parameters for inputs (B, *shape_i); empty when the relaxation has none."""
        return {}

    @abstractmethod
    def relax(self, xs: Sequence[Interval], params: Mapping[str, Tensor] | None = None) -> Relaxation:
        """Planes on the box ``xs`` (each (B, *shape_i)); ``params`` lead with (B, S or 1) and default to initial."""

    def run_error(self, model: RunModel, xs: Sequence[Interval], found: Interval) -> Tensor | float | None:
        """Largest error of one float32 evaluation at inputs in ``xs``, (B, *shape), 0.0 for none, or None, the default,
        where it is not known: then nothing is claimed about runs.

        Args:
            found: the op's interval on ``xs``.
        """
        return None

    def guide(self, z: Tensor, width: Tensor) -> Tensor | None:
        """Slopes (N, *shape) that a search for counterexamples follows at z where the derivative says too little: that
        of a step, or of a function that is flat in floating point. None, the default: the derivative is good enough.

        The op has one input and is ``elementwise``. Nothing but candidates depends on it.

        Args:
            width: (N, 1, ...), how near a step, or a bend, has to be to be worth moving for.
        """
        return None

    def parallel(self, xs: Sequence[Interval]) -> Relaxation:
        """:meth:`relax` with planes that are as parallel as they can be: a function is then a line plus an interval.

        Default: the op has no better ones than :meth:`relax` gives.
        """
        return self.relax(xs)

    def prepared(self, xs: Sequence[Interval]) -> Callable[[Mapping[str, Tensor] | None], Relaxation]:
        """:meth:`relax` on fixed boxes: what depends on the boxes alone is worked out once, for many parameters."""
        return lambda params: self.relax(xs, params)


@dataclass(frozen=True)
class UnaryPlanes(Relaxation):
    """Elementwise planes: lower_slope z + lower_intercept <= f(z) <= upper_slope z + upper_intercept.

    All four broadcast against (B, S, *shape). ``d_lower``/``d_upper`` map parameter names to (dslope, dintercept).
    """

    lower_slope: Tensor
    lower_intercept: Tensor
    upper_slope: Tensor
    upper_intercept: Tensor
    d_lower: Mapping[str, tuple[Tensor, Tensor]] | None = None
    d_upper: Mapping[str, tuple[Tensor, Tensor]] | None = None

    def backward(self, a: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        low = a > 0
        const = times_intercept(a, torch.where(low, self.lower_intercept, self.upper_intercept))
        return (a * torch.where(low, self.lower_slope, self.upper_slope),), sums.last_dim(const.flatten(2), const.dtype)

    def forward(self, a: Tensor, zs: Sequence[Tensor]) -> Tensor:
        z, low = zs[0], a > 0
        slope = torch.where(low, self.lower_slope, self.upper_slope)
        return torch.addcmul(torch.where(low, self.lower_intercept, self.upper_intercept), slope, z)

    def terms(self, a: Tensor) -> Tensor:
        """(B, S, *shape): coefficients times the intercepts of the planes that ``backward(a)`` chose."""
        return times_intercept(a, torch.where(a > 0, self.lower_intercept, self.upper_intercept))

    def constant_magnitude(self, a: Tensor) -> Tensor:
        return self.terms(a).abs().flatten(2).sum(-1)

    @property
    def shared(self) -> bool:
        """Whether all rows use the same planes."""
        parts = (self.lower_slope, self.lower_intercept, self.upper_slope, self.upper_intercept)
        return all(t.dim() < 2 or t.shape[1] == 1 for t in parts)

    def under(self, form: Patches) -> UnaryPlanes:
        """Planes that all rows share, as every row sees them through its window: (B, S, C, kh, kw)."""
        return self.mapped(lambda t: windows(t.expand(t.shape[0] if t.dim() else 1, 1, *form.shape), form))

    def mapped(self, view: Callable[[Tensor], Tensor]) -> UnaryPlanes:
        """The same planes for other elements, without parameters.

        Args:
            view: of every slope and intercept.
        """
        return UnaryPlanes(
            view(self.lower_slope), view(self.lower_intercept), view(self.upper_slope), view(self.upper_intercept)
        )

    def gradients(self, a: Tensor, zs: Sequence[Tensor]) -> Mapping[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part, deltas in ((a.clamp(min=0), self.d_lower), (a.clamp(max=0), self.d_upper)):
            for name, (slope, intercept) in (deltas or {}).items():
                term = part * torch.addcmul(intercept, slope, zs[0])
                out[name] = out[name] + term if name in out else term
        return out


def times_intercept(a: Tensor, intercept: Tensor) -> Tensor:
    """a times an intercept; where a is zero an infinite intercept (no plane) does not matter.

    A coefficient that is itself NaN stays visible in the coefficients on the input, so that nothing is proved by it.
    """
    return (a * intercept).nan_to_num(nan=0.0, posinf=float("inf"), neginf=float("-inf"))
