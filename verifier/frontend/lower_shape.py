"""Translators of ATen ops that only move data: views, slices, indexing, padding, concatenation, selection by constants.

They need no knowledge of the op: the op itself is run on the positions of the elements instead of their values, which
gives an index map; constants that it mixes in are found by running it with zeros in place of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from verifier.frontend.capture import Call, Ref
from verifier.frontend.lowering import CannotLower, Lowering, Translator, finite
from verifier.graph.op import Shape
from verifier.ops.scale import ScaleShift
from verifier.ops.shape import Concat, Gather, Permute, Reshape, inverse_index
from verifier.ops.step import Single

RESHAPES = [
    "view",
    "view_copy",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "_reshape_alias_copy",
    "_reshape_copy",
    "squeeze_copy",
    "unsqueeze_copy",
    "squeeze",
    "unsqueeze",
    "alias",
    "alias_copy",
    "clone",
    "detach",
    "detach_copy",
    "lift_fresh",
    "lift_fresh_copy",
    "_to_copy",
    "squeeze_",
    "unsqueeze_",
    "contiguous",
]
PERMUTES = ["permute", "permute_copy", "t", "t_copy", "transpose", "transpose_copy"]
MOVES = [
    "expand_copy",
    "expand",
    "slice_copy",
    "slice",
    "select_copy",
    "select",
    "split_copy",
    "split",
    "split_with_sizes_copy",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
    "unbind_copy",
    "unbind",
    "diagonal_copy",
    "as_strided_copy",
    "unfold_copy",
    "index",
    "index_select",
    "gather",
    "flip",
    "roll",
    "repeat",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "cat",
    "stack",
    "slice_scatter",
    "select_scatter",
    "diagonal_scatter",
    "as_strided_scatter",
    "index_put",
    "scatter",
    "copy",
    "where",
    "masked_fill",
    "tril",
    "triu",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "im2col",
    "rot90",
    "take",
    "_index_put_impl",
    "chunk",
    "narrow_copy",
]
LARGEST_INVERSE = 4


def reshape(s: Lowering, call: Call) -> int:
    x = s.the_node(next(iter(call.args.values())))
    dtype = call.args.get("dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        source = next(iter(call.args.values()))
        if not _holds(dtype, s.values[source.index].dtype):
            raise CannotLower(f"conversion to {str(dtype).removeprefix('torch.')}")
    source = next(iter(call.args.values()))
    for marks, made in ((s.minus_infinity, s.made), (s.lowest, s.made_lowest)):
        if source.index in marks and (marks is s.minus_infinity or call.func != "_to_copy"):
            made[0] = marks[source.index].reshape(call.shapes[0])
    if _narrows(s, call):
        return s.emit(Single(), [x], call.shapes[0], call.names[0])
    return reshaped(s, x, call.shapes[0], call.names[0])


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether an integer type has all numbers of another, or of truth values."""
    if narrow == torch.bool or wide == narrow:
        return True
    if narrow.is_floating_point or wide == torch.bool:
        return False
    outer, inner = torch.iinfo(wide), torch.iinfo(narrow)
    return outer.min <= inner.min and inner.max <= outer.max


def _narrows(s: Lowering, call: Call) -> bool:
    """Whether a conversion rounds numbers: from float64 to float32, unless they were float32 before."""
    source = next(iter(call.args.values()))
    assert isinstance(source, Ref)
    double = s.values[source.index].dtype == torch.float64 and source.index not in s.widened
    return call.func == "_to_copy" and double and s.dtype == torch.float32


def reshaped(s: Lowering, x: int, shape: Sequence[int], name: str) -> int:
    """The node under another shape; the node itself when nothing changes."""
    if s.shape(x) == tuple(shape):
        return x
    return s.emit(Reshape(tuple(shape)), [x], shape, name)


def permute(s: Lowering, call: Call) -> int:
    x = s.the_node(call.args["self"])
    shape = s.shape(x)
    n = len(shape)
    if call.func.startswith("permute"):
        dims = [d % n for d in call.args["dims"]]
    else:
        i, j = (call.args[k] % n for k in ("dim0", "dim1")) if call.func.startswith("transpose") else (0, n - 1)
        dims = list(range(n))
        dims[i], dims[j] = dims[j], dims[i]
    for marks, made in ((s.minus_infinity, s.made), (s.lowest, s.made_lowest)):
        if call.args["self"].index in marks:
            made[0] = marks[call.args["self"].index].permute(dims)
    return permuted(s, x, dims, call.names[0])


def permuted(s: Lowering, x: int, dims: Sequence[int], name: str) -> int:
    shape = s.shape(x)
    if list(dims) == list(range(len(shape))):
        return x
    out = tuple(shape[d] for d in dims)
    if [d for d in dims if shape[d] != 1] == [d for d in range(len(shape)) if shape[d] != 1]:
        return s.emit(Reshape(out), [x], out, name)
    return s.emit(Permute(tuple(dims)), [x], out, name)


def gathered(s: Lowering, x: int, index: Tensor, name: str) -> int:
    """Elements of a node by flat position, -1 for zero; ``index`` has the shape of the result."""
    shape = tuple(index.shape)
    flat = index.reshape(-1)
    size = math.prod(s.shape(x))
    if flat.numel() == size and torch.equal(flat, torch.arange(size)):
        return reshaped(s, x, shape, name)
    if not flat.numel():
        raise CannotLower("an empty tensor")
    return s.emit(gather_op(s, flat, shape, size, name), [x], shape, name)


def gather_op(s: Any, flat: Tensor, shape: Shape, size: int, name: str) -> Gather:
    """A Gather with its inverse map, unless that would be much larger than the values themselves."""
    index = s.param(flat.to(torch.int64), f"{name}.index")
    reads = int(torch.bincount(flat[flat >= 0], minlength=1).max()) if flat.numel() else 1
    if size * reads > LARGEST_INVERSE * max(size, flat.numel()) + 1024:
        return Gather(index, tuple(shape))
    return Gather(index, tuple(shape), s.param(inverse_index(flat, size), f"{name}.inverse"))


def move(s: Lowering, call: Call) -> int | list[int | None]:
    """Any op that copies, drops, repeats or pads elements."""
    call = replace(call, args={k: call.args[k] for k in call.args})
    sources = list(dict.fromkeys(a.index for a in tree_flatten(call.args)[0] if isinstance(a, Ref)))
    nodes = [s.node_of[i] for i in sources]
    _check_selectors(call)
    marked = any(i in s.minus_infinity or i in s.lowest for i in sources)
    if call.func == "cat" and not marked and all(isinstance(a, Ref) for a in call.args["tensors"]):
        inputs = [s.node_of[a.index] for a in call.args["tensors"]]
        if all(len(s.shape(i)) == len(call.shapes[0]) for i in inputs):
            return s.emit(Concat(call.args["dim"] % len(call.shapes[0])), inputs, call.shapes[0], call.names[0])
    start, positions = 1, {}
    for i, node in zip(sources, nodes, strict=True):
        size = math.prod(s.shape(node))
        positions[i] = torch.arange(start, start + size, dtype=torch.float64).reshape(s.captured_shape(i))
        start += size
    indices = _run(call, lambda i: positions[i].clone(), zero_constants=True)
    constants = _run(call, lambda i: torch.zeros_like(positions[i]), zero_constants=False)
    if len(nodes) == 1:
        source = nodes[0]
    else:
        flat = [reshaped(s, n, (math.prod(s.shape(n)),), f"{call.names[0]}/flat") for n in nodes]
        source = s.emit(Concat(0), flat, (start - 1,), f"{call.names[0]}/joined")
    out: list[int | None] = []
    for k, (index, fill, name) in enumerate(zip(indices, constants, call.names, strict=True)):
        if not index.numel():
            out.append(None)
            continue
        fill = _without_lowest(s, fill, k)
        mixed = bool(torch.any(fill != 0))
        moved = gathered(s, source, index.to(torch.int64) - 1, f"{name}/moved" if mixed else name)
        _move_marks(s, sources, index.to(torch.int64) - 1, k)
        if mixed:
            shift = s.param(fill, f"{name}.shift")
            moved = s.emit(ScaleShift(shift=shift), [moved], tuple(index.shape), name)
        out.append(moved)
    return out


def _without_lowest(s: Lowering, fill: Tensor, k: int) -> Tensor:
    """Constants among moved elements, as the network's arithmetic sees them; minus infinity and the lowest number are
    noted, and the first becomes zero."""
    fill = fill.to(s.dtype).to(torch.float64)
    infinite = fill == -math.inf
    lowest = fill == -torch.finfo(s.dtype).max
    if bool(infinite.any()):
        s.made[k] = infinite
        fill = torch.where(infinite, 0.0, fill)
    if bool(lowest.any()):
        s.made_lowest[k] = lowest
    return finite(fill)


def _move_marks(s: Lowering, sources: Sequence[int], index: Tensor, k: int) -> None:
    """Elements that are minus infinity or the lowest number stay so where they are moved to."""
    for marks, made in ((s.minus_infinity, s.made), (s.lowest, s.made_lowest)):
        if not any(i in marks for i in sources):
            continue
        parts = [marks.get(i, torch.zeros(s.captured_shape(i), dtype=torch.bool)).reshape(-1) for i in sources]
        flat = torch.cat([*parts, torch.zeros(1, dtype=torch.bool)])
        moved = flat[torch.where(index < 0, len(flat) - 1, index)]
        made[k] = moved | made[k] if k in made else moved


def _check_selectors(call: Call) -> None:
    for key in ("indices", "index", "condition", "mask"):
        for a in tree_flatten(call.args.get(key))[0]:
            if isinstance(a, Ref):
                raise CannotLower("indices or conditions that depend on the input")
    if call.args.get("accumulate") or call.args.get("reduce"):
        raise CannotLower("accumulation into indexed places")


def _run(call: Call, value: Any, zero_constants: bool) -> list[Tensor]:
    """The op's outputs with tracked values replaced; constants that are *data* become zero when asked."""
    selectors = {"indices", "index", "condition", "mask"}

    def swap(key: str, a: Any) -> Any:
        if isinstance(a, Ref):
            return value(a.index)
        if key in selectors:
            return a
        if isinstance(a, Tensor):  # in the type of the positions, truth values too
            return a.new_zeros(a.shape, dtype=torch.float64) if zero_constants else a.to(torch.float64)
        return 0 if zero_constants and key == "value" and isinstance(a, float | int) else a

    schema = call.overload._schema.arguments
    args = {k: tree_map(lambda a, k=k: swap(k, a), v) for k, v in call.args.items()}
    positional = [args[a.name] for a in schema if not a.kwarg_only]
    keyword = {a.name: args[a.name] for a in schema if a.kwarg_only}
    out = call.overload(*positional, **keyword)
    return [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]


MOVEMENT: dict[str, Translator] = {
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(PERMUTES, permute),
    **dict.fromkeys(MOVES, move),
}
