"""What was found as a test of its own, all data inline."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from scripts.fuzzing import truth
from scripts.fuzzing.checks import Complaint, Query
from scripts.fuzzing.settings import PATHS

_HEAD = '''"""{title}"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import verifier
from verifier.core.errors import VerifierError

'''


def test_of_query(query: Query, complaint: Complaint, where: str) -> str:
    """A test that fails as long as the complaint holds."""
    body = _HEAD.format(title=_title(complaint, where)) + _model(query.proto)
    body += f"PROPERTY = {query.text!r}\nSETTINGS = {_plain(query.settings)!r}\n"
    body += f"LOWER = {list(query.lower)!r}\nUPPER = {list(query.upper)!r}\nPOINT = {_floats(complaint.point)!r}\n\n\n"
    patches = [p for name in query.paths for p in PATHS[name]]
    fixtures = "tmp_path: Path, monkeypatch: pytest.MonkeyPatch" if patches else "tmp_path: Path"
    body += f"def test_it({fixtures}) -> None:\n"
    lines = [f"monkeypatch.setattr({f'{m}.{a}'!r}, {_value(v)})" for m, a, v in patches]
    lines += ['network, prop = tmp_path / "n.onnx", tmp_path / "p.vnnlib"', "network.write_bytes(MODEL)"]
    lines += ["prop.write_text(PROPERTY)"]
    if complaint.what == "unsound bound" and query.methods:
        lines += _bounds(query, complaint)
    else:
        lines += [f"result = verifier.verify(network, prop, SETTINGS, {max(query.timeout, 30.0)})"]
        lines += _verdict(complaint)
    body += textwrap.indent("\n".join(lines), "    ") + "\n"
    facts = "from verifier.core.device import DeviceFacts\n"
    return body.replace(
        "from verifier.core.errors", f"{facts}from verifier.core.errors", 1 if "DeviceFacts(" in body else 0
    )


def _bounds(query: Query, complaint: Complaint) -> list[str]:
    values, _ = truth.real_values(query.proto, np.asarray(complaint.point))
    true = {k: [float(v) for v in a.reshape(-1)] for k, a in values.items() if a.dtype != bool}
    return [
        f"true = {true!r}  # at POINT",
        "box = [np.reshape(v, [d.dim_value for d in onnx.load_from_string(MODEL).graph.input[0]",
        "       .type.tensor_type.shape.dim]) for v in (LOWER, UPPER)]",
        f"settings = {{k: v for k, v in SETTINGS.items() if k[:4] not in ('bab.', 'atta')}} | {_STEPS!r}",
        f"found = verifier.compute_bounds(network, *box, {query.methods[0]!r}, True, settings)",
        "for name, (low, high) in {OUTPUT: (found.lower, found.upper), **found.intermediate}.items():",
        "    v, low, high = (np.asarray(t, dtype=np.float64).reshape(-1) for t in (true.get(name, []), low, high))",
        "    if v.size == low.size:",
        "        slack = 1e-15 * np.abs(v)  # the values above are rounded to doubles",
        "        assert (low <= v + slack).all() and (v - slack <= high).all(), name",
    ]


_STEPS = {"bounds.alpha.iterations": 2, "bounds.alpha.intermediate_iterations": 2}


def _verdict(complaint: Complaint) -> list[str]:
    if complaint.what in ("wrong unsat", "wrong float32"):
        return ["assert result.verdict.value != 'unsat'  # POINT is a counterexample"]
    if complaint.what == "bad witness":
        return ["assert result.verdict.value != 'sat'  # the witness that was given does not replay"]
    return ["assert result.verdict.value in ('sat', 'unsat', 'unknown', 'timeout'), result.reason"]


def test_of_text(text: str, complaint: Complaint, where: str) -> str:
    """A test that a property is read as it is written."""
    return f'''"""{_title(complaint, where)}"""

from __future__ import annotations

import random

from scripts.fuzzing.vnnlib import disagreement

TEXT = {text!r}


def test_it() -> None:
    words = set(TEXT.replace("(", " ").replace(")", " ").split())
    n_in, n_out = (sum(w.startswith(c) for w in words) for c in ("X_", "Y_"))
    assert disagreement(TEXT, n_in, n_out, random.Random(0), 2000) is None
'''


def test_of_files(files: tuple[bytes, bytes], complaint: Complaint, where: str) -> str:
    """A test that broken files end in one sentence."""
    return f'''"""{_title(complaint, where)}"""

from __future__ import annotations

from scripts.fuzzing.files import from_outside, in_process

FILES = (
    {files[0]!r},
    {files[1]!r},
)


def test_it() -> None:
    assert in_process(FILES) is None
    assert from_outside(FILES) is None
'''


def test_of_part(part: tuple[str, int], complaint: Complaint, where: str) -> str:
    """A test that a part keeps what it promises."""
    return f'''"""{_title(complaint, where)}"""

from __future__ import annotations

from scripts.fuzzing.parts import complaint_of


def test_it() -> None:
    assert complaint_of({part[0]!r}, {part[1]}) is None
'''


def test_of_node(case: tuple[onnx.ModelProto, float, float], complaint: Complaint, where: str) -> str:
    """A test that a node computes what onnxruntime computes."""
    model, low, high = case
    title = _title(complaint, where)
    head = _HEAD.format(title=title).replace("import pytest\n", "").replace("from pathlib import Path\n\n", "")
    head = head.replace(
        "import verifier\nfrom verifier.core.errors import VerifierError\n",
        "from scripts.fuzzing.frontend import complaint_of\n",
    )
    return f"""{head}{_model(model)}

def test_it() -> None:
    model = onnx.load_from_string(MODEL)
    assert all(complaint_of(model, {low}, {high}, np.random.default_rng(k)) is None for k in range(20))
"""


def _title(complaint: Complaint, where: str) -> str:
    detail = " ".join(complaint.detail.split()).replace("\\", "/").replace('"', "'")
    lines = textwrap.wrap(f"{complaint.what} ({where}): {detail}", 110)[:6]
    return "\n".join(lines)


def _model(model: onnx.ModelProto) -> str:
    """Python text that builds the model as MODEL."""
    out = ["CONSTANTS = {"]
    for t in model.graph.initializer:
        a = numpy_helper.to_array(t)
        out.append(f"    {t.name!r}: np.array({a.tolist()!r}, dtype=np.{a.dtype.name}).reshape({list(a.shape)!r}),")
    out += ["}", "NODES = ["]
    for n in model.graph.node:
        given = "".join(f", {k}={v!r}" for k, v in truth.attributes(n).items())
        out.append(f"    helper.make_node({n.op_type!r}, {list(n.input)!r}, {list(n.output)!r}{given}),")
    info = model.graph.input[0].type.tensor_type
    shape = [d.dim_value for d in info.shape.dim]
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    out += ["]", f"OUTPUT = {model.graph.output[0].name!r}", "MODEL = helper.make_model("]
    out += ["    helper.make_graph(", "        NODES,", "        'fuzzed',"]
    out += [f"        [helper.make_tensor_value_info({model.graph.input[0].name!r}, {info.elem_type}, {shape!r})],"]
    out += ["        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, None)],"]
    out += ["        [numpy_helper.from_array(a, k) for k, a in CONSTANTS.items()],", "    ),"]
    out += [f"    opset_imports=[helper.make_opsetid('', {opset})],", "    ir_version=8,", ").SerializeToString()\n"]
    return "\n".join(out)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if not k.startswith("parallel.ranks")}


def _floats(point: tuple[float, ...] | None) -> list[float] | None:
    return None if point is None else [float(v) for v in point]


def _value(v: Any) -> str:
    return "lambda *_, **__: False" if callable(v) else repr(v)
