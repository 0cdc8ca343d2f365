"""Small networks, properties and proofs of them, made without the verifier and without the checker.

`Prover` is a plain implementation of backward passes in rational arithmetic for fully connected ReLU networks, and the
oracle of the tests: what it says is what a leaf is worth.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from proofcheck.cli import main


def save(path: Path, nodes: list, initial: dict[str, np.ndarray], inputs: list[int], outputs: list[int]) -> Path:
    """An ONNX file with input x and output out."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, outputs)
    constants = [numpy_helper.from_array(v, n) for n, v in initial.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [out], constants), opset_imports=[helper.make_opsetid("", 13)]
    )
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def property_file(path: Path, low: np.ndarray, up: np.ndarray, outputs: int, unsafe: str) -> Path:
    """A box and an assertion over the outputs."""
    lines = [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i, (a, b) in enumerate(zip(low, up, strict=True)):
        lines += [f"(assert (>= X_{i} {float(a)!r}))", f"(assert (<= X_{i} {float(b)!r}))"]
    path.write_text("\n".join([*lines, f"(assert {unsafe})"]) + "\n")
    return path


@dataclass
class Proof:
    """A header and arrays, to be changed at will and written."""

    header: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, values: object, dtype: str) -> str:
        name = f"a{len(self.arrays)}"
        self.arrays[name] = np.array(values, dtype)
        return name

    def step(self, **fields: object) -> None:
        self.header["steps"].append(fields)

    def write(self, path: Path, change: Callable[[dict], None] = lambda header: None) -> Path:
        types = {"float32": "<f4", "float64": "<f8", "int32": "<i4", "uint8": "u1"}
        header = {"arrays": {n: [types[a.dtype.name], list(a.shape)] for n, a in self.arrays.items()}, **self.header}
        change(header)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("header.json", json.dumps(header))
            for name, a in self.arrays.items():
                file.writestr(f"{name}.bin", a.tobytes())
        return path


def started(network: Path, prop: Path, tensors: list[str], y: object, d: object) -> Proof:
    """A proof without steps."""
    proof = Proof()
    digest = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in (("network", network), ("property", prop))}
    proof.header = {
        "format": "verifier-proof",
        "version": 1,
        "network": {"sha256": digest["network"], "external": {}},
        "property": {"sha256": digest["property"]},
        "tensors": tensors,
        "steps": [],
        "rows": {"y": proof.add(y, "<f8"), "d": proof.add(d, "<f8")},
    }
    return proof


class Mlp:
    """Gemm, ReLU, ..., Gemm with tensors z0, h0, z1, ..., out; weights are small multiples of 1/64."""

    def __init__(self, rng: np.random.Generator, sizes: list[int]) -> None:
        self.weights = [rng.integers(-64, 65, (a, b)) / 64.0 for a, b in itertools.pairwise(sizes)]
        self.biases = [rng.integers(-32, 33, b) / 64.0 for b in sizes[1:]]

    def save(self, path: Path) -> Path:
        nodes, initial, last = [], {}, "x"
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            end = i + 1 == len(self.weights)
            initial |= {f"w{i}": w.astype(np.float32), f"b{i}": b.astype(np.float32)}
            nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], ["out" if end else f"z{i}"]))
            if not end:
                nodes.append(helper.make_node("Relu", [f"z{i}"], [f"h{i}"]))
                last = f"h{i}"
        return save(path, nodes, initial, [1, self.weights[0].shape[0]], [1, self.weights[-1].shape[1]])

    def values(self, x: np.ndarray) -> np.ndarray:
        for w, b in list(zip(self.weights, self.biases, strict=True))[:-1]:
            x = np.maximum(x @ w + b, 0.0)
        return x @ self.weights[-1] + self.biases[-1]


class Prover:
    """Bounds of a network's rows on a box, in rational numbers.

    Attributes:
        low, up: claimed bounds of z0, z1, ... as lists of numbers; `box` those of the input.
    """

    def __init__(self, net: Mlp, low: np.ndarray, up: np.ndarray) -> None:
        self.net, self.box = net, (low, up)
        self.low: list[np.ndarray] = []
        self.up: list[np.ndarray] = []

    def lower(
        self,
        layer: int,
        row: np.ndarray,
        slopes: list[np.ndarray],
        splits: dict[tuple[int, int], tuple[bool, float]],
    ) -> Fraction:
        """The backward pass of a row of layer `layer`'s output.

        Args:
            slopes: of every hidden layer before. splits: (layer, element) -> (whether z >= 0, multiplier).
        """
        a, total = [Fraction(float(v)) for v in row], Fraction(0)
        for i in range(layer, -1, -1):
            w, b = self.net.weights[i], self.net.biases[i]
            if i < layer:  # a is on h_i: through the ReLU to z_i
                for j, v in enumerate(a):
                    l, u, up_side = Fraction(float(self.low[i][j])), Fraction(float(self.up[i][j])), splits.get((i, j))
                    if up_side is not None:
                        l, u = (max(l, Fraction(0)), u) if up_side[0] else (l, min(u, Fraction(0)))
                    if l >= 0 or u <= 0:
                        a[j] = v if l >= 0 else Fraction(0)
                    elif v > 0:
                        a[j] = v * Fraction(float(slopes[i][j]))
                    else:
                        a[j], total = v * u / (u - l), total - v * u * l / (u - l)
                    if up_side is not None:
                        a[j] += Fraction(up_side[1]) * (-1 if up_side[0] else 1)
            total += sum((v * Fraction(float(c)) for v, c in zip(a, b, strict=True)), Fraction(0))
            a = [sum((v * Fraction(float(c)) for v, c in zip(a, line, strict=True)), Fraction(0)) for line in w]
        ends = zip(a, *self.box, strict=True)
        return total + sum((v * Fraction(float(l if v > 0 else u)) for v, l, u in ends), Fraction(0))


@dataclass
class Example:
    """A proof with the files it is about."""

    network: Path
    property: Path
    proof: Proof
    margin: Fraction

    def check(self, path: Path, *options: str) -> int:
        return main(["--onnx", str(self.network), "--vnnlib", str(self.property), *options, str(path)])


def example(folder: Path, seed: int, margin: float = 1e-3, depth: int = 3) -> Example:
    """A network with two hidden layers, a proof by splits of neurons with random slopes and multipliers, and a
    threshold that all leaves exceed by at least `margin`, which may be negative."""
    rng = np.random.default_rng(seed)
    net, low, up = Mlp(rng, [3, 6, 5, 2]), np.full(3, -0.5), np.full(3, 0.75)
    prover = Prover(net, low, up)
    centre, radius = 0.5 * (low + up), 0.5 * (up - low)
    middle, spread = centre @ net.weights[0] + net.biases[0], radius @ np.abs(net.weights[0])
    prover.low, prover.up = [np.float32(middle - spread - 1e-4)], [np.float32(middle + spread + 1e-4)]
    first = rng.integers(0, 129, (10, 6)).astype(np.uint8)
    eye = np.concatenate([np.eye(5), -np.eye(5)])
    values = np.array([float(prover.lower(1, e, [s / 128.0], {})) - 1e-4 for e, s in zip(eye, first, strict=True)])
    prover.low.append(np.float32(values[:5]))
    prover.up.append(np.float32(-values[5:]))
    free = [(i, j) for i in range(2) for j in range(len(prover.low[i])) if prover.low[i][j] < 0 < prover.up[i][j]]
    row = np.array([1.0, -1.0])
    nodes: list[int] = []
    leaves: list[dict[tuple[int, int], tuple[bool, float]]] = []

    def grow(path: dict, left: int) -> None:
        choices = [c for c, f in enumerate(free) if f not in path]
        if not left or not choices or rng.random() < 0.1:
            nodes.append(-1)
            leaves.append(dict(path))
            return
        c = int(rng.choice(choices))
        nodes.append(c)
        for side in (False, True):
            grow({**path, free[c]: (side, float(np.float32(rng.choice([0.0, 0.05, 0.25]))))}, left - 1)

    grow({}, depth)
    slopes = rng.integers(0, 129, (len(leaves), len(free))).astype(np.uint8)
    worst = None
    for own, s in zip(leaves, slopes, strict=True):
        every = [np.where(prover.up[i] > -prover.low[i], 1.0, 0.0) for i in range(2)]
        for c, (i, j) in enumerate(free):
            every[i][j] = s[c] / 128.0
        bound = prover.lower(2, row, every, own)
        worst = bound if worst is None else min(worst, bound)
    text = repr(float(worst) - margin)
    d = float(text) if Fraction(float(text)) >= Fraction(text) else float(np.nextafter(float(text), np.inf))
    network = net.save(folder / "net.onnx")
    prop = property_file(folder / "prop.vnnlib", low, up, 2, f"(<= (- Y_0 Y_1) {text})")
    proof = started(network, prop, ["z0", "z1"], [row], [d])
    proof.step(kind="box", lower=proof.add(low, "<f4"), upper=proof.add(up, "<f4"))
    proof.step(kind="claim", tensor=0, lower=proof.add(prover.low[0], "<f4"), upper=proof.add(prover.up[0], "<f4"))
    proof.step(
        kind="rows", tensor=1, elements=proof.add([*range(5)] * 2, "<i4"), sides=proof.add([0] * 5 + [1] * 5, "u1"),
        values=proof.add([*prover.low[1], *prover.up[1]], "<f4"),
        slopes={"columns": [[0, proof.add(range(6), "<i4")]], "values": proof.add(first, "u1")},
    )  # fmt: skip
    columns = [[i, proof.add([j for k, j in free if k == i], "<i4")] for i in range(2)]
    multipliers = [m for own in leaves for _, m in own.values()]
    tree = {
        "columns": columns, "nodes": proof.add(nodes, "<i4"), "row": proof.add([0] * len(leaves), "<i4"),
        "slopes": proof.add(slopes, "u1"), "wide": None, "wide_slopes": None,
        "multipliers": proof.add(multipliers, "<f4"), "used": None,
    }  # fmt: skip
    proof.step(kind="cases", starts=proof.add([0, 1], "<i4"), rows=proof.add([0], "<i4"), method="backward", tree=tree)
    return Example(network, prop, proof, worst - Fraction(d))
