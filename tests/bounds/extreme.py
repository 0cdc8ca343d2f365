"""Networks whose numbers lie near both ends of a floating-point format, and their exact values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from tests.bounds.exact import Exact, affine_parts, exact
from tests.bounds.nets import Case, case, make
from verifier.core.handles import Handle
from verifier.graph.graph import Graph, Node
from verifier.graph.op import AffineOp, Op
from verifier.ops.relu import Relu

# Decades that values of hidden nodes reach, and the smallest and largest decade of a stored number.
REACH = {torch.float32: 33, torch.float64: 290}
STORED = {torch.float32: (-44, 37), torch.float64: (-320, 300)}


def extreme(name: str, seed: int, size: torch.dtype, stored: torch.dtype) -> Case:
    """A network of ``tests.bounds.nets`` whose layers scale their values up to the ends of ``size`` and back again.

    Args:
        stored: dtype of its parameters.
    """
    made = make(name, seed)
    random = np.random.default_rng(seed)
    reach, (least, most) = REACH[size], STORED[stored]
    # Half of the networks go from the largest numbers to the smallest: products of two layers' parameters underflow.
    falling, layer = bool(random.random() < 0.5), 0
    layers = sum(bool(_floats(made.graph, node)) for node in made.graph.nodes)
    decade = {0: 0.0}
    renamed: dict[Handle, Handle] = {}
    parameters: dict[Handle, Tensor] = {}
    nodes: list[Node] = []
    for node in made.graph.nodes:
        here = max((decade[i] for i in node.inputs), default=0.0)
        floats = _floats(made.graph, node)
        changed = {}
        if floats:
            last = not any(made.graph.nodes[i].op.handles for i in _after(made.graph, node.index))
            target = float(random.choice([-reach, -reach / 2, 0, reach / 2, reach]))
            if falling:
                target = reach * (1.0 - 2.0 * layer / max(1, layers - 1))
            elif last:
                target = 0.0
            layer += 1
            for handle in node.op.handles:
                value = made.graph.parameters[handle]
                if value.is_floating_point():
                    factor = target - here if handle == floats[0] and len(floats) > 1 else target
                    if len(floats) == 1:
                        factor = target - here if value.dim() > 1 else target
                    # Some numbers of a tensor are far smaller than the others: they vanish in a narrower format.
                    smaller = np.where(random.random(handle.shape) < 0.3, random.uniform(-30, 0, handle.shape), 0.0)
                    decades = np.clip(factor + smaller, least, most)
                    value = (value.double() * torch.from_numpy(np.power(10.0, decades))).to(stored)
                new = renamed[handle] = Handle(handle.name, handle.shape, value.dtype)
                parameters[new] = value
            changed = {
                f: renamed[getattr(node.op, f)]
                for f in ("weight", "bias", "scale", "shift", "index")
                if isinstance(getattr(node.op, f, None), Handle)
            }
            here = target
        else:
            for handle in node.op.handles:
                parameters[handle] = made.graph.parameters[handle]
        decade[node.index] = here
        op = _replaced(node.op, changed)
        nodes.append(Node(node.index, node.name, op, node.inputs, node.shape))
    return case(Graph(tuple(nodes), made.graph.output, parameters), made.box)


def _floats(graph: Graph, node: Node) -> list[Handle]:
    return [h for h in node.op.handles if graph.parameters[h].is_floating_point()]


def _replaced(op: Op, changed: Mapping[str, Handle]) -> Op:
    return replace(op, **changed) if changed else op  # type: ignore[type-var]


def _after(graph: Graph, index: int) -> set[int]:
    found: set[int] = set()
    stack = list(graph.consumers[index])
    while stack:
        i = stack.pop()
        if i not in found:
            found.add(i)
            stack.extend(graph.consumers[i])
    return found


def exact_values(made: Case, point: Tensor) -> dict[int, Exact]:
    """Values of all nodes at a point (*input_shape): affine ops and ReLUs of slope 0."""
    values = {0: exact(point.flatten())}
    for node in made.graph.nodes[1:]:
        if isinstance(node.op, AffineOp):
            matrices, total = affine_parts(made, node)
            total = total.copy()
            for matrix, i in zip(matrices, node.inputs, strict=True):
                for j, k, w in matrix.entries:
                    total[j] += w * values[i][k]
            values[node.index] = total
        else:
            assert isinstance(node.op, Relu) and node.op.negative_slope == 0
            values[node.index] = np.array([max(v, Fraction(0)) for v in values[node.inputs[0]]], dtype=object)
    return values


def wild(shape: tuple[int, ...], random: np.random.Generator, decades: tuple[float, float]) -> Tensor:
    """float64 numbers of both signs over many decades, some of them zero."""
    size = np.power(10.0, random.uniform(*decades, shape))
    return torch.from_numpy(size * random.choice([-1.0, 0.0, 1.0], shape, p=[0.45, 0.1, 0.45]))
