"""Pairs of ReLUs that add up to a line: relu(z) - relu(-z) = z.

Inside a layer, the rows (w, b) and -k (w, b) of one Linear op, k > 0, are such a pair when the columns c and c' of the
next one satisfy c + k c' = 0: together they contribute c (w.x + b). Among the terms of a sum, a relu(z) and
-a relu(-z) are one. Neither needs a relaxation, and no search has to split them.

Rows and columns are compared exactly: a factor counts only where its products with all numbers are exact. Rows that are
positive multiples of one another are merged by :func:`merge_parallel`.

A run in float32 evaluates both ReLUs of a pair, and their inputs round differently. What that costs is added to the
error of a run of the op that replaces them (``Linear.run``, see docs/numerics.md). The larger row stays, so that what
leaves float32's range in a run is still seen; pairs whose numbers come near the end of that range stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verifier.core.runtime import LARGEST
from verifier.frontend.passes.affine import fold_affine
from verifier.frontend.passes.rewriter import Rewriter, rewrite
from verifier.graph.graph import Graph, Node
from verifier.graph.op import folded_terms
from verifier.ops.add import Add
from verifier.ops.linear import Linear
from verifier.ops.relu import Relu
from verifier.ops.scale import ScaleShift

# What a run may round besides the terms of an op (``core/runtime.py``), for every op that is replaced.
_FUSED = 8
# Numbers below this are not multiplied: their products might not be exact.
_SMALLEST = 1e-290
# Larger factors would make more of what a run loses at the lower end of its range than the error of an affine op allows
# for whatever its numbers (``core/runtime.py``: 2^-89 each, of 2^-81).
_LARGEST_FACTOR = 256.0
_SAMPLED = 16  # columns of large matrices that are looked at first


def cancel_pairs(graph: Graph) -> Graph:
    """Pairs of ReLUs between two Linear ops, and among the terms of a sum, become lines."""
    found = False

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        nonlocal found
        made = None
        if isinstance(node.op, Linear):
            layers = _layers(r, node, inputs)
            made = None if layers is None else _cancel_in_layer(r, node, layers)
        elif isinstance(node.op, Add):
            made = _cancel_in_sum(r, node, node.op, inputs)
        found = found or made is not None
        return made

    out = rewrite(graph, visit)
    return fold_affine(out) if found else graph


def merge_parallel(graph: Graph) -> Graph:
    """relu(k z) = k relu(z) for k > 0: rows of a Linear op that are positive multiples of one another become one.

    Merged neurons stand for the network in real arithmetic alone: in a run each of them has rounding errors of its own.
    So this is for networks of whose runs nothing is claimed.
    """

    def visit(r: Rewriter, node: Node, inputs: tuple[int, ...]) -> int | None:
        layers = _layers(r, node, inputs) if isinstance(node.op, Linear) else None
        if layers is None or not (layers.inner.exact_weights and layers.outer.exact_weights):
            return None
        return _merge_in_layer(r, node, layers)

    return rewrite(graph, visit)


# -- inside a layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layers:
    """Two Linear ops with a ReLU between them, which nobody else reads.

    Attributes:
        first, middle: the nodes of the first op and of the ReLU.
        inner, outer: the ops.
        rows: (n, inputs + 1) weights and bias of every neuron; columns: (outputs, n) what it is multiplied with.
    """

    first: Node
    middle: Node
    inner: Linear
    outer: Linear
    rows: Tensor
    columns: Tensor


def _layers(r: Rewriter, node: Node, inputs: Sequence[int]) -> _Layers | None:
    """The layers that end at a node; None where it is not the end of some, or a parameter is not finite."""
    middle = r.nodes[inputs[0]]
    if not isinstance(node.op, Linear) or not _is_relu(middle) or not r.only_reader(node):
        return None
    first = r.nodes[middle.inputs[0]]
    if not isinstance(first.op, Linear) or not _may_repeat(r.parameters[first.op.weight]):
        return None
    weight, columns = r.value(first.op.weight), r.value(node.op.weight)
    bias = weight.new_zeros(len(weight)) if first.op.bias is None else r.value(first.op.bias)
    rows = torch.cat([weight, bias[:, None]], 1)
    if not bool(torch.isfinite(rows).all() and torch.isfinite(columns).all()):
        return None
    return _Layers(first, middle, first.op, node.op, rows, columns)


def _may_repeat(weight: Tensor) -> bool:
    """Whether some rows look like multiples of one another where a few of their columns are; no copy is made of all."""
    if not weight.numel():
        return False
    pivot = weight.abs().argmax(1)
    size = weight.gather(1, pivot[:, None]).double()
    few = weight[:, :: -(-weight.shape[1] // _SAMPLED)].double()
    known = torch.cat([pivot[:, None].double(), few / size + 0.0], 1)[size[:, 0] != 0].numpy()
    return len({row.tobytes() for row in known}) < len(known)


def _is_relu(node: Node) -> bool:
    return isinstance(node.op, Relu) and node.op.negative_slope == 0.0


def _directions(rows: Tensor) -> Iterator[list[int]]:
    """Neurons whose rows may be multiples of one another, in either direction; constant ones are left out."""
    weights = rows[:, :-1].abs()
    if not weights.numel():
        return
    pivot = weights.argmax(1)  # the first of the largest: the same one for all multiples
    size = rows.gather(1, pivot[:, None])
    groups: dict[bytes, list[int]] = {}
    lines = (rows / size + 0.0).numpy()  # equal rows have equal bytes: no -0.0
    for i in (size[:, 0] != 0).nonzero()[:, 0].tolist():
        groups.setdefault(lines[i].tobytes(), []).append(i)
    yield from (group for group in groups.values() if len(group) > 1)


def _times(factor: float, values: Tensor) -> Tensor | None:
    """The products, where all are exact in float64: by a power of two, or of float32 numbers alone."""
    shift = torch.frexp(torch.tensor(abs(factor), dtype=torch.float64)).mantissa == 0.5
    single = torch.tensor(factor, dtype=torch.float64)
    if not shift and not (_is_float32(single) and _is_float32(values)):
        return None
    found = values * factor
    small = (found.abs() < _SMALLEST) & (values != 0)
    return None if bool(small.any()) or not bool(torch.isfinite(found).all()) else found


def _is_float32(values: Tensor) -> bool:
    return bool((values.float().double() == values).all())


def _factor(layers: _Layers, i: int, j: int) -> float | None:
    """k with row j = k row i, exactly; None: there is none, or none whose products are exact."""
    p = int(layers.rows[i, :-1].abs().argmax())
    k = float(layers.rows[j, p] / layers.rows[i, p])
    scaled = _times(k, layers.rows[i])
    return k if scaled is not None and torch.equal(scaled, layers.rows[j]) else None


def _pairs(layers: _Layers) -> list[int]:
    """One neuron of every pair, the one with the larger row, and, after all of them, their partners."""
    kept: list[int] = []
    gone: list[int] = []
    for group in _directions(layers.rows):
        left = list(group)
        while left:
            i = left.pop(0)
            partner = next((j for j in left if _opposite(layers, i, j) or _opposite(layers, j, i)), None)
            if partner is not None:
                left.remove(partner)
                small, large = sorted((i, partner), key=lambda n: float(layers.rows[n, :-1].abs().max()))
                kept.append(large)
                gone.append(small)
    return kept + gone


def _opposite(layers: _Layers, i: int, j: int) -> bool:
    """Whether row j is k row i with k < 0, and the columns cancel. What goes is looked at by nobody later: its numbers
    must be as far from the end of float32's range as those of all others."""
    k = _factor(layers, i, j)
    if k is None or not 1 / _LARGEST_FACTOR <= -k <= _LARGEST_FACTOR:
        return False
    if float(layers.columns[:, [i, j]].abs().max()) > LARGEST:
        return False
    back = _times(k, layers.columns[:, j])
    return back is not None and torch.equal(back, layers.columns[:, i])


def _cancel_in_layer(r: Rewriter, node: Node, layers: _Layers) -> int | None:
    found = _pairs(layers)
    if not found:
        return None
    kept = torch.tensor(found[: len(found) // 2])
    rest = torch.ones(len(layers.rows), dtype=torch.bool)
    rest[torch.tensor(found)] = False
    alone = not bool(rest.any())
    line = _line(r, node, layers, kept, alone)
    if alone:
        return line
    keep = rest.nonzero()[:, 0]
    first = _picked(r, layers.inner, keep, f"{layers.first.name}.rest")
    outer = replace(
        layers.outer,
        weight=r.param(layers.columns[:, keep], f"{node.name}.rest"),
        run=layers.outer.run + layers.outer.weight.shape[1] - len(keep),
    )
    shape = (*layers.first.shape[:-1], len(keep))
    z = r.emit(first, layers.first.inputs, shape, layers.first.name)
    h = r.emit(layers.middle.op, [z], shape, layers.middle.name)
    y = r.emit(outer, [h], node.shape, f"{node.name}.rest")
    return r.emit(Add((1.0, 1.0)), [y, line], node.shape, node.name)


def _line(r: Rewriter, node: Node, layers: _Layers, kept: Tensor, alone: bool) -> int:
    """The sum of all pairs; with the bias of the outer op where they are all that it reads.

    Where no output reads more than one pair, it is the inner op with a factor for every row.
    """
    outer, columns, name = layers.outer, layers.columns[:, kept], f"{node.name}.line"
    terms = int((layers.columns != 0).sum(1).max()) + 1  # exact zeros add no rounding
    terms += folded_terms(outer.folded, outer.bias_magnitude) + outer.run + _FUSED
    # Either ReLU of a pair has errors of its own: those of the inner op twice, of folding and of a run.
    twice = _run_terms(layers.inner)
    folding = 2 * folded_terms(layers.inner.folded, layers.inner.bias_magnitude)
    single = bool(((columns != 0).sum(1) <= 1).all())
    if not single:
        inner = replace(_picked(r, layers.inner, kept, name), run=layers.inner.run + twice, folded=folding)
        shape = (*layers.first.shape[:-1], len(kept))
        z = r.emit(inner, layers.first.inputs, shape, f"{name}.inner")
        op = Linear(r.param(columns, name), folded=outer.folded, reach=outer.reach, run=terms)
        if alone:
            op = replace(op, bias=outer.bias, bias_magnitude=outer.bias_magnitude)
        return r.emit(op, [z], node.shape, node.name if alone else name)
    place = columns.abs().argmax(1)
    factor = columns.gather(1, place[:, None])[:, 0]
    reads = factor != 0
    inner = _picked(r, layers.inner, kept[place], name, reads)
    inner = replace(inner, run=layers.inner.run + twice + terms, folded=folding)
    factors = torch.where(reads, factor, 1.0)
    plain = bool((factors == 1).all()) and outer.exact_weights and outer.reach == 1
    scale = None if plain else r.param(factors, f"{name}.scale")
    op = ScaleShift(scale, folded=outer.folded, reach=outer.reach)
    if alone:
        op, name = replace(op, shift=outer.bias, shift_magnitude=outer.bias_magnitude), node.name
    if not op.handles:
        return r.emit(inner, layers.first.inputs, node.shape, name)
    z = r.emit(inner, layers.first.inputs, node.shape, f"{name}.inner")
    return r.emit(op, [z], node.shape, name)


def _run_terms(op: Linear) -> int:
    """What a run rounds in one entry of a Linear op."""
    return op.weight.shape[1] + 1 + folded_terms(op.folded, op.bias_magnitude) + op.run + _FUSED


def _picked(r: Rewriter, op: Linear, neurons: Tensor, name: str, reads: Tensor | None = None) -> Linear:
    """The op for some of its neurons.

    Args:
        reads: which of them count; the others are zero.
    """

    def part(values: Tensor) -> Tensor:
        found = values[neurons]
        return found if reads is None else found * reads.reshape(-1, *[1] * (found.dim() - 1))

    bias, magnitude = op.bias, op.bias_magnitude
    return replace(
        op,
        weight=r.param(part(r.value(op.weight)), f"{name}.weight"),
        bias=None if bias is None else r.param(part(r.value(bias)), f"{name}.bias"),
        bias_magnitude=None if magnitude is None else r.param(part(r.value(magnitude)), f"{name}.bias_magnitude"),
    )


def _merge_in_layer(r: Rewriter, node: Node, layers: _Layers) -> int | None:
    columns, gone = layers.columns.clone(), []
    for group in _directions(layers.rows):
        left = sorted(group, key=lambda i: float(layers.rows[i, :-1].abs().max()))  # multiples come last
        while left:
            i, left = left[0], left[1:]
            for j in list(left):
                total = _merged(layers, columns, i, j)
                if total is not None:
                    columns[:, i] = total
                    left.remove(j)
                    gone.append(j)
    if not gone:
        return None
    rest = torch.ones(len(layers.rows), dtype=torch.bool)
    rest[torch.tensor(gone)] = False
    keep = rest.nonzero()[:, 0]
    shape = (*layers.first.shape[:-1], len(keep))
    z = r.emit(_picked(r, layers.inner, keep, layers.first.name), layers.first.inputs, shape, layers.first.name)
    h = r.emit(layers.middle.op, [z], shape, layers.middle.name)
    weight = columns[:, keep]
    folded = int(not _is_float32(weight))
    outer = replace(layers.outer, weight=r.param(weight, f"{node.name}.merged"), folded=folded)
    return r.emit(outer, [h], node.shape, node.name)


def _merged(layers: _Layers, columns: Tensor, i: int, j: int) -> Tensor | None:
    """The column of neuron i when it also stands for neuron j; None where it cannot or a number would be rounded."""
    k = _factor(layers, i, j)
    part = None if k is None or k <= 0 else _times(k, columns[:, j])
    if part is None:
        return None
    own = columns[:, i]
    total = own + part
    grown = total - own
    lost = (own - (total - grown)) + (part - grown)  # exactly what the sum lacks (Knuth)
    return total if bool((lost == 0).all()) else None


# -- among the terms of a sum ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    """A term of a sum: +-factor relu(+-z), of which nothing is broadcast.

    Attributes:
        z: node; negated: whether the ReLU reads -z.
        sign: of the term in the sum and of what is between.
        factor: of a ScaleShift between the ReLU and the sum; None for one.
        op: that ScaleShift.
    """

    z: int
    negated: bool
    sign: float
    factor: Tensor | None
    op: ScaleShift | None


def _cancel_in_sum(r: Rewriter, node: Node, op: Add, inputs: Sequence[int]) -> int | None:
    """The sum without its pairs, plus their lines; a ReLU may have other readers."""
    terms: list[tuple[float, int]] = list(zip(op.signs, inputs, strict=True))
    found = False
    while pair := _pair_of(r, node, terms):
        (a, b), line = pair
        found = True
        terms = [t for i, t in enumerate(terms) if i not in (a, b)] + [line]
    if not found:
        return None
    signs, nodes = tuple(s for s, _ in terms), [i for _, i in terms]
    if signs == (1.0,) and node.index != r.graph.output:
        return nodes[0]
    return r.emit(Add(signs), nodes, node.shape, node.name)


def _pair_of(
    r: Rewriter, node: Node, terms: Sequence[tuple[float, int]]
) -> tuple[tuple[int, int], tuple[float, int]] | None:
    """Positions of two terms that are a pair, and the term that they are."""
    read = [_term(r, node, sign, i) for sign, i in terms]
    for a, first in enumerate(read):
        if first is None or first.negated:
            continue
        for b, second in enumerate(read):
            if second is not None and second.negated and second.z == first.z and _sums_up(first, second):
                z = first.z
                if first.op is not None and second.op is not None:
                    folded, reach = max(first.op.folded, second.op.folded), max(first.op.reach, second.op.reach)
                    z = r.emit(replace(first.op, folded=folded, reach=reach), [z], node.shape, f"{node.name}.line")
                return (a, b), (first.sign, z)
    return None


def _sums_up(first: _Term, second: _Term) -> bool:
    """Whether a relu(z) and b relu(-z) satisfy a = -b."""
    if first.sign != -second.sign:
        same = first.factor is not None and second.factor is not None and first.sign == second.sign
        return same and torch.equal(first.factor, -second.factor)  # type: ignore[arg-type, operator]
    if first.factor is None or second.factor is None:
        return first.factor is second.factor
    return torch.equal(first.factor, second.factor)


def _term(r: Rewriter, node: Node, sign: float, index: int) -> _Term | None:
    """A term read back to what its ReLU reads; None where it is something else."""
    outer, factor = None, None
    at = r.nodes[index]
    while not isinstance(at.op, Relu):
        if at.shape != node.shape or len(at.inputs) != 1:
            return None
        if isinstance(at.op, Add) and abs(at.op.signs[0]) == 1:
            sign *= at.op.signs[0]
        elif isinstance(at.op, ScaleShift) and outer is None and at.op.shift is None and at.op.scale is not None:
            outer, factor = at.op, r.value(at.op.scale)
        else:
            return None
        at = r.nodes[at.inputs[0]]
    if not _is_relu(at) or at.shape != node.shape:
        return None
    below = r.nodes[at.inputs[0]]
    negated = below.shape == at.shape and _negates(r, below)
    return _Term(below.inputs[0] if negated else below.index, negated, sign, factor, outer)


def _negates(r: Rewriter, node: Node) -> bool:
    """Whether a node is -x, of one value of the same shape."""
    if len(node.inputs) != 1 or r.nodes[node.inputs[0]].shape != node.shape:
        return False
    if isinstance(node.op, Add):
        return node.op.signs == (-1.0,)
    if not isinstance(node.op, ScaleShift) or node.op.scale is None or node.op.shift is not None:
        return False
    return node.op.exact_weights and bool((r.value(node.op.scale) == -1).all())
