"""Record of ATen calls -> Graph of the verifier's ops.

Each ATen op has one translator, registered by name in a table of its family's file (``lower_*.py``), in a set of ops
(``verifier/contrib``), or by another package for a name that none of ours has. A translator emits nodes and assigns a
node to every output that it can express. What no translator can express is collected over the whole record and reported
in one error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from verifier.core.deadline import Deadline
from verifier.core.plugins import Plugin, answerable, note
from verifier.frontend.builder import Builder
from verifier.frontend.capture import Call, Record, Ref
from verifier.frontend.lower_affine import AFFINE
from verifier.frontend.lower_nonlinear import NONLINEAR, READS_INFINITY
from verifier.frontend.lower_shape import MOVEMENT, PERMUTES, RESHAPES
from verifier.frontend.lowering import CannotLower, Lowering, MissingRules, Translator
from verifier.graph.graph import Graph
from verifier.ops.registry import OpSet, check_listed, foreign_table, op_sets, our_table
from verifier.ops.shape import Reshape


@cache
def translators() -> Mapping[str, Translator]:
    """All translators of ours by ATen name, those of our sets of ops included.

    Raises:
        ConfigError: a set has a name that is taken.
    """
    table = {**MOVEMENT, **AFFINE, **NONLINEAR}
    return table | our_table("translators", {*table, *(f"{name}_" for name in table)})


@cache
def foreign_translators() -> dict[str, tuple[Plugin, Translator]]:
    """Those of other packages, with whose they are.

    Raises:
        ConfigError: one has a name that is taken, or cannot be imported.
    """
    return check_translators(op_sets())


def check_translators(sets: Iterable[OpSet]) -> dict[str, tuple[Plugin, Translator]]:
    """The translators of sets of other packages, with whose they are.

    Raises:
        ConfigError: one has a name that is taken.
    """
    return foreign_table("translators", {*translators(), *(f"{name}_" for name in translators())}, sets)


def _foreign_rule(name: str) -> Translator | None:
    """The translator of another package, which takes part with the ops that it emits."""
    table = foreign_translators()
    found = table.get(name) or table.get(name.rstrip("_"))
    if found is None:
        return None
    plugin, rule = found

    def run(s: Lowering, call: Call) -> int | Sequence[int | None]:
        note(plugin)
        before = len(s.builder.nodes)
        with answerable(plugin, f"its translator '{name}'", (CannotLower, NotImplementedError)):
            made = rule(s, call)
        for node in s.builder.nodes[before:]:
            check_listed(plugin, node.op)
        return made

    return run


def lower(
    record: Record, input_name: str, version: str, output_name: str = "output", deadline: Deadline | None = None
) -> Graph:
    """Translate a record; the graph is not yet simplified.

    Args:
        record: what capture saw.
        input_name: name of node 0.
        output_name: of the output node, should it have no name of its own.
        version: shown in errors, e.g. ``"opset 13"``.

    Raises:
        MissingRules: all calls without a rule, with op, version, node and shape.
    """
    state = Lowering(Builder.start(record.input_shape, input_name), {0: 0}, record.values)
    table = translators()
    failed: list[str] = []
    partial: dict[int, tuple[Call, int]] = {}
    lost: set[int] = set()
    empty: set[int] = set()
    for call in _needed(record):
        if deadline is not None:
            deadline.check("translating the network")
        if all(0 in shape for shape in call.shapes):
            empty.update(call.outputs)
            continue
        call = _without_empty(call, empty)
        reads = _reads(call)
        if reads & empty:
            failed.append(_phrase(call, version, "a tensor without elements"))
            lost.update(call.outputs)
            continue
        for r in sorted(reads & partial.keys()):
            maker, k = partial.pop(r)
            failed.append(_phrase(maker, version, f"its output {k}"))
            lost.add(r)
        if reads & lost:
            lost.update(call.outputs)
            continue
        state.dtype = _computes_in(record, call)
        state.made, state.made_lowest = {}, {}
        try:
            rule = table.get(call.func) or table.get(call.func.rstrip("_")) or _foreign_rule(call.func)
            if rule is None:
                raise CannotLower("")
            _check_infinity(state, call, reads)
            made = _translated(rule, state, call)
            nodes = [made] if isinstance(made, int) else list(made)
            kept = [record.values[n] for n, node in zip(call.outputs, nodes, strict=False) if node is not None]
            _check_types(call, [record.values[a].dtype for a in reads], kept)
            _check_truth_values(record, call, any(t.dtype == torch.bool for t in kept))
            _check_shapes(state, call, nodes)
        except CannotLower as why:
            failed.append(_phrase(call, version, str(why)))
            lost.update(call.outputs)
            continue
        for k, number in enumerate(call.outputs):
            node = nodes[k] if k < len(nodes) else None
            if 0 in call.shapes[k]:
                empty.add(number)
            elif node is None:
                partial[number] = (call, k)
            else:
                state.node_of[number] = node
                if k in state.made and bool(state.made[k].any()):
                    state.minus_infinity[number] = state.made[k]
                if k in state.made_lowest and bool(state.made_lowest[k].any()):
                    state.lowest[number] = state.made_lowest[k]
                if _holds_float32(state, call, reads, record.values[number]):
                    state.widened.add(number)
                if call.settled:
                    state.builder.settle(node, call.names[k])
    if record.output in empty:
        failed.append(f"an output without elements ({version})")
    if record.output in state.minus_infinity:
        failed.append(f"an output of which some numbers are always minus infinity ({version})")
    if record.output in partial:
        maker, k = partial[record.output]
        failed.append(_phrase(maker, version, f"its output {k}"))
    if failed:
        raise MissingRules("", failed)
    return state.builder.finish(_output(state, record, output_name))


def _without_empty(call: Call, empty: set[int]) -> Call:
    """Values without elements add nothing to what they are joined with."""
    if not empty or call.func != "cat":
        return call
    kept = [a for a in call.args["tensors"] if not (isinstance(a, Ref) and a.index in empty)]
    return replace(call, args={**call.args, "tensors": kept})


def _check_infinity(state: Lowering, call: Call, reads: set[int]) -> None:
    """Minus infinity among the elements of a value is read by those translators alone that know of it."""
    if reads & state.minus_infinity.keys() and call.func not in READS_INFINITY:
        raise CannotLower("of numbers that are always minus infinity")


# Arguments that change nothing in eval mode, or whose effect is in the shapes and types that were recorded.
_WITHOUT_EFFECT = frozenset(
    ["N", "C", "HxW", "cudnn_enabled", "dtype", "half_to_float", "keepdim", "momentum", "training", "update"]
)


class _Watched(dict[str, Any]):
    """Arguments that remember which of them were read."""

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__(args)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def _translated(rule: Translator, state: Lowering, call: Call) -> int | Sequence[int | None]:
    """What the rule makes of a call; refused when the call has an argument that the rule did not look at."""
    args = _Watched(call.args)
    try:
        if rule in MOVEMENT.values():  # these run the op itself
            return rule(state, call)
        made = rule(state, replace(call, args=args))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CannotLower(" ".join(str(error).split())[:200]) from error
    for argument in call.overload._schema.arguments:
        name, value = argument.name, call.args.get(argument.name)
        default = argument.default_value if argument.has_default_value() else None
        if name not in args.read and name not in _WITHOUT_EFFECT and (value is not None and value != default):
            raise CannotLower(f"with {name} = {value}")
    return made


def _computes_in(record: Record, call: Call) -> torch.dtype:
    """float32 or float64: the type of a call's results, or for truth values the widest one that it reads."""
    made = [record.values[n].dtype for n in call.outputs]
    found = next((t for t in made if t.is_floating_point), None)
    if found is None:
        given = [record.values[a.index] if isinstance(a, Ref) else a for a in tree_flatten(call.args)[0]]
        double = any(isinstance(t, Tensor) and t.dtype == torch.float64 and t.dim() > 0 for t in given)
        double = double or any(record.values[n].dtype == torch.float64 for n in _reads(call))
        found = torch.float64 if double else torch.float32
    return found


def _holds_float32(state: Lowering, call: Call, reads: set[int], made: Tensor) -> bool:
    """Whether a float64 value is one of float32 under another type or shape: rounding it to float32 changes nothing."""
    if made.dtype != torch.float64 or call.func not in (*RESHAPES, *PERMUTES):
        return False
    return all(state.values[r].dtype in (torch.float32, torch.bool) or r in state.widened for r in reads)


def _check_types(call: Call, read: Sequence[torch.dtype], made: Sequence[Tensor]) -> None:
    """Values are real numbers here: integers wrap around, are cut off by division and have bits.

    How many of some values are true is the one whole number that may depend on the input. Numbers are rounded from
    float64 to float32 by conversions alone, whose rule knows it.
    """
    if call.func == "sum" and set(read) == {torch.bool} and made[0].dtype == torch.int64:
        return
    for t in made:
        whole = call.func in _WHOLE and not t.is_floating_point() and not t.is_complex()
        if t.dtype not in (torch.float32, torch.float64, torch.bool) and not whole:
            raise CannotLower(f"{str(t.dtype).removeprefix('torch.')} numbers that depend on the input")
    if call.func != "_to_copy" and torch.float64 in read and any(t.dtype == torch.float32 for t in made):
        raise CannotLower("float64 numbers that depend on the input, rounded to float32 on the way")


# What they make of whole numbers are such numbers, in the same range.
_WHOLE = frozenset([*MOVEMENT, "as_integers", "maximum", "minimum", "amax", "amin"])


def _check_shapes(state: Lowering, call: Call, nodes: Sequence[int | None]) -> None:
    """Every node has the shape that its value had when the network ran."""
    for shape, node in zip(call.shapes, nodes, strict=False):
        if node is not None and state.shape(node) != (shape or (1,)):
            raise CannotLower(f"translated to the shape {list(state.shape(node))}")


# They write values into a tensor that keeps its type.
_COPIES = frozenset(
    [
        *("copy", "index_put", "_index_put_impl", "scatter", "slice_scatter", "select_scatter"),
        *("diagonal_scatter", "as_strided_scatter"),
    ]
)


def _reads(call: Call) -> set[int]:
    return {a.index for a in tree_flatten(call.args)[0] if isinstance(a, Ref)}


def _check_truth_values(record: Record, call: Call, made: bool) -> None:
    """Truth values are the numbers 0 and 1 here: refuse the ops for which that reading is wrong.

    Args:
        made: the call returns truth values.
    """
    if made and call.func == "add":
        raise CannotLower("a sum of truth values")
    if made and call.func in _COPIES and any(record.values[i].dtype != torch.bool for i in _reads(call)):
        raise CannotLower("numbers written into truth values")
    if made and call.args.get("value") not in (None, False, True):
        raise CannotLower("a number written into truth values")
    if call.func.startswith(("logical_", "bitwise_")):
        for a in tree_flatten(call.args)[0]:
            t = record.values[a.index] if isinstance(a, Ref) else a
            if t.dtype != torch.bool if isinstance(t, Tensor) else type(t) in (int, float):
                raise CannotLower("logic on numbers")


def _output(state: Lowering, record: Record, name: str) -> int:
    node = state.node_of[record.output]
    if node != 0:
        return node
    return state.emit(Reshape(record.output_shape), [0], record.output_shape, name)


def _needed(record: Record) -> list[Call]:
    """The calls that the output depends on."""
    wanted = {record.output}
    out: list[Call] = []
    for call in reversed(record.calls):
        if wanted & set(call.outputs):
            out.append(call)
            wanted.update(a.index for a in tree_flatten(call.args)[0] if isinstance(a, Ref))
    return out[::-1]


def _phrase(call: Call, version: str, why: str) -> str:
    shape = list(call.shapes[0]) if call.shapes else []
    reason = f", {why}" if why else ""
    return f"{call.func} ({version}) at '{call.names[0] if call.names else call.where}', shape {shape}{reason}"
