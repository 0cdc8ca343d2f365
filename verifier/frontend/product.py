"""Several networks as one graph: shared inputs in, the values of all networks and products of them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verifier.core.deadline import Deadline
from verifier.core.errors import InputError, UnsupportedError
from verifier.core.handles import Handle
from verifier.core.question import Part, Question
from verifier.frontend.builder import Builder
from verifier.frontend.network import Network, load_network
from verifier.frontend.onnx_file import read_ports
from verifier.frontend.passes import simplify
from verifier.frontend.ports import Original, check_ports, check_shape, check_type, load_ported, open_ported
from verifier.graph.graph import Graph
from verifier.graph.op import Op
from verifier.ops.power import Power, Square
from verifier.ops.product import Mul
from verifier.ops.shape import Concat, Gather, Reshape, inverse_index


@dataclass(frozen=True)
class ProductRunner:
    """Runs every network by itself on its part of the inputs; products follow in float64."""

    networks: tuple[Network | Original, ...]
    parts: tuple[Part, ...]
    products: tuple[tuple[int, ...], ...]

    def __call__(self, x: np.ndarray, optimised: bool) -> np.ndarray:
        flat = x.reshape(-1)
        values = [
            network.evaluate(flat[part.index][None], optimised)[0]
            for network, part in zip(self.networks, self.parts, strict=True)
        ]
        y = np.concatenate(values)
        if not self.products:
            return y
        y, flat = y.astype(np.float64), flat.astype(np.float64)
        with np.errstate(all="ignore"):
            more = [np.prod([flat[v] if v >= 0 else y[~v] for v in product]) for product in self.products]
        return np.concatenate([y, np.array(more)])


@dataclass(frozen=True)
class Reference:
    """The files of a question, none of them translated."""

    runner: ProductRunner
    dtype: np.dtype

    def evaluate(self, x: np.ndarray, optimised: bool = True) -> np.ndarray:
        """(n, n_in) to (n, n_out)."""
        return np.stack([self.runner(point, optimised) for point in x])


def open_reference(files: Mapping[str, str | Path], question: Question) -> Reference:
    """What decides about counterexamples; errors as of :func:`verifier.frontend.ports.open_ported`."""
    parts = question.parts
    originals = tuple(open_ported(files[part.equal_to or part.name], part) for part in parts)
    return Reference(ProductRunner(originals, parts, question.problem.products), originals[0].dtype)


def load_plain(files: Mapping[str, str | Path], question: Question, deadline: Deadline | None = None) -> Network:
    """The network of a question about one input and one output, as by :func:`load_network`.

    Where its input is a scalar, or has a size that the file leaves open, it is read as one of several would be.
    """
    (part,) = question.parts
    path = files[part.name]
    ports = read_ports(path, deadline=deadline)
    check_ports(ports, part)
    if not ports.shapes[0] or math.prod(ports.shapes[0]) != part.inputs[0].size:
        return load_product(files, question, deadline)
    network = load_network(path, deadline)
    check_shape(f"{network.path}: input", network.input_shape, part.inputs[0])
    check_shape(f"{network.path}: output", network.output_shape, part.outputs[0])
    run = network.evaluate(np.zeros((1, network.n_in)))
    check_type(f"{network.path}: output", run.dtype, part.outputs[0])
    return network


def load_product(files: Mapping[str, str | Path], question: Question, deadline: Deadline | None = None) -> Network:
    """The networks of a question as one.

    Args:
        files: ONNX files by the names of the networks that need one.

    Raises:
        InputError: a file is missing, malformed or of another form than declared.
        UnsupportedError: a network uses something without a rule.
    """
    loaded: dict[str, Network] = {}
    for part in question.parts:
        if part.equal_to and not part.hidden and part.equal_to in loaded and not _part(question, part.equal_to).hidden:
            loaded[part.name] = loaded[part.equal_to]
        else:
            loaded[part.name] = load_ported(files[part.equal_to or part.name], part, deadline)
    networks = tuple(loaded[part.name] for part in question.parts)
    dtypes = {network.input_dtype for network in networks}
    if len(dtypes) > 1:
        raise UnsupportedError(f"{question.source}: networks of several input types are not supported together")
    graph = simplify(product_graph([n.graph for n in networks], question), deadline, runs=False)
    used = tuple(dict.fromkeys(plugin for network in networks for plugin in network.plugins))
    return Network(
        graph,
        " and ".join(dict.fromkeys(network.name for network in networks)),
        graph.input_shape,
        graph.output_shape,
        networks[0].input_dtype,
        None,
        ProductRunner(networks, question.parts, question.problem.products),
        plugins=used,
        no_runs="the query is about several tensors or networks, whose runs are not modelled together",
    )


def _part(question: Question, name: str) -> Part:
    return next(part for part in question.parts if part.name == name)


def product_graph(graphs: Sequence[Graph], question: Question) -> Graph:
    """One graph from the inputs of the problem, (1, n_in), to its outputs, (1, n_out)."""
    n_in = question.problem.n_in
    builder = Builder.start((1, n_in), "inputs")
    outputs = [_copied(builder, graph, part) for graph, part in zip(graphs, question.parts, strict=True)]
    products = question.problem.products
    if products:
        n_values = sum(part.n_values for part in question.parts)
        outputs.append(_products(builder, outputs, products, n_in, n_values))
    return builder.finish(_joined(builder, outputs, "outputs"))


def _joined(builder: Builder, nodes: Sequence[int], name: str) -> int:
    """Rows (1, n) one after the other."""
    if len(nodes) == 1:
        return nodes[0]
    width = sum(builder.shape(node)[1] for node in nodes)
    return builder.emit(Concat(1), nodes, (1, width), name)


def _picked(builder: Builder, node: int, index: Sequence[int] | np.ndarray, shape: tuple[int, ...], name: str) -> int:
    """Some elements of a row."""
    where = torch.as_tensor(np.asarray(index, dtype=np.int64))
    size = builder.shape(node)[1]
    op = Gather(
        builder.param(where, f"{name}.index"), shape, builder.param(inverse_index(where, size), f"{name}.inverse")
    )
    return builder.emit(op, [node], shape, name)


def _copied(builder: Builder, graph: Graph, part: Part) -> int:
    """A network's nodes, from its share of the inputs; the node of its values as a row."""
    place = {0: _picked(builder, 0, part.index, graph.input_shape, f"{part.name}/inputs")}
    for node in graph.nodes[1:]:
        changes: dict[str, Any] = {}
        for field in fields(node.op):  # type: ignore[arg-type]
            value = getattr(node.op, field.name)
            if isinstance(value, Handle):
                changes[field.name] = builder.param(graph.parameters[value], f"{part.name}/{value.name}")
        op: Op = replace(node.op, **changes) if changes else node.op  # type: ignore[type-var]
        place[node.index] = builder.emit(op, [place[i] for i in node.inputs], node.shape, f"{part.name}/{node.name}")
    out = place[graph.output]
    row = (1, part.n_values)
    if graph.nodes[graph.output].size != part.n_values:
        raise InputError(f"the network '{part.name}' has {graph.nodes[graph.output].size} outputs, not {part.n_values}")
    return builder.emit(Reshape(row), [out], row, f"{part.name}/outputs")


def _products(
    builder: Builder, outputs: Sequence[int], products: Sequence[tuple[int, ...]], n_in: int, n_values: int
) -> int:
    """All products in order. Powers of one variable come first, then factors one by one."""
    source = _joined(builder, [0, *outputs], "factors")

    def column(v: int) -> int:
        return v if v >= 0 else n_in + ~v

    powers = [[(v, product.count(v)) for v in dict.fromkeys(product)] for product in products]
    place: dict[tuple[int, int], int] = {(v, 1): column(v) for product in products for v in product}
    rows, width = [source], n_in + n_values
    for e in sorted({e for product in powers for _, e in product if e > 1}):
        wanted = list(dict.fromkeys(v for product in powers for v, k in product if k == e))
        shape = (1, len(wanted))
        base = _picked(builder, source, [column(v) for v in wanted], shape, f"base{e}")
        rows.append(builder.emit(Square() if e == 2 else Power(float(e)), [base], shape, f"power{e}"))
        place.update({(v, e): width + k for k, v in enumerate(wanted)})
        width += len(wanted)
    table = _joined(builder, rows, "powers")
    made: list[int] = []
    order: list[int] = []
    for count in sorted({len(product) for product in powers}):
        chosen = [k for k, product in enumerate(powers) if len(product) == count]
        shape = (1, len(chosen))
        order += chosen
        total = _picked(builder, table, [place[powers[k][0]] for k in chosen], shape, f"first{count}")
        for r in range(1, count):
            other = _picked(builder, table, [place[powers[k][r]] for k in chosen], shape, f"factor{count}_{r}")
            total = builder.emit(Mul(), [total, other], shape, f"product{count}_{r}")
        made.append(total)
    joined = _joined(builder, made, "made")
    return _picked(builder, joined, np.argsort(order), (1, len(products)), "products")
