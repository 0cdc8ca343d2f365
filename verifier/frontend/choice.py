"""Choices see through monotone functions: argmax(softmax(x)) = argmax(x), in exact arithmetic.

The positions of the largest elements stay where they are when a strictly increasing function, or a softmax over the dim
of the choice, is left out. Bounds of the function would only blur the choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from verifier.frontend.capture import Call, Record, Ref

_INCREASING = frozenset(["sigmoid", "tanh"])
_ALONG = frozenset(["_softmax", "_safe_softmax", "_log_softmax"])
_VIEWS = frozenset(["view_copy", "view", "reshape", "_unsafe_view"])
_COPIES = frozenset(["_to_copy", "clone", "alias_copy", "alias", "detach", "detach_copy", "lift_fresh_copy"])


def skip_monotone(record: Record) -> Record:
    """The record with every choice moved in front of the monotone functions that it looks at."""
    if not any(c.func in ("argmax", "argmin") for c in record.calls):
        return record
    maker = {n: c for c in record.calls for n in c.outputs}
    values: list[Tensor] = list(record.values)
    calls: list[Call] = []
    for call in record.calls:
        if call.func in ("argmax", "argmin") and call.args["dim"] is not None:
            source, chain = _in_front(call, maker, values)
            for step in chain:
                values.append(values[step.outputs[0]])
                again = replace(step, outputs=(len(values) - 1,), args=_reading(step, source), settled=False)
                calls.append(again)
                source = Ref(again.outputs[0])
            call = replace(call, args={**call.args, "self": source})
        calls.append(call)
    return replace(record, calls=tuple(calls), values=tuple(values))


def _in_front(call: Call, maker: dict[int, Call], values: list[Tensor]) -> tuple[Ref, list[Call]]:
    """What stands before the monotone functions above a choice, and the moves between them and the choice."""
    start: Ref = call.args["self"]
    dim = call.args["dim"] % max(values[start.index].dim(), 1)
    here, moves = start, []
    best: tuple[Ref, list[Call]] = (start, [])
    while here.index in maker:
        step = maker[here.index]
        source = step.args.get("self")
        if not isinstance(source, Ref) or len(step.outputs) != 1:
            break
        if step.func in _INCREASING or (step.func in _ALONG and step.args["dim"] % len(step.shapes[0]) == dim):
            best = (source, list(moves))
        else:
            back = _dim_before(step, dim, values[source.index])
            if back is None:
                break
            dim = back
            moves.insert(0, step)
        here = source
    return best


def _dim_before(step: Call, dim: int, x: Tensor) -> int | None:
    """Where a dim of a move's result was before it; None when the call does more than move whole dims."""
    func, rank = step.func, x.dim()
    if func in _VIEWS:
        return dim if tuple(step.shapes[0]) == tuple(x.shape) else None
    if func in _COPIES:
        return dim if x.dtype.is_floating_point and step.args.get("dtype") in (None, x.dtype) else None
    if func.startswith("permute"):
        return step.args["dims"][dim] % rank
    if func.startswith("transpose"):
        i, j = step.args["dim0"] % rank, step.args["dim1"] % rank
        return {i: j, j: i}.get(dim, dim)
    if func.startswith("select"):
        return dim + (dim >= step.args["dim"] % rank)
    if func.startswith("unsqueeze"):
        new = step.args["dim"] % (rank + 1)
        return None if dim == new else dim - (dim > new)
    return None


def _reading(step: Call, source: Ref) -> dict[str, Any]:
    return {**step.args, "self": source}
