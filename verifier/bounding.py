"""Bounds of a network's outputs over boxes of inputs, from Python: one box or many at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from verifier.api import bound_network, job, load_any, round_down
from verifier.config import Config, as_config
from verifier.core.deadline import Deadline
from verifier.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike
    from torch import Tensor, nn

    from verifier.core.interval import Interval
    from verifier.frontend.network import Network
    from verifier.solver.boxes import BoundBoxes, BoxesReport

Method = Literal["ibp", "crown", "alpha-crown"]


@dataclass(frozen=True)
class LinearBounds:
    """Linear functions of the input between which rows lie on their box: ``lower_A x + lower_bias <= row(x) <=
    upper_A x + upper_bias``; on the CPU.

    Float64 where they are certified: then the inequalities hold in real arithmetic for the numbers as they stand, all
    rounding errors being in the bias. The bounds of :class:`Bounds` may be tighter than the least value of these
    functions, since what is known from intervals is in them too.

    Attributes:
        lower_A, upper_A: (N, S, *input shape without its leading 1), S rows or output elements.
        lower_bias, upper_bias: (N, S).
    """

    lower_A: Tensor
    lower_bias: Tensor
    upper_A: Tensor
    upper_bias: Tensor


@dataclass(frozen=True)
class Bounds:
    """What :func:`compute_bounds` returns: bounds that hold in real arithmetic, all rounding errors accounted for.

    Attributes:
        lower: float32, on the CPU; of the outputs in their shape, the leading dimension counting the boxes, or
            (N, S) of the S rows of ``C``.
        upper: likewise.
        intermediate: bounds of the nodes that were asked for, by name; the leading dimension counts the boxes.
        linear: linear bounds, when asked for.
    """

    lower: Tensor
    upper: Tensor
    intermediate: Mapping[str, Interval] = field(default_factory=dict)
    linear: LinearBounds | None = None


@dataclass(frozen=True)
class UncertifiedBounds:
    """Like :class:`Bounds`, but computed in plain float32: rounding errors may make them wrong by a little.

    They are of a type of their own so that they cannot be taken for a proof; nothing in this package accepts them.
    """

    lower: Tensor
    upper: Tensor
    intermediate: Mapping[str, Interval] = field(default_factory=dict)
    linear: LinearBounds | None = None


Kind = TypeVar("Kind", Bounds, UncertifiedBounds)


@overload
def compute_bounds(
    network: str | Path | nn.Module | Network,
    lower: ArrayLike | Tensor,
    upper: ArrayLike | Tensor,
    method: Method = ...,
    return_intermediate: bool | Sequence[str] = ...,
    config: Config | Mapping[str, Any] | str | Path | None = ...,
    *,
    C: ArrayLike | Tensor | None = ...,
    return_linear: bool = ...,
    certified: Literal[True] | None = ...,
    device: str | None = ...,
    timeout: float | None = ...,
    input_shape: Sequence[int] | None = ...,
) -> Bounds: ...
@overload
def compute_bounds(
    network: str | Path | nn.Module | Network,
    lower: ArrayLike | Tensor,
    upper: ArrayLike | Tensor,
    method: Method = ...,
    return_intermediate: bool | Sequence[str] = ...,
    config: Config | Mapping[str, Any] | str | Path | None = ...,
    *,
    C: ArrayLike | Tensor | None = ...,
    return_linear: bool = ...,
    certified: Literal[False],
    device: str | None = ...,
    timeout: float | None = ...,
    input_shape: Sequence[int] | None = ...,
) -> UncertifiedBounds: ...
def compute_bounds(
    network: str | Path | nn.Module | Network,
    lower: ArrayLike | Tensor,
    upper: ArrayLike | Tensor,
    method: Method = "crown",
    return_intermediate: bool | Sequence[str] = False,
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    C: ArrayLike | Tensor | None = None,
    return_linear: bool = False,
    certified: bool | None = None,
    device: str | None = None,
    timeout: float | None = None,
    input_shape: Sequence[int] | None = None,
) -> Bounds | UncertifiedBounds:
    """Lower and upper bounds of a network's outputs over one box of inputs or over many.

    Every box of a batch is bounded as it would be alone, up to the rounding of sums in another order; batches of equal
    size give equal bits for a box, whatever the other boxes are. The time grows with the number of boxes.

    Args:
        network: a torch module, a loaded network or an ONNX file.
        lower: of the boxes, (N, *shape of one sample without its leading dimension), or of one box in the shape that
            the network takes.
        upper: likewise.
        method: ``ibp``, ``crown`` or ``alpha-crown``, which takes one box after the other.
        return_intermediate: True: bounds of every pre-activation too; or the names of modules or ONNX values.
        config: settings, as for :func:`verifier.verify`.
        C: (S, n_out) or (N, S, n_out): bound these linear combinations of the flattened outputs instead.
        return_linear: the linear functions of the input that bound them, too.
        certified: False: plain float32, faster and of another type. Default: as ``numerics.certify`` says, which is on.
        device: ``cpu`` or ``cuda``; default as the settings say.
        timeout: seconds from now.
        input_shape: of one sample of a torch module, its leading dimension included; default (1, *lower.shape[1:]).

    Raises:
        InputError: a box is malformed or does not fit the network.
        UnsupportedError: the network uses something that is not handled.
        DeadlineExceeded: time ran out.
        RankFailed: one of several ranks was lost.
    """
    if method not in ("ibp", "crown", "alpha-crown"):
        raise InputError(f"method is '{method}'; it is one of ibp, crown, alpha-crown")
    if timeout is not None and not timeout > 0:
        raise InputError(f"timeout is {timeout}; give a positive number of seconds")
    deadline, settings = Deadline(timeout), as_config(config)
    if device is not None:
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device is '{device}'; it is one of auto, cpu, cuda")
        settings = settings.model_copy(update={"device": device})
    certify = settings.numerics.certify if certified is None else certified
    low, up = _box(lower, upper)
    asked = _Asked(low, up, method, certify, C, return_intermediate, return_linear)

    def load() -> Network:
        return load_any(network, tuple(input_shape) if input_shape else sample_shape(low.shape), deadline)

    with job(settings) as ranks:
        from verifier.solver.boxes import BoxesReport

        loaded = load() if ranks.rank == 0 else None
        wanted = asked.request(loaded)
        found = bound_network(ranks, lambda: _given(loaded), settings, wanted, BoxesReport, deadline)
    return asked.answer(found, Bounds) if certify else asked.answer(found, UncertifiedBounds)


def sample_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """What one sample of a batch looks like to a torch module."""
    return (1, *shape[1:]) if len(shape) > 1 else tuple(shape)


def _given(network: Network | None) -> Network:
    assert network is not None
    return network


def _box(lower: ArrayLike | Tensor, upper: ArrayLike | Tensor) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    low, up = (np.asarray(_host(end), dtype=np.float64) for end in (lower, upper))
    if low.shape != up.shape:
        raise InputError(f"lower has shape {list(low.shape)} and upper {list(up.shape)}; give one shape")
    if not low.size:
        raise InputError("there is no box; lower and upper are empty")
    if not (np.isfinite(low).all() and np.isfinite(up).all()):
        raise InputError("a bound of the box is not finite; every input needs two finite bounds")
    if not (low <= up).all():
        raise InputError(f"lower exceeds upper at {int((~(low <= up)).sum())} inputs")
    return low, up


def _host(values: Any) -> Any:
    """A tensor of any device, with or without a gradient, for numpy."""
    return values.detach().cpu() if hasattr(values, "detach") else values


@dataclass
class _Asked:
    """What a caller wants, and how it is handed back."""

    low: np.ndarray
    up: np.ndarray
    method: Method
    certified: bool
    rows: Any
    intermediate: bool | Sequence[str]
    linear: bool

    def request(self, network: Network | None) -> BoundBoxes:
        """What all ranks compute; ranks without a network are told."""
        from verifier.solver.boxes import BoundBoxes

        if network is None:
            return BoundBoxes(self.low, self.up, self.method, self.certified)
        shape, n = network.input_shape, network.n_in
        if self.low.size != n and self.low[0].size != n:
            raise InputError(
                f"the box has {self.low[0].size if self.low.ndim > 1 else self.low.size} inputs but the network takes "
                f"{list(shape)}; lower and upper are of that shape, or N of its samples"
            )
        flat = self.low.reshape(-1, n), self.up.reshape(-1, n)
        box = round_down(flat[0]), -round_down(-flat[1])
        rows, names = self._rows(network, len(box[0])), self._names(network)
        return BoundBoxes(*box, self.method, self.certified, rows, names, self.linear)

    def _rows(self, network: Network, boxes: int) -> np.ndarray | None:
        import numpy as np

        if self.rows is None:
            return None
        rows = np.asarray(_host(self.rows), dtype=np.float64)
        if rows.ndim == 1:
            rows = rows[None]
        if rows.ndim not in (2, 3) or rows.shape[-1] != network.n_out or (rows.ndim == 3 and len(rows) != boxes):
            raise InputError(
                f"C has shape {list(rows.shape)}; give (S, {network.n_out}) or ({boxes}, S, {network.n_out})"
            )
        if not rows.size or not np.isfinite(rows).all():
            raise InputError("C is empty or has a number that is not finite")
        return rows

    def _names(self, network: Network) -> tuple[str, ...]:
        from verifier.bounds.crown import preactivations

        graph = network.graph
        if isinstance(self.intermediate, bool):
            wanted = sorted({*preactivations(graph), graph.output}) if self.intermediate else []
            return tuple(graph.nodes[i].name for i in wanted)
        known = [node.name for node in graph.nodes]
        for name in self.intermediate:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean '{near[0]}'" if near else f"; its values are {', '.join(known[:20])}"
                raise InputError(f"the network has no value '{name}'{hint} (what was merged into others has no name)")
        return tuple(self.intermediate)

    def answer(self, found: BoxesReport, kind: type[Kind]) -> Kind:
        import math

        from verifier.core.interval import Interval

        shape_in, single = found.input_shape, self.low.size == math.prod(found.input_shape)

        def shaped(values: Tensor, shape: Sequence[int]) -> Tensor:
            if single:
                return values.reshape(tuple(shape))
            return values.reshape(len(values), *(shape[1:] if shape[:1] == (1,) else shape))

        low, up = found.rows
        if self.rows is None:
            low, up = shaped(low, found.output_shape), shaped(up, found.output_shape)
        nodes = {
            name: Interval(*(shaped(end, tuple(end.shape[1:])) for end in bounds))
            for name, bounds in found.nodes.items()
        }
        linear = None
        if found.lower is not None and found.upper is not None:
            shape = shape_in[1:] if shape_in[:1] == (1,) else shape_in
            a = [f.a.reshape(*f.a.shape[:2], *shape) for f in (found.lower, found.upper)]
            linear = LinearBounds(a[0], found.lower.bias, a[1], found.upper.bias)
        return kind(low, up, nodes, linear)
