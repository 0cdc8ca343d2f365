"""Functions of an ONNX model, inlined: its own, and operators that the standard defines by other operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from verifier.core.errors import UnsupportedError
from verifier.frontend.normalise import tidy

if TYPE_CHECKING:
    import onnx

    from verifier.frontend.onnx_file import OnnxFile

MOST_NODES = 200_000
_ROUNDS = 16  # functions of functions

Body = Callable[["onnx.NodeProto"], "onnx.FunctionProto | None"]


def inline_own(file: OnnxFile) -> bool:
    """Replace every call of a function of the model's own, in place; whether there was one."""
    own = {(f.domain, f.name, f.overload): f for f in file.model.functions}
    if not own:
        return False
    return _inline(file, lambda node: own.get((node.domain, node.op_type, node.overload)))


def inline_standard(file: OnnxFile, wanted: Callable[[onnx.NodeProto], bool]) -> bool:
    """Replace standard operators by their definitions, in place; whether one was.

    Args:
        wanted: for which nodes.
    """
    versions = {entry.domain: entry.version for entry in file.model.opset_import}
    types: dict[str, onnx.TypeProto] = {}

    def body(node: onnx.NodeProto) -> onnx.FunctionProto | None:
        if not wanted(node):
            return None
        if not types:
            types.update(_types(file))
        return definition(node, versions.get(node.domain, 0), types)

    return _inline(file, body, types.clear)


def definition(node: onnx.NodeProto, version: int, types: Mapping[str, onnx.TypeProto]) -> onnx.FunctionProto | None:
    """What the standard defines an operator as, for the version of the operator set; None when it is not a function."""
    from onnx import FunctionProto, TypeProto, defs

    try:
        schema: Any = defs.get_schema(node.op_type, version, node.domain)
    except defs.SchemaError:
        return None
    found = FunctionProto()
    if schema.has_context_dependent_function:
        valid = _latest(schema.context_dependent_function_opset_versions, version)
        given = [types.get(name, TypeProto()) if name else TypeProto() for name in node.input]
        if any(name and name not in types for name in node.input):
            return None
        data = schema.get_context_dependent_function_with_opset_version(
            valid, node.SerializeToString(), [t.SerializeToString() for t in given]
        )
    elif schema.has_function:
        data = schema.get_function_with_opset_version(_latest(schema.function_opset_versions, version))
    else:
        return None
    if not data:
        return None
    found.ParseFromString(data)
    return found


def _latest(versions: Sequence[int], version: int) -> int:
    """A definition holds from its version of the operator set to the next one."""
    return max((v for v in versions if v <= version), default=min(versions))


def _types(file: OnnxFile) -> dict[str, onnx.TypeProto]:
    """Types and shapes of all values, as far as they can be inferred."""
    from onnx import helper

    from verifier.frontend.onnx2torch_loader import infer_shapes

    model = infer_shapes(file.model)
    graph = model.graph
    found = {v.name: v.type for v in (*graph.input, *graph.value_info, *graph.output)}
    for t in file.model.graph.initializer:
        found[t.name] = helper.make_tensor_type_proto(t.data_type, list(t.dims))
    return found


def _inline(file: OnnxFile, body: Body, after: Callable[[], None] = lambda: None) -> bool:
    """Replace calls until there are none; functions may call others."""
    graph, changed = file.model.graph, False
    for _ in range(_ROUNDS):
        nodes: list[onnx.NodeProto] = []
        again, mark = False, fresh_mark(graph)
        for node in list(graph.node):
            function = body(node)
            nodes += [node] if function is None else expanded(node, function, f"{node.output[0]}{mark}")
            again = again or function is not None
            if len(nodes) > MOST_NODES:
                raise UnsupportedError(f"{file.path}: has more than {MOST_NODES} nodes with its functions inlined")
        if not again:
            return changed
        changed = True
        del graph.node[:]
        graph.node.extend(nodes)
        tidy(file)
        after()
    raise UnsupportedError(f"{file.path}: functions that call one another more than {_ROUNDS} deep")


def fresh_mark(graph: onnx.GraphProto) -> str:
    """A text that is part of no name yet: names that begin with that of a value and this text are new."""
    names = [name for node in graph.node for name in (*node.input, *node.output)]
    names += [t.name for t in graph.initializer]
    count = 0
    while any(f"@{count}/" in name for name in names):
        count += 1
    return f"@{count}/"


def expanded(node: onnx.NodeProto, function: onnx.FunctionProto, prefix: str) -> list[onnx.NodeProto]:
    """The nodes of a function's body with the names and attributes of a call; inner names begin with the prefix."""
    names: dict[str, str] = {"": ""}
    for k, formal in enumerate(function.input):
        names[formal] = node.input[k] if k < len(node.input) else ""
    read = {n.output[k] for n in function.node for k in range(len(n.output))}
    copies = []
    for k, formal in enumerate(function.output):
        actual = node.output[k] if k < len(node.output) else ""
        if formal in names or (actual and formal not in read):
            copies.append((names.get(formal, formal), actual))
        elif actual:
            names[formal] = actual
    given = {a.name: a for a in node.attribute}
    defaults = {a.name: a for a in function.attribute_proto}
    out = [_renamed(inner, names, prefix, {**defaults, **given}) for inner in function.node]
    return out + [_identity(source, target) for source, target in copies if target]


def _identity(source: str, target: str) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Identity", [source], [target])


def _renamed(
    node: onnx.NodeProto, names: dict[str, str], prefix: str, attributes: Mapping[str, onnx.AttributeProto]
) -> onnx.NodeProto:
    """A node of a body with other names; what it makes is entered into ``names``."""
    from onnx import NodeProto

    out = NodeProto()
    out.CopyFrom(node)
    del out.attribute[:]
    for attribute in node.attribute:
        bound = _bound(attribute, attributes)
        if bound is not None:
            out.attribute.append(bound)
            for graph in [out.attribute[-1].g] if out.attribute[-1].HasField("g") else []:
                rename_graph(graph, names, prefix, attributes)
    for k, name in enumerate(node.input):
        out.input[k] = names.get(name, name)
    for k, name in enumerate(node.output):
        names.setdefault(name, prefix + name)
        out.output[k] = names[name]
    return out


def _bound(attribute: onnx.AttributeProto, attributes: Mapping[str, onnx.AttributeProto]) -> onnx.AttributeProto | None:
    """An attribute that refers to one of the function's gets its value; None when that has none."""
    if not attribute.ref_attr_name:
        return attribute
    found = attributes.get(attribute.ref_attr_name)
    if found is None:
        return None
    from onnx import AttributeProto

    out = AttributeProto()
    out.CopyFrom(found)
    out.name = attribute.name
    return out


def rename_graph(
    graph: onnx.GraphProto,
    names: Mapping[str, str],
    prefix: str,
    attributes: Mapping[str, onnx.AttributeProto] | None = None,
) -> None:
    """Rename the values of a subgraph in place: its own get the prefix, those of outer graphs as ``names`` says."""
    inner = dict(names)
    for value in (*graph.input, *graph.initializer):
        inner[value.name] = prefix + value.name
        value.name = inner[value.name]
    nodes = [_renamed(node, inner, prefix, attributes or {}) for node in _fresh_outputs(graph, inner)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for value in graph.output:
        value.name = inner.get(value.name, value.name)


def _fresh_outputs(graph: onnx.GraphProto, inner: dict[str, str]) -> list[onnx.NodeProto]:
    """The nodes; names that they make hide equal ones of outer graphs."""
    for node in graph.node:
        for name in node.output:
            if name:
                inner.pop(name, None)
    return list(graph.node)
