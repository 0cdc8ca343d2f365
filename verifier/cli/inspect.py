"""What an ONNX file holds: its nodes as the verifier sees them, or what is in the way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from verifier.core.errors import UnsupportedError

if TYPE_CHECKING:
    from verifier.frontend.network import Network
    from verifier.frontend.onnx_file import OnnxFile


def describe(path: Path) -> str:
    """A page of text on a network; an unsupported one is described as far as the file goes.

    Raises:
        InputError: the file is missing or malformed.
    """
    from verifier.frontend import normalise
    from verifier.frontend.network import load_network

    file = normalise.load(path)
    try:
        network = load_network(path)
    except UnsupportedError as error:
        return "\n".join([*_header(file), *_operators(file), "", f"not supported: {error}"])
    return "\n".join([*_header(file), *_operators(file), "", *_nodes(network)])


def _header(file: OnnxFile) -> list[str]:
    numbers = sum(_elements(list(tensor.dims)) for tensor in file.model.graph.initializer)
    return [
        f"file        {file.path} (opset {file.opset})",
        f"sha256      {file.sha256}",
        f"input       {file.input_name} {list(file.input_shape)} {file.input_dtype}",
        f"output      {file.output_name}",
        f"parameters  {numbers:,} in {len(file.model.graph.initializer)} tensors",
    ]


def _elements(dims: list[int]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count


def _operators(file: OnnxFile) -> list[str]:
    kinds = Counter(node.op_type for node in file.model.graph.node)
    return [f"operators   {', '.join(f'{kind} x {count}' for kind, count in sorted(kinds.items()))}"]


def _nodes(network: Network) -> list[str]:
    """One line per node: index, kind, shape, operands, parameters, name."""
    rows = [("node", "op", "shape", "inputs", "parameters", "name")]
    for node in network.graph.nodes:
        parameters = ", ".join("x".join(map(str, handle.shape)) or "1" for handle in node.op.handles)
        operands = " ".join(map(str, node.inputs))
        rows.append((str(node.index), node.op.kind, str(list(node.shape)), operands, parameters, node.name))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
