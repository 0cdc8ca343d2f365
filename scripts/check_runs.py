#!/usr/bin/env python
"""Try to refute claims about float32 runs: random networks, thresholds at the least value that onnxruntime reaches.

    python scripts/check_runs.py [--count 500] [--seed 0] [--timeout 10] [--first K]

For every network the least output over a box is searched on onnxruntime itself (samples, coordinate steps, single units
in the last place), with graph optimisations on and off and 1 and 4 threads. The property is asked with thresholds at
that value, 1e-7 and 1e-6 of the output's scale beyond it. A claim that covers runs is then attacked again, harder and
from other points. Exit status 1: a claim was refuted or a witness did not replay. (A network that is mostly noise is an
``error``, as onnxruntime cannot be compared with what was translated.)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import verifier
from verifier.core.errors import DeadlineExceeded
from verifier.core.result import Verdict


class Model:
    """An ONNX model under construction; one value in, one value out."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        from onnx import helper

        self.rng, self.shape, self.last = rng, shape, "X"
        self.nodes: list[object] = []
        self.stored: list[object] = []
        self._make = helper.make_node

    def constant(self, value: np.ndarray) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(value, dtype=np.float32), name))
        return name

    def add(self, kind: str, *others: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(self._make(kind, [self.last, *others], [name], **attributes))
        self.last = name
        return name

    def dense(self, width: int, size: float = 1.0) -> None:
        fan = self.shape[-1]
        weight = self.rng.normal(size=(fan, width)) * size / np.sqrt(fan)
        bias = self.rng.normal(size=width) * 0.3 * size
        if self.rng.random() < 0.5:
            self.add("Gemm", self.constant(weight), self.constant(bias))
        else:
            self.add("MatMul", self.constant(weight))
            self.add("Add", self.constant(bias))
        self.shape = (1, width)

    def conv(self, channels: int, stride: int) -> None:
        _, c, h, w = self.shape
        weight = self.rng.normal(size=(channels, c, 3, 3)) / np.sqrt(9 * c)
        bias = self.rng.normal(size=channels) * 0.2
        self.add("Conv", self.constant(weight), self.constant(bias), pads=[1, 1, 1, 1], strides=[stride, stride])
        self.shape = (1, channels, -(-h // stride), -(-w // stride))

    def norm(self) -> None:
        c = self.shape[1]
        values = self.rng.normal(size=c), self.rng.normal(size=c), self.rng.normal(size=c), self.rng.random(c) + 0.1
        self.add("BatchNormalization", *(self.constant(v) for v in values), epsilon=1e-5)

    def flatten(self) -> None:
        self.add("Flatten")
        self.shape = (1, int(np.prod(self.shape)))

    def bytes(self, inputs: tuple[int, ...]) -> bytes:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, inputs)],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, [1, 1])],
            self.stored,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()


def activation(m: Model) -> None:
    kind = m.rng.choice(["Relu", "Relu", "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "Abs"])
    if kind == "Clip":
        m.add("Clip", m.constant(np.array(-0.7)), m.constant(np.array(0.9)))
    else:
        m.add(str(kind))


def mlp(m: Model) -> None:
    for _ in range(m.rng.integers(1, 4)):
        m.dense(int(m.rng.integers(2, 24)))
        activation(m)
    m.dense(1)


def relu_mlp(m: Model) -> None:
    for _ in range(m.rng.integers(2, 6)):
        m.dense(int(m.rng.integers(4, 32)))
        m.add("Relu")
    m.dense(1)


def cancelling(m: Model) -> None:
    """Large values that cancel: what a run adds is of the size of the result."""
    # Some so large that only noise is left, more of them not large enough to be told from a wrong translation.
    large = float(10.0 ** (m.rng.uniform(0.5, 2.8) if m.rng.random() < 0.6 else m.rng.uniform(2, 8)))
    width = int(m.rng.integers(2, 10))
    m.dense(width)
    if m.rng.random() < 0.5:
        m.add("Relu")
    offset = m.constant(m.rng.normal(size=width) * large)
    m.add("Add", offset)
    if m.rng.random() < 0.5:
        m.add("Mul", m.constant(np.full(width, 3.0)))
        m.add("Sub", m.constant(np.full(width, 3.0) * large))
    m.add("Sub", offset)
    if m.rng.random() < 0.5:
        m.add("Relu")
    m.dense(1)


def residual(m: Model) -> None:
    m.dense(12)
    for _ in range(m.rng.integers(1, 4)):
        kept = m.last
        m.dense(12)
        m.add("Relu")
        m.add("Add", kept)
    m.dense(1)


def scaled(m: Model) -> None:
    """Weights of very different sizes."""
    for _ in range(m.rng.integers(1, 4)):
        m.dense(int(m.rng.integers(3, 12)), float(10.0 ** m.rng.uniform(-3, 3)))
        m.add("Relu")
    m.dense(1, float(10.0 ** m.rng.uniform(-3, 3)))


def products(m: Model) -> None:
    m.dense(8)
    left = m.last
    m.add("Sigmoid" if m.rng.random() < 0.5 else "Tanh")
    m.add("Mul", left)
    m.dense(6)
    m.add(str(m.rng.choice(["Sin", "Cos", "Relu"])))
    m.dense(1)


def attention(m: Model) -> None:
    """Softmax of scores of several sizes, and factors some of which are zero."""
    width = int(m.rng.integers(2, 10))
    m.dense(width, float(10.0 ** m.rng.uniform(-1, 1.5)))
    m.add("Softmax", axis=1)
    m.add("Mul", m.constant(m.rng.normal(size=width) * (m.rng.random(width) < 0.7)))
    m.dense(6)
    m.add("Relu")
    m.dense(1)


def convolutional(m: Model) -> None:
    for _ in range(m.rng.integers(1, 3)):
        m.conv(int(m.rng.integers(2, 5)), int(m.rng.integers(1, 3)))
        if m.rng.random() < 0.6:
            m.norm()
        m.add("Relu")
    if m.rng.random() < 0.5 and min(m.shape[2:]) > 1:
        m.add("AveragePool", kernel_shape=[2, 2], strides=[1, 1])
        m.shape = (1, m.shape[1], m.shape[2] - 1, m.shape[3] - 1)
    m.flatten()
    m.dense(1)


KINDS: dict[str, tuple[Callable[[Model], None], bool]] = {
    "mlp": (mlp, False),
    "relu": (relu_mlp, False),
    "cancelling": (cancelling, False),
    "residual": (residual, False),
    "scaled": (scaled, False),
    "products": (products, False),
    "attention": (attention, False),
    "convolutional": (convolutional, True),
}


@dataclass
class Runs:
    """The runs of one network: optimisations off and on, 1 and 4 threads; and the least value so far."""

    model: bytes
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        import onnxruntime

        self.sessions = []
        for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
            for threads in (1, 4):
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4
                options.intra_op_num_threads = threads
                options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
                self.sessions.append(onnxruntime.InferenceSession(self.model, options, ["CPUExecutionProvider"]))

    def values(self, x: np.ndarray) -> list[float]:
        """The first output of every run at one point."""
        feed = {"X": x.astype(np.float32).reshape(self.shape)}
        return [float(s.run(None, feed)[0].reshape(-1)[0]) for s in self.sessions]

    def least(self, x: np.ndarray) -> float:
        """Of all runs at one point."""
        return min(self.values(x))

    def search(
        self, low: np.ndarray, up: np.ndarray, rng: np.random.Generator, effort: int
    ) -> tuple[float, np.ndarray]:
        """The least value that is found, and where."""
        best, where = np.inf, low
        points = [low, up, low + (up - low) / 2]
        points += [np.where(rng.random(low.shape) < 0.5, low, up) for _ in range(effort)]
        points += [low + (up - low) * rng.random(low.shape) for _ in range(effort)]
        for x in points:
            x = np.clip(x.astype(np.float32), low, up)
            value = self.least(x)
            if value < best:
                best, where = value, x
        for value, x in self._descend(where, best, low, up, rng, 6 * effort):
            if value < best:
                best, where = value, x
        return best, where

    def _descend(
        self, x: np.ndarray, value: float, low: np.ndarray, up: np.ndarray, rng: np.random.Generator, steps: int
    ) -> Iterator[tuple[float, np.ndarray]]:
        for step in range(steps):
            y = x.copy()
            some = rng.random(x.shape) < (0.5 if step % 2 else 2.0 / x.size)
            kind = rng.integers(4)
            if kind == 0:
                y[some] = np.nextafter(y[some], rng.choice([np.float32(-np.inf), np.float32(np.inf)]))
            elif kind == 1:
                y[some] = np.where(rng.random(int(some.sum())) < 0.5, low[some], up[some])
            else:
                width = (up - low)[some] * 10.0 ** rng.uniform(-6, 0)
                y[some] = y[some] + width * rng.normal(size=int(some.sum()))
            y = np.clip(y, low, up).astype(np.float32)
            found = self.least(y)
            if found <= value:
                x, value = y, found
                yield value, x


def make(number: int, seed: int) -> tuple[str, bytes, tuple[int, ...], np.ndarray, np.ndarray]:
    """Kind, model, input shape and box of one case."""
    rng = np.random.default_rng([seed, number])
    kind = list(KINDS)[number % len(KINDS)]
    build, image = KINDS[kind]
    shape = (1, 1, int(rng.integers(4, 7)), int(rng.integers(4, 7))) if image else (1, int(rng.integers(1, 7)))
    m = Model(rng, shape)
    build(m)
    n = int(np.prod(shape))
    centre, radius = rng.normal(size=n), 10.0 ** rng.uniform(-3, -0.3 if n < 10 else -1.3)
    low, up = (centre - radius).astype(np.float32), (centre + radius).astype(np.float32)
    return kind, m.bytes(shape), shape, low, up


def text(low: np.ndarray, up: np.ndarray, threshold: float) -> str:
    """The property: no input of the box brings the output down to the threshold."""
    lines = [f"(declare-const X_{i} Real)" for i in range(low.size)] + ["(declare-const Y_0 Real)"]
    for i, (a, b) in enumerate(zip(low, up, strict=True)):
        lines += [f"(assert (>= X_{i} {float(a)!r}))", f"(assert (<= X_{i} {float(b)!r}))"]
    return (
        "\n".join([*lines, f"(assert (<= Y_0 {Decimal(threshold):f}))"]) + "\n"
    )  # all digits: a run may just reach it


def check(number: int, seed: int, timeout: float, counts: Counter[str], folder: Path) -> list[str]:
    """Ask about one network at three thresholds; what is wrong."""
    kind, model, shape, low, up = make(number, seed)
    runs, rng = Runs(model, shape), np.random.default_rng([seed, number, 1])
    least, _ = runs.search(low, up, rng, 100)
    if not np.isfinite(least):
        return []
    onnx, vnnlib = folder / "net.onnx", folder / "property.vnnlib"
    onnx.write_bytes(model)
    scale, wrong = max(abs(least), 1e-3), []
    for beyond in (0.0, 1e-7, 1e-6):
        threshold = least - beyond * scale
        vnnlib.write_text(text(low, up, threshold))
        try:
            result = verifier.verify(onnx, vnnlib, timeout=timeout)
        except DeadlineExceeded:
            counts[f"{kind:14} timeout"] += 1
            continue
        label = str(result.verdict)
        if result.verdict is Verdict.UNSAT:
            label += " float32" if result.covers.float32 else " real"
        counts[f"{kind:14} {label}"] += 1
        where = f"seed {seed} number {number} ({kind}), threshold {threshold!r} ({beyond:g} beyond)"
        if result.verdict is Verdict.UNSAT and result.covers.float32:
            found, x = runs.search(low, up, np.random.default_rng([seed, number, 2]), 300)
            if min(found, least) <= threshold:
                wrong.append(f"{where}: covers float32, but a run gives {min(found, least)!r} at {x.tolist()}")
        if result.verdict is Verdict.SAT:
            assert result.witness is not None
            x = result.witness.inputs.astype(np.float32)
            if not ((x >= low) & (x <= up)).all() or max(runs.least(x), float(result.witness.outputs[0])) > threshold:
                wrong.append(f"{where}: the witness does not replay")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=10.0)
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.first, given.first + given.count):
            found = check(number, given.seed, given.timeout, counts, Path(folder))
            for line in found:
                print(f"WRONG: {line}", flush=True)
            wrong += found
    for name, count in sorted(counts.items()):
        print(f"{count:6} {name}")
    print(f"{given.count} networks, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
