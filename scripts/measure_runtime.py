#!/usr/bin/env python
"""Measure how far onnxruntime's float32 functions are from the exact ones, over all float32 numbers.

    python scripts/measure_runtime.py [--functions Sigmoid,Tanh,...] [--every N] [--jobs N] [--out FILE]

Every function is evaluated on all 2^32 bit patterns (numbers that are no finite input are left out), in arrays that
fill a processor's vectors, and on a share of them in arrays of 1 to 15 numbers, which are the tail of a vector. The
reference is float64, whose own error is counted in. Softmax stands for the exponential inside of it. Written is the
smallest pair (relative, absolute) of the form

    |computed - exact| <= relative |exact| + absolute

by function, with the version of onnxruntime, the instruction sets of this processor and the C library, which decide
what code runs. The table is `verifier/frontend/run_errors.json`; a run that is not in it is not covered by any claim.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from verifier.frontend.runtime import TABLE, read_table, this_run

_BLOCK = 1 << 20
# Up to here the absolute part decides: everywhere for bounded functions; else where results may be flushed to zero.
_BOUNDED = ("Sigmoid", "Tanh", "Erf", "Sin", "Cos")
_MARGIN = 1.25  # what tails that were not looked at may need more


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.erf(torch.from_numpy(x)).numpy()


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Sigmoid": _sigmoid,
    "Tanh": np.tanh,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Reciprocal": lambda x: 1.0 / x,
    "Sin": np.sin,
    "Cos": np.cos,
    "Erf": _erf,
    "Softplus": lambda x: np.logaddexp(x, 0.0),
    "Pow(3)": lambda x: x * x * x,
    "Pow(4)": lambda x: (x * x) * (x * x),
    "Softmax": lambda x: np.exp(np.where(x <= 0, x, np.nan)),
}
# Softmax stands for the exponential inside of it: rows of zero and these many numbers that are not positive, each
# result relative to that of zero. What the division by the sum costs is taken off again.
_ROW = 80
_DIVISION = 4 * 2.0**-24


class Evaluator:
    """One function in onnxruntime: as a node of its own, and fused into the product or convolution before it."""

    def __init__(self, function: str) -> None:
        from verifier.frontend.normalise import new_session

        self._row = _ROW if function == "Softmax" else 0
        self._sessions = [(new_session(_model(function, None), optimised=False), (-1,))]
        for host, kinds in _HOSTS.items():
            if function in kinds:
                session = new_session(_model(function, host), optimised=True)
                self._sessions.append((session, (-1, 1) if host == "Gemm" else (1, 1, 1, -1)))

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        if self._row:
            return [self._rows(x, self._row)]
        return [session.run(["y"], {"x": x.reshape(shape)})[0].reshape(-1) for session, shape in self._sessions]

    def _rows(self, x: np.ndarray, length: int) -> np.ndarray:
        """exp x as softmax finds it; where x is positive, what there is at zero."""
        count = -(-len(x) // length)
        rows = np.zeros((count, length + 1), np.float32)
        rows[:, 1:].flat[: len(x)] = np.minimum(x, 0)
        y = self._sessions[0][0].run(["y"], {"x": rows})[0].astype(np.float64)
        return (y[:, 1:] / y[:, :1]).reshape(-1)[: len(x)]

    def tails(self, x: np.ndarray) -> list[np.ndarray]:
        """The same in arrays of 1 to 15 numbers."""
        parts, place = [], 0
        for k in range(len(x)):
            n = 1 + k % 15
            if place >= len(x):
                break
            some = x[place : place + n]
            parts.append([self._rows(some, len(some))] if self._row else self(some))
            place += n
        return [np.concatenate(found) for found in zip(*parts, strict=True)]


# Ops that graph optimisations fuse an activation into, and activations that a claim lets them fuse.
_HOSTS = {"Gemm": ("Sigmoid", "Tanh", "Softplus"), "Conv": ("Sigmoid", "Tanh")}


def _model(function: str, host: str | None) -> bytes:
    """y = f(x), or f(1 x + 0)."""
    import onnx
    from onnx import TensorProto, helper

    kind, _, rest = function.partition("(")
    constants, nodes, value = [], [], "x"
    shape: list[object] = ["n", "m"] if kind == "Softmax" else ["n"]
    if host is not None:
        ones = [1, 1] if host == "Gemm" else [1, 1, 1, 1]
        constants = [helper.make_tensor("w", TensorProto.FLOAT, ones, [1.0])]
        constants.append(helper.make_tensor("b", TensorProto.FLOAT, [1], [0.0]))
        nodes, value = [helper.make_node(host, ["x", "w", "b"], ["z"])], "z"
        shape = ["n", 1] if host == "Gemm" else [1, 1, 1, "n"]
    names = [value]
    if rest:
        constants.append(helper.make_tensor("e", TensorProto.FLOAT, [], [float(rest[:-1])]))
        names.append("e")
    graph = helper.make_graph(
        [*nodes, helper.make_node(kind, names, ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class Worst:
    """The largest errors seen: relative where results are large, absolute where they are small."""

    def __init__(self, small: float) -> None:
        self.small, self.relative, self.absolute, self.count = small, 0.0, 0.0, 0

    def note(self, computed: np.ndarray, exact: np.ndarray) -> None:
        size = np.abs(exact)
        known = np.isfinite(exact) & (size <= 3.4028234e38)
        # A result that is no number is infinitely wrong: the function then has no entry that anything rests on.
        error = np.abs(computed.astype(np.float64) - exact).copy()
        error[~np.isfinite(computed)] = np.inf
        large = known & (size > self.small)
        small = known & ~large
        self.count += int(known.sum())
        if large.any():
            self.relative = max(self.relative, float((error[large] / size[large]).max()))
        if small.any():
            self.absolute = max(self.absolute, float(error[small].max()))


def measure(function: str, every: int, tails: int, jobs: int) -> dict[str, float | int]:
    """Errors of one function on every ``every``-th block of bit patterns."""
    blocks = range(0, (1 << 32) // _BLOCK, every)
    parts = [(function, blocks[k::jobs], tails) for k in range(jobs)]
    if jobs == 1:
        found = [_measure(*parts[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            found = pool.starmap(_measure, parts)
    body, tail = ([pair[i] for pair in found] for i in (0, 1))
    return {
        "relative": _up(max(w.relative for w in (*body, *tail)) + (_DIVISION if function == "Softmax" else 0.0)),
        "absolute": _up(max(w.absolute for w in (*body, *tail)), 2.0**-48 if function in _BOUNDED else 2.0**-126),
        "points": sum(w.count for w in body),
        "tail_points": sum(w.count for w in tail),
    }


def _measure(function: str, blocks: range, tails: int) -> tuple[Worst, Worst]:
    """Bodies and tails of vectors."""
    run, exact = Evaluator(function), EXACT[function]
    # The quotients of softmax lose digits where they are small themselves.
    worst = Worst(math.inf if function in _BOUNDED else 2.0**-100 if function == "Softmax" else 2.0**-126)
    tail = Worst(worst.small)
    rng = np.random.default_rng(blocks.start)
    with np.errstate(all="ignore"):
        for block in blocks:
            bits = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64).astype(np.uint32)
            x = bits.view(np.float32)
            x = x[np.isfinite(x)]
            if not x.size:
                continue
            reference = exact(x.astype(np.float64))
            for y in run(x):
                worst.note(y, reference)
            some = rng.integers(0, x.size, tails)
            for y in run.tails(x[some]):
                tail.note(y, reference[some])
    return worst, tail


def _up(error: float, reference: float = 2.0**-48) -> float:
    """With the margin and the reference's own error, rounded up to three digits."""
    value = error * _MARGIN + reference
    if value == 0 or not math.isfinite(value):
        return value
    digits = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / digits) * digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--functions", default=",".join(EXACT))
    parser.add_argument("--every", type=int, default=1, help="look at one block of bit patterns in so many")
    parser.add_argument("--tails", type=int, default=256, help="numbers of a block that are evaluated in tails")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, default=TABLE)
    given = parser.parse_args()
    run = this_run()
    table = [entry for entry in read_table(given.out) if entry["run"] != run]
    known = next((entry for entry in read_table(given.out) if entry["run"] == run), {"run": run, "functions": {}})
    for function in given.functions.split(","):
        began = time.monotonic()
        found = measure(function, given.every, given.tails, given.jobs)
        known["functions"][function] = found
        print(f"{function:12} {json.dumps(found)}  {time.monotonic() - began:.0f} s", flush=True)
        temporary = given.out.with_suffix(".new")
        temporary.write_text(json.dumps([*table, known], indent=1) + "\n")
        os.replace(temporary, given.out)


if __name__ == "__main__":
    main()
