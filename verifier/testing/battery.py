"""All checks of one op or many, as functions without arguments; deterministic for a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from verifier.core.interval import Interval
from verifier.graph.op import AffineOp, NonlinearOp, Op
from verifier.ops.bent import BentOp
from verifier.ops.curves import CurveOp
from verifier.testing import affine, nonlinear, unary
from verifier.testing.samples import Exact, Sample, extreme_box

Property = Callable[[int], None]

_TYPES = (torch.float32, torch.float64)
_SHARES = (None, 0.0, 0.3, 1.0)


@dataclass(frozen=True)
class Check:
    """One property of an op on one sample.

    Calling it raises AssertionError where the property does not hold. As text it is a name for a test.
    """

    sample: Sample
    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        self.run()

    def __str__(self) -> str:
        return f"{self.sample.name}-{self.name}"


def checks(samples: Iterable[Sample], examples: int = 6, seed: int = 0) -> list[Check]:
    """Everything that must hold of some samples.

    Args:
        examples: random inputs or boxes per property; every one comes with another size, type or slope.
    """
    out = []
    for s in samples:
        properties = [(name, each, examples) for name, each in _properties(s)]
        properties += [(name, each, 1) for name, each in _fixed_properties(s)]
        out += [Check(s, name, partial(_repeat, each, range(seed, seed + n))) for name, each, n in properties]
    return out


def check_op(
    op: Op | type[Op],
    *samples: Sample,
    exact: Exact | None = None,
    domain: tuple[float, float] | None = None,
    examples: int = 20,
    seed: int = 0,
) -> None:
    """Try everything that must hold of an op; silent when it does.

    Args:
        op: what the samples are of; a class that needs no arguments stands for its only instance.
        samples: default, for an op without weights: one input of the shape (2, 3).
        exact, domain: see :class:`Sample`; for samples that have none.

    Raises:
        AssertionError: naming the property that does not hold, and where.
    """
    if not samples:
        op = _instance(op) if isinstance(op, type) else op
        if op.handles:
            raise TypeError(f"{op.kind} has weights: it needs samples, which verifier.testing.sample makes")
        samples = (Sample(op.kind, op, ((2, 3),)),)
    for s in samples:
        if not (isinstance(s.op, op) if isinstance(op, type) else s.op == op):
            raise TypeError(f"sample {s.name} is of {s.op}, not of {op}")
        if exact is not None and s.exact is None:
            s = replace(s, exact=exact)
        if domain is not None:
            s = replace(s, domain=domain)
        for check in checks([s], examples, seed):
            check()


def _instance(kind: type[Op]) -> Op:
    try:
        return kind()
    except TypeError as error:
        raise TypeError(f"{kind.__name__} cannot be made without arguments ({error}); give an instance") from error


def _repeat(each: Property, seeds: range) -> None:
    for seed in seeds:
        each(seed)


def _properties(s: Sample) -> Iterator[tuple[str, Property]]:
    """Names and checks, which take a seed."""
    if isinstance(s.op, AffineOp):
        yield "transpose-is-vjp", lambda k: affine.transpose_is_vjp(s, k, (1, 2, 7)[k % 3])
        yield "forward-rounding", lambda k: affine.forward_rounding(s, k)
        yield "transpose-rounding", lambda k: affine.transpose_rounding(s, k)
        yield "magnitude", lambda k: affine.magnitude_bounds_terms(s, k)
        yield "interval", lambda k: affine.interval_contains(s, k, (1.0, 0.0, 1e-3, 1e4)[k % 4], _TYPES[k // 4 % 2])
        yield "unbounded", lambda k: affine.infinite_bounds_give_no_nan(s, k)
    if isinstance(s.op, NonlinearOp):
        widths = (1.0, 0.01, 4.0)
        yield "planes", lambda k: nonlinear.planes_enclose_values(s, k, _SHARES[k % 4], widths[k % 3])
        yield "gradients", lambda k: nonlinear.gradients_match_autograd(s, k, (0.45, 0.05, 0.95)[k % 3])
        yield "unbounded", lambda k: nonlinear.infinite_bounds_never_give_nan(s, k, _SHARES[k % 4])
        if s.exact is not None:
            yield from _exact_properties(s, s.op, s.exact)


def _exact_properties(s: Sample, op: NonlinearOp, exact: Exact) -> Iterator[tuple[str, Property]]:
    """Of unary ops, in exact arithmetic on extreme boxes."""

    def box(k: int) -> Interval:
        return extreme_box(s, k, _TYPES[k % 2])

    yield "exact-interval", lambda k: unary.interval_contains_exact_values(op, exact, box(k))
    yield "exact-planes", lambda k: unary.planes_hold_exactly(op, exact, box(k), _SHARES[k // 2 % 4])


def _fixed_properties(s: Sample) -> Iterator[tuple[str, Property]]:
    """Of smooth unary ops: how exactly they are evaluated, at always the same points."""
    op, exact = s.op, s.exact
    if isinstance(op, CurveOp | BentOp):
        yield "float32-accuracy", lambda k: unary.float32_is_twice_as_exact(op, s.domain, s.device)
        if exact is not None:
            yield "float64-accuracy", lambda k: unary.float64_is_twice_as_exact(op, exact, s.domain, s.device)
