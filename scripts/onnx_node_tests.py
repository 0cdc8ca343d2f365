#!/usr/bin/env python
"""ONNX's own node tests, as networks: how many are read, and what becomes of the others.

    python scripts/onnx_node_tests.py [--match TEXT] [--every N] [--markdown] [--verbose]

Every case of `onnx.backend.test.case.node` with an input of float32 or float64 becomes a network of one input, the
first of these, and of one output, the first; all other inputs are stored. It is read as every network is, and the graph
is evaluated, in float32 and in float64, at the input of the case. What it gives is compared with the output that ONNX
expects, and where the two differ, with onnxruntime, which decides. A case that onnxruntime itself does not run and that
gives other values than expected counts as wrong.

Printed is how many are right, wrong and refused; `--markdown` prints the page of the documentation instead. The exit
code is 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

from verifier.core.errors import InputError, UnsupportedError, VerifierError
from verifier.frontend.network import Network, load_network
from verifier.frontend.normalise import new_session
from verifier.parallel.single import Resident

# Of the largest number of the answer; float32 in another order of operations.
TOLERANCE = 1e-4
_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Case:
    """One node test as a network.

    Attributes:
        operator: of the test; that of its first node when it has several.
        model: one input, one output.
        x: the input of the test.
        expected: what ONNX expects.
    """

    name: str
    operator: str
    model: onnx.ModelProto
    x: np.ndarray
    expected: Any


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``right``, ``wrong`` or ``refused``, and why in the last two."""

    case: Case
    kind: str
    why: str = ""


def cases(match: str = "", every: int = 1) -> Iterator[Case]:
    """All cases with a real input, by name.

    Args:
        match: part of the names.
        every: of those left only the first of so many.
    """
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {c.name: c for c in collect_testcases(None)}
    tests = [found[name] for name in sorted(found) if match in name and _first_real(found[name].model) is not None]
    for test in tests[::every]:
        yield _case(test)


def _first_real(model: onnx.ModelProto) -> int | None:
    kinds = [v.type.tensor_type.elem_type if v.type.HasField("tensor_type") else 0 for v in model.graph.input]
    return next((k for k, kind in enumerate(kinds) if kind in _FLOATS), None)


def _case(test: Any) -> Case:
    model = onnx.ModelProto()
    model.CopyFrom(test.model)
    graph, kept = model.graph, _first_real(test.model)
    assert kept is not None
    values, expected = test.data_sets[0]
    own = list(graph.input)
    del graph.input[:]
    for k, (info, value) in enumerate(zip(own, values, strict=False)):
        if k == kept or not info.type.HasField("tensor_type"):
            graph.input.append(info)
        else:
            stored = value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value))
            graph.initializer.append(stored)
            graph.initializer[-1].name = info.name
    _fix_shape(graph, own[kept].name, _array(values[kept]))
    first = graph.output[0]
    del graph.output[:]
    graph.output.append(first)
    return Case(test.name, graph.node[0].op_type, model, _array(values[kept]), _array(expected[0]))


def _array(value: Any) -> Any:
    """An input or an output of a test as numpy has it; lists stay lists."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else value


def _fix_shape(graph: onnx.GraphProto, name: str, value: np.ndarray) -> None:
    """Some tests leave the shapes of inputs open; networks have fixed ones."""
    info = next(i for i in graph.input if i.name == name)
    shape = info.type.tensor_type.shape
    del shape.dim[:]
    for n in value.shape:
        shape.dim.add().dim_value = n


def outcome(case: Case, folder: Path) -> Outcome:
    """Read and evaluate a case.

    Args:
        folder: for its file.
    """
    path = folder / "case.onnx"
    path.write_bytes(case.model.SerializeToString())
    try:
        network = load_network(path)
    except (UnsupportedError, InputError) as error:
        return Outcome(case, "refused", str(error).removeprefix(f"{path}: "))
    except VerifierError as error:
        return Outcome(case, "wrong", str(error))
    found = _values(network, case.x)
    if not isinstance(case.expected, np.ndarray):
        return Outcome(case, "wrong", f"a tensor where {type(case.expected).__name__} is expected")
    if any(_agree(v, case.expected) for v in found):
        return Outcome(case, "right")
    try:
        reference = run(case)
    except Exception as error:
        return Outcome(case, "wrong", f"other values than expected, and onnxruntime: {' '.join(str(error).split())}")
    if any(_agree(v, reference) for v in found):
        return Outcome(case, "right", "as onnxruntime, not as expected")
    return Outcome(case, "wrong", "other values than expected and than onnxruntime's")


def _values(network: Network, x: np.ndarray) -> list[np.ndarray]:
    """Of the graph, in float32 and in float64; in float64 alone where the network has that type."""
    graph, store = network.graph, Resident(torch.device("cpu"), 0)
    for handle, tensor in graph.parameters.items():
        store.put(handle, tensor)
    types = [torch.float64] if x.dtype == np.float64 or graph.rounds else [torch.float32, torch.float64]
    point = torch.from_numpy(np.ascontiguousarray(x)).reshape(1, *graph.input_shape)
    with torch.no_grad():
        return [graph.forward(point.to(t), store).reshape(network.output_shape).numpy() for t in types]  # type: ignore


def _agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.shape != theirs.shape:
        return False
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
    scale = max(float(np.abs(b[finite]).max(initial=0.0)), 1e-3)
    return same and bool((np.abs(a - b)[finite] <= TOLERANCE * scale).all())


def run(case: Case) -> np.ndarray:
    """The answer of onnxruntime."""
    session = new_session(case.model.SerializeToString(), optimised=False)
    return session.run(None, {session.get_inputs()[0].name: case.x})[0]


# What differs from case to case within one reason.
_DETAILS = (
    (r" at '[^']*'", ""),
    (r"\(opset \d+\)", ""),
    (r", shape \[[^\]]*\]", ""),
    (r"/[^ ]*case\.onnx: ?", ""),
    (r"^[^ ]*: ", ""),
    (r"no rule for (.*;.*)", r"no rule for several nodes: \1"),
    (r" +(,|$)", r"\1"),
    (r"\s+", " "),
)


def reason(why: str) -> str:
    """A refusal without what differs from case to case."""
    for pattern, text in _DETAILS:
        why = re.sub(pattern, text, why)
    return why.strip()[:160]


def page(outcomes: Sequence[Outcome]) -> str:
    """docs/onnx-node-tests.md."""
    count = Counter(o.kind for o in outcomes)
    refused: dict[tuple[str, str], list[str]] = {}
    for o in outcomes:
        if o.kind == "refused":
            refused.setdefault((o.case.operator, reason(o.why)), []).append(o.case.name)
    own = [o.case.name for o in outcomes if o.kind == "right" and o.why]
    lines = [
        "# ONNX's node tests",
        "",
        "What `python scripts/onnx_node_tests.py --markdown` prints "
        f"(onnx {onnx.__version__}, opset {onnx.defs.onnx_opset_version()}).",
        "",
        "Every node test of ONNX with an input of float32 or float64 is read as a network: the first such input is",
        "the network's, all others are stored, and the first output is the network's. The graph is evaluated at the",
        "input of the test.",
        "",
        f"Of {len(outcomes)} cases {count['right']} are right, {count['wrong']} are wrong, and {count['refused']} are "
        "refused. Where the file of a test",
        f"and onnxruntime differ, which is so in {len(own)} of those that are right, onnxruntime decides.",
        "",
        "| operator | cases | why they are refused |",
        "|---|---|---|",
    ]
    for (operator, why), names in sorted(refused.items()):
        text = why.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
        lines.append(f"| `{operator}` | {len(names)} | {text} |")
    return "\n".join(lines) + "\n"


def summary(outcomes: Sequence[Outcome], verbose: bool) -> Iterable[str]:
    """Lines for a console."""
    count = Counter(o.kind for o in outcomes)
    for o in outcomes:
        if o.kind == "wrong" or (verbose and o.why):
            yield f"{o.kind} {o.case.name}: {o.why}"
    yield f"{count['right']} right, {count['wrong']} wrong, {count['refused']} refused, of {len(outcomes)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--match", default="", help="only cases with this in their name")
    parser.add_argument("--every", type=int, default=1, help="only the first of so many cases")
    parser.add_argument("--markdown", action="store_true", help="print the page of the documentation")
    parser.add_argument("--verbose", action="store_true", help="name every case that is refused")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="verifier-") as folder:
        outcomes = [outcome(case, Path(folder)) for case in cases(options.match, options.every)]
    if options.markdown:
        print(page(outcomes), end="")
    else:
        print("\n".join(summary(outcomes, options.verbose)))
    return 1 if any(o.kind == "wrong" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
