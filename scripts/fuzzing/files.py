"""Files that are broken: mutated and truncated bytes end in one sentence and a verdict word, never in a traceback."""

from __future__ import annotations

import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from scripts.fuzzing import checks, formulas, networks, vnnlib
from scripts.fuzzing.checks import Complaint
from scripts.measure import environment, verifier

WORDS = ("sat", "unsat", "unknown", "timeout", "error")
_PATIENCE = 20  # seconds for reading a small file
_LIMIT = 3.0  # of a query
_ODD = [
    b"\x00",
    b"\xff",
    b"\xc3\x28",
    b"(",
    b")",
    b";",
    b"9" * 30,
    b"1e999",
    b"-",
    b"nan",
    b"\n",
    b"X_",
    b"Y_99",
    b"and",
]
Files = tuple[bytes, bytes]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut, doubled or moved."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, n = rng.randrange(len(out) + 1), rng.choice([1, 2, 4, 16])
        way = rng.random()
        if way < 0.35 and i < len(out):
            out[i] = rng.choice([rng.randrange(256), out[i] ^ (1 << rng.randrange(8)), 0, 255, 128])
        elif way < 0.5:
            out[i : i + n] = b""
        elif way < 0.65:
            out[i:i] = rng.choice(_ODD)
        elif way < 0.75:
            out[i:i] = bytes(rng.randrange(256) for _ in range(n))
        elif way < 0.85:
            j = rng.randrange(len(out) + 1)
            out[i:i] = out[j : j + n]
        elif out:
            del out[rng.randrange(len(out)) :]
    return bytes(out)


def odd_model(rng: random.Random, model: onnx.ModelProto) -> bytes:
    """A model whose fields are wrong one by one: names, shapes, types, attributes."""
    m = onnx.ModelProto()
    m.CopyFrom(model)
    node = rng.choice(list(m.graph.node))
    way = rng.randrange(12)
    if way == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(["", "nowhere", node.output[0], "X"])
    elif way == 1:
        node.op_type = rng.choice(["Relu", "Nothing", "Conv", "Loop", "If", "Reshape", "", "Gather", "TopK"])
    elif way == 2 and m.graph.initializer:
        t = rng.choice(list(m.graph.initializer))
        t.dims[:] = rng.choice([[], [0], [-1], [2**40], [3, 3, 3], [1] * 10])
    elif way == 3 and m.graph.initializer:
        rng.choice(list(m.graph.initializer)).data_type = rng.choice([0, 1, 7, 11, 10, 99, 8])
    elif way == 4 and node.attribute:
        a = rng.choice(list(node.attribute))
        a.i, a.f = rng.choice([-1, 0, 2**40, 7]), rng.choice([float("nan"), 1e38, 0.0])
        if a.ints:
            a.ints[rng.randrange(len(a.ints))] = rng.choice([-1, 0, 100, 2**40])
    elif way == 5 and node.attribute:
        rng.choice(list(node.attribute)).type = rng.choice([0, 1, 2, 3, 4, 7])
    elif way == 6:
        shape = m.graph.input[0].type.tensor_type.shape
        shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice([0, -1, 2**33, 2, 5])
    elif way == 7:
        m.opset_import[0].version = rng.choice([0, 1, 6, 7, 99, 22, -1])
    elif way == 8:
        m.graph.node.append(node)
    elif way == 9:
        del m.graph.node[rng.randrange(len(m.graph.node))]
    elif way == 10:
        m.graph.output[0].name = rng.choice(["", "X", "nowhere", m.graph.node[0].output[0]])
    else:
        m.graph.input[0].type.tensor_type.elem_type = rng.choice([0, 7, 10, 11, 16, 9])
    return m.SerializeToString()


def random_files(rng: np.random.Generator) -> Files:
    """A network and a property of which one at least is broken, most often."""
    source = random.Random(int(rng.integers(0, 2**62)))
    model = networks.random_network(rng, str(rng.choice(["relu", "piecewise", "mixed"])))
    n_in = int(np.prod([d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]))
    text = formulas.declarations(n_in, 1)
    text += "".join(f"(assert (<= X_{i} 1))\n(assert (>= X_{i} -0.5))\n" for i in range(n_in))
    text += f"(assert (<= Y_0 {source.uniform(-3, 3):.3f}))\n"
    data, property = model.SerializeToString(), text.encode()
    way = source.random()
    if way < 0.35:
        property = mutated(source, property)
    elif way < 0.5:
        property = mutated(source, vnnlib.random_text(source)[0].encode())
    elif way < 0.75:
        data = odd_model(source, model)
    else:
        data = mutated(source, data)
    return data, property


class TooLong(BaseException):
    """A reader did not come to an end."""


@contextmanager
def hurried(seconds: int) -> Iterator[None]:
    """Raises TooLong after so many seconds, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def in_process(files: Files) -> Complaint | None:
    """Read both and, where both are fine, ask."""
    import verifier
    from verifier.api import load_problem
    from verifier.core.errors import DeadlineExceeded, VerifierError

    with tempfile.TemporaryDirectory(dir=checks._memory()) as folder:
        network, property = Path(folder) / "n.onnx", Path(folder) / "p.vnnlib"
        network.write_bytes(files[0])
        property.write_bytes(files[1])
        fine = 0
        for read, path in ((checks.load, network), (load_problem, property)):
            try:
                with hurried(_PATIENCE), checks.quiet():
                    read(path)
                fine += 1
            except TooLong:
                return Complaint("hang", f"reading {path.name} takes more than {_PATIENCE} s")
            except VerifierError as error:
                words = str(error)
                if "\n" in words.strip() or not words.strip() or len(words) > 3000:
                    return Complaint("wording", f"not one sentence: {words[:300]!r}")
            except Exception as error:
                return Complaint("crash", f"{path.name}: {checks.last_words(error)}")
        if fine < 2:
            return None
        began = time.process_time()
        try:
            with hurried(_PATIENCE), checks.quiet():
                result = verifier.verify(network, property, {"device": "cpu", "threads": 1}, _LIMIT)
        except TooLong:
            return Complaint("late", f"no answer after {_PATIENCE} s, limit {_LIMIT:g} s")
        except (VerifierError, DeadlineExceeded):
            return None
        except Exception as error:
            return Complaint("crash", checks.last_words(error))
        if time.process_time() - began > _LIMIT + checks.LATE:
            return Complaint("late", f"an answer after {time.process_time() - began:.1f} s, limit {_LIMIT:g} s")
        if result.witness is not None:
            return _wrong_witness(files, result)
    return None


def _wrong_witness(files: Files, result: Any) -> Complaint | None:
    from verifier.spec.witness import format_witness

    try:
        text = files[1].decode()
        n = len(result.witness.inputs)
        query = checks.Query(files[0], text, (0.0,) * n, (0.0,) * n)
        why = checks.replays(query, format_witness(result.witness))
    except Exception:
        return None  # what our readers do not understand
    return None if why is None else Complaint("bad witness", why)


def from_outside(files: Files) -> Complaint | None:
    """The command itself: a verdict word, no traceback, a known exit code, and in time."""
    with tempfile.TemporaryDirectory(dir=checks._memory()) as folder:
        network, property = Path(folder) / "n.onnx", Path(folder) / "p.vnnlib"
        network.write_bytes(files[0])
        property.write_bytes(files[1])
        named = ["--onnx", network, "--vnnlib", property, "--results-file", Path(folder) / "r.txt"]
        command = verifier("verify", *named, "--timeout", "10", "--device", "cpu")
        variables = environment({"OMP_NUM_THREADS": "1"})
        try:
            done = subprocess.run(command, env=variables, capture_output=True, timeout=40, check=False)
        except subprocess.TimeoutExpired:
            return Complaint("hang", "the command did not end within 40 s, limit 10 s")
        said = done.stdout.decode(errors="replace").strip()
        stderr = done.stderr.decode(errors="replace")
        if "Traceback" in stderr or "internal error" in stderr or done.returncode not in (0, 2, 3):
            return Complaint("crash", f"exit {done.returncode}: {stderr.strip()[-400:]}")
        first = (Path(folder) / "r.txt").read_text().split("\n")[0] if (Path(folder) / "r.txt").exists() else "nothing"
        sentences = [line for line in stderr.splitlines() if line.startswith("Error: ")]
        if first not in WORDS or (said not in WORDS and (said or first != "error" or len(sentences) != 1)):
            return Complaint(
                "wording", f"stdout is {said[:200]!r}, the results file {first!r}, stderr {stderr[:300]!r}"
            )
        if said and first != said:
            return Complaint("wording", f"stdout says {said}, the results file {first!r}")
    return None


def run(rng: np.random.Generator, device: str) -> Iterator[tuple[Files, Complaint] | None]:
    """Many files read in this process, some by the command."""
    for k in range(12):
        files = random_files(rng)
        complaint = from_outside(files) if k == 0 and rng.random() < 0.2 else in_process(files)
        yield None if complaint is None else (files, complaint)
