"""Torch module -> record of the ATen calls that depend on the input.

An eval-mode copy runs once on a concrete input. A dispatch mode sees every ATen call: calls on constants are simply
executed (so that shape arithmetic and constants fold by themselves, in the network's own dtypes: what it computes from
its stored weights counts as stored), calls on values that depend on the input are recorded. The run is functionalised,
so the record has no in-place ops and no aliasing.
"""

from __future__ import annotations

import copy
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError, UnsupportedOpError, VerifierError
from verifier.frontend.normalise import MAX_CONSTANT_BYTES

SHAPE_ONLY = frozenset(
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_empty_strided",
        "sym_size",
    ]
)
"""Ops that read only the shape of their argument: their result is a constant."""


@dataclass(frozen=True)
class Ref:
    """A value that depends on the input, by its number in the record; 0 is the input."""

    index: int


@dataclass(frozen=True)
class Call:
    """One recorded ATen call.

    Attributes:
        func: ATen name without overload, e.g. ``"addmm"``.
        overload: what to call to run it again.
        args: arguments by schema name with defaults filled in; tracked tensors are :class:`Ref`.
        outputs: numbers of the tensors it returned.
        shapes: their shapes.
        names: their names for users.
        where: where the call came from, for messages.
        settled: the names are those of the source, not made up from the module's path and the op.
    """

    func: str
    overload: Any
    args: dict[str, Any]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    where: str
    settled: bool


@dataclass(frozen=True)
class Record:
    """All calls of one run; ``output`` is the number of the network's output and ``shapes`` are by value number."""

    calls: tuple[Call, ...]
    output: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    values: tuple[Tensor, ...]


STATE_CHANGE = "changes a parameter, a buffer or the input in place; a network must not change its own state"

LEAVES_TORCH = ("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "untyped_storage", "storage")


class _Guard(TorchFunctionMode):
    """Refuses operations that take a value that depends on the input out of torch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVES_TORCH and args and isinstance(args[0], Tensor) and self._depends(args[0]):
            raise UnsupportedError(
                f"{where(self.recorder.scope.path)}: '{name}' takes a tensor that depends on the input out of torch; "
                "use torch operations"
            )
        return func(*args, **(kwargs or {}))

    def _depends(self, t: Tensor) -> bool:
        if torch._is_functional_tensor(t):  # pyright: ignore[reportPrivateImportUsage]
            torch._sync(t)  # pyright: ignore[reportPrivateImportUsage]
            t = torch._from_functional_tensor(t)  # pyright: ignore[reportPrivateImportUsage]
        return id(t) in self.recorder.numbers


class _Scope:
    """Which module is running: its name, and for ONNX nodes the names of its outputs."""

    def __init__(self) -> None:
        self.stack: list[tuple[str, tuple[str, ...] | None]] = []

    @property
    def path(self) -> str:
        return self.stack[-1][0] if self.stack else ""


class _Pending:
    """A call under construction; its names are settled when the module that made it returns."""

    def __init__(self, func: Any, args: dict[str, Any], outputs: tuple[int, ...], shapes: Any, where: str) -> None:
        self.func, self.args, self.outputs, self.shapes, self.where = func, args, outputs, shapes, where
        self.names: list[str] | None = None
        self.scope = ""


class _Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The recorder never runs under torch.compile; guarding it against that would import the compiler (2 s)."""
        return False

    def __init__(self, x: Tensor, state: Sequence[Tensor], scope: _Scope, deadline: Deadline) -> None:
        super().__init__()
        self.deadline = deadline
        self.values: list[Tensor] = [x]
        self.numbers: dict[int, int] = {id(x): 0}
        self.calls: list[_Pending] = []
        self.scope = scope
        self.owned: dict[int, Tensor] = {}
        self.stale: set[int] = set()
        self.foreign = {t.untyped_storage().data_ptr() for t in (x, *state) if t.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.deadline.check("recording the network")
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = tree_flatten((args, kwargs))[0]
        tracked = name not in SHAPE_ONLY and self._tracked(flat)
        if any(id(a) in self.stale for a in flat if isinstance(a, Tensor)):
            raise UnsupportedError(f"{self._where()}: '{name}' reads memory that was changed in place through a view")
        self._refuse(func, name, tracked, args, kwargs)
        _check_size(func, name, args, kwargs, self._where())
        recorded = self._before(func, args, kwargs) if tracked else None
        out = func(*args, **kwargs)
        produced = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if recorded is not None and produced:
            self._record(func, recorded, produced)
        elif not tracked:
            self.owned.update((id(t), t) for t in produced)
        return out

    def _before(self, func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments as they are before the call: tracked ones by number, constants that it changes copied."""
        bound = _bind(func, *tree_map(self._ref, (args, kwargs)))
        if func._schema.is_mutable:
            for argument in func._schema.arguments:
                value = bound[argument.name]
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    bound[argument.name] = value.clone()
        return bound

    def _record(self, func: Any, arguments: dict[str, Any], produced: list[Tensor]) -> None:
        numbers = []
        for t in produced:
            self.values.append(t)
            self.numbers[id(t)] = len(self.values) - 1
            numbers.append(len(self.values) - 1)
        shapes = tuple(tuple(t.shape) for t in produced)
        pending = _Pending(func, arguments, tuple(numbers), shapes, self._where())
        pending.scope = self.scope.path
        self.calls.append(pending)

    def _tracked(self, a: Any) -> bool:
        return any(isinstance(t, Tensor) and id(t) in self.numbers for t in tree_flatten(a)[0])

    def _ref(self, a: Any) -> Any:
        return Ref(self.numbers[id(a)]) if isinstance(a, Tensor) and id(a) in self.numbers else a

    def _refuse(self, func: Any, name: str, tracked: bool, args: Any, kwargs: Any) -> None:
        tags = func.tags
        if torch.Tag.nondeterministic_seeded in tags and not _harmless_random(name, func, args, kwargs):
            raise UnsupportedError(f"{self._where()}: random op '{name}'; a network must be a function of its input")
        if func._schema.is_mutable and torch.Tag.inplace_view not in tags:
            self._refuse_mutation(func, name, args, kwargs)
        if not tracked:
            return
        if torch.Tag.data_dependent_output in tags:
            raise UnsupportedError(
                f"{self._where()}: a Python value is read from a tensor that depends on the input ('{name}'); "
                "branches and shapes must not depend on input values"
            )
        bound = _bind(func, args, kwargs)
        if torch.Tag.dynamic_output_shape in tags and (name != "index" or self._tracked(bound["indices"])):
            raise UnsupportedError(f"{self._where()}: the shape of the result of '{name}' depends on input values")
        if "batch_norm" in name and bound.get("training"):
            raise UnsupportedError(
                f"{self._where()}: normalisation with statistics of the input itself ('{name}' in training mode); "
                "use running statistics"
            )

    def _refuse_mutation(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        """In-place ops below functionalisation (torch's own kernels have some) may change what was made in this run.

        The result counts as a new value; other tensors that see the same memory must not be read again.
        """
        bound = _bind(func, args, kwargs)
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for t in tree_flatten(bound[argument.name])[0]:
                if not isinstance(t, Tensor):
                    continue
                made_here = id(t) in self.owned or self.numbers.get(id(t), 0) > 0
                if not made_here or t.untyped_storage().data_ptr() in self.foreign:
                    raise UnsupportedError(f"{self._where()}: '{name}' {STATE_CHANGE}")
                if id(t) in self.owned:
                    self._keep_old(t)
                self.stale.update(id(v) for v in (*self.values, *self.owned.values()) if v is not t and _overlap(v, t))

    def _keep_old(self, t: Tensor) -> None:
        """Recorded calls that hold the memory of a constant as an argument get a copy of it before it changes."""

        def old(a: Any) -> Any:
            return a.clone() if isinstance(a, Tensor) and _overlap(a, t) else a

        for call in self.calls:
            call.args = tree_map(old, call.args)

    def _where(self) -> str:
        return where(self.scope.path)


def where(path: str) -> str:
    """The running module and the innermost source line outside torch and this package."""
    skip = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<eval_with_key>", "onnx2torch")
    for frame in reversed(traceback.extract_stack()):
        if not any(s in frame.filename for s in skip) and frame.name != "<module>":
            if Path(frame.filename).is_relative_to(Path(__file__).parents[2]) and "tests" not in frame.filename:
                continue
            if frame.filename.startswith(sys.prefix) or frame.filename.startswith(sys.base_prefix + "/lib"):
                continue
            return f"{path or 'network'} ({Path(frame.filename).name}, line {frame.lineno})"
    return path or "network"


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors see a common element of one memory."""
    if not a.numel() or not b.numel() or a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    return not _places(a).isdisjoint(_places(b))


def _places(t: Tensor) -> set[int]:
    """Positions in memory of a tensor's elements."""
    places = [int(t.storage_offset())]
    for size, stride in zip(t.shape, t.stride(), strict=True):
        places = [p + i * stride for p in places for i in range(size)]
    return set(places)


def _bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    out: dict[str, Any] = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            out[argument.name] = args[i]
        elif argument.name in kwargs:
            out[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
        else:
            out[argument.name] = None
    return out


def _harmless_random(name: str, func: Any, args: Any, kwargs: Any) -> bool:
    """Ops that could be random but are not with these arguments."""
    bound = _bind(func, args, kwargs)
    if name in {"native_dropout", "dropout"}:
        return bound.get("train") is False or bound.get("p") == 0.0
    return "attention" in name and not bound.get("dropout_p")


def _check_size(func: Any, name: str, args: Any, kwargs: Any, place: str) -> None:
    """Refuse constants of more than MAX_CONSTANT_BYTES."""
    bound = _bind(func, args, kwargs)
    size = bound.get("size")
    if name in {"repeat", "tile"}:
        base = bound["self"]
        count = base.numel() * math.prod(max(int(r), 0) for r in bound.get("repeats", bound.get("dims")) or [1])
    elif name == "constant_pad_nd":
        count = bound["self"].numel() + sum(max(int(p), 0) for p in bound["pad"])
        shape, pads = list(bound["self"].shape), list(bound["pad"])
        for k in range(len(pads) // 2):
            shape[-1 - k] += pads[2 * k] + pads[2 * k + 1]
        count = math.prod(max(s, 0) for s in shape)
    elif name in {"arange"}:
        start, end, step = (float(bound.get(k) or d) for k, d in (("start", 0), ("end", 0), ("step", 1)))
        count = int(abs(end - start) / abs(step or 1))
    elif name in {"expand", "expand_copy"} and isinstance(size, (list, tuple)):
        count = math.prod(max(int(n), 1) for n in size)
    elif isinstance(size, (list, tuple)) and all(isinstance(s, int) for s in size) and "self" not in bound:
        count = math.prod(max(s, 0) for s in size)
    else:
        return
    if count * 8 > MAX_CONSTANT_BYTES:
        raise InputError(f"{place}: '{name}' would create {count} numbers, more than this tool takes for a constant")


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention by its math backend, no fused encoder paths or recurrent layers, restored afterwards."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    onednn = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns of settings that are not touched here
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)


OutputNames = Callable[[nn.Module], "tuple[str, ...] | None"]


def capture(
    module: nn.Module,
    x: Tensor,
    output_names: OutputNames = lambda m: None,
    copied: bool = False,
    deadline: Deadline | None = None,
) -> Record:
    """Run ``module`` once on ``x`` and record what depends on it.

    Args:
        module: any module; it is not changed (an eval-mode copy runs).
        x: one sample, of the shape and type the module takes, leading batch dimension included.
        output_names: names of the values that a submodule returns, when its source has names for them (ONNX).
        deadline: checked before every call.
        copied: the module belongs to the caller, who does not need it again; no copy is made.

    Raises:
        UnsupportedError: random ops, statistics of the input, changes of state, shapes or branches that depend on input
            values, more than one output tensor, an output that does not depend on the input.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedError("a TorchScript module hides its submodules; pass the original torch.nn.Module")
    if not x.dim():
        raise UnsupportedError("the input is a single number with no dim; give it one, e.g. [1]")
    net = (module if copied else copy.deepcopy(module)).eval().requires_grad_(False).cpu()
    x = x.detach().cpu().clone()
    scope = _Scope()
    recorder = _Recorder(x, [*net.parameters(), *net.buffers()], scope, deadline or Deadline())
    handles = [h for path, m in net.named_modules() for h in _hooks(path, m, scope, recorder, output_names(m))]
    state = {k: (t, t._version) for k, t in net.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    try:
        with torch.no_grad(), _plain_kernels(), recorder, _Guard(recorder):
            out = torch.func.functionalize(lambda v: _one_output(net(v)), remove="mutations_and_views")(x)
    except (VerifierError, MemoryError):
        raise
    except Exception as error:
        raise _explain(error, scope) from error
    finally:
        for handle in handles:
            handle.remove()
    for k, (t, version) in state.items():
        if t._version != version:
            raise UnsupportedError(f"running the network changes its buffer '{k}'; a network must not change its state")
    if id(out) not in recorder.numbers:
        raise UnsupportedError("the output of the network does not depend on its input; check the exported network")
    return Record(
        _finish(recorder.calls),
        recorder.numbers[id(out)],
        tuple(x.shape),
        tuple(out.shape),
        tuple(recorder.values),
    )


def _explain(error: Exception, scope: _Scope) -> VerifierError:
    text = " ".join(str(error).split())
    if isinstance(error, NotImplementedError):
        return UnsupportedOpError(f"{scope.path or 'network'}: {text[:200]} is not supported")
    if "mutating a non-functional tensor" in text:
        return UnsupportedError(f"{where(scope.path)}: the network {STATE_CHANGE}")
    return InputError(f"{scope.path or 'network'}: the network does not run ({type(error).__name__}: {text[:200]})")


def _one_output(out: Any) -> Tensor:
    found = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
    if len(found) != 1:
        raise UnsupportedError(f"the network must return exactly one tensor, it returns {len(found)}")
    return found[0]


def _hooks(
    path: str, module: nn.Module, scope: _Scope, recorder: _Recorder, outputs: tuple[str, ...] | None
) -> list[Any]:
    label = outputs[0] if outputs else path
    marks: list[int] = []

    def enter(m: nn.Module, args: Any) -> None:
        scope.stack.append((label, outputs))
        marks.append(len(recorder.calls))

    def leave(m: nn.Module, args: Any, out: Any) -> None:
        scope.stack.pop()
        made = recorder.calls[marks.pop() :]
        if not made or not label:
            return
        last = made[-1]
        if outputs and len(last.outputs) == len(outputs):
            last.names = list(outputs)
        elif last.names is None or outputs:
            last.names = [label, *(f"{label}.{i}" for i in range(1, len(last.outputs)))]

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def _finish(calls: Sequence[_Pending]) -> tuple[Call, ...]:
    """Unnamed calls get ``<module>/<func>``; every name is unique."""
    taken: dict[str, int] = {}

    def unique(name: str) -> str:
        taken[name] = taken.get(name, 0) + 1
        return name if taken[name] == 1 else f"{name}#{taken[name]}"

    fixed = {n for c in calls for n in c.names or ()}
    out = []
    for c in calls:
        func = c.func.overloadpacket.__name__
        names = c.names or [f"{c.scope or 'network'}/{func}"] * len(c.outputs)
        if c.names is None:
            taken.update((n, taken.get(n, 1)) for n in names if n in fixed)
        unique_names = tuple(unique(n) for n in names)
        out.append(Call(func, c.func, c.args, c.outputs, c.shapes, unique_names, c.where, c.names is not None))
    return tuple(out)
