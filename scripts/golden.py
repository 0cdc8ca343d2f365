"""Golden records: the bits of bounds, verdicts and counts of random networks, to compare before and after a change.

    python scripts/golden.py write golden.json [--count 20] [--ranks 2]
    python scripts/golden.py compare golden.json

Networks of all kinds from fixed seeds, on the CPU with one thread. Recorded are output and hidden bounds by IBP, CROWN
and alpha-CROWN in hexadecimal; verdicts, closing margins and counts of searches over inputs and neurons that end at a
number of domains, not at a time; and the same bounds and verdicts by several ranks. Bits differ between processors
and versions of torch, so that records are compared on the machine that wrote them. ``compare`` repeats what the file
holds and exits 1 at the first difference of each network, all of which it lists.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np  # noqa: E402

from scripts.fuzzing import formulas, networks, search, truth  # noqa: E402

FAMILIES = (*networks.FAMILIES, "pictures", "relu", "pictures", "mixed")
_BASE = {"device": "cpu", "threads": 1, "bounds.alpha.iterations": 5, "bounds.alpha.intermediate_iterations": 3}
# Searches that end at a number of domains; what else a search does depends on no clock.
SEARCHES: dict[str, dict[str, Any]] = {
    "default": {"bab.max_domains": 200},
    "input": {"bab.branching": "input", "bab.max_domains": 200, "attack.enabled": False},
    "babsr": {"bab.branching": "babsr", "bab.max_domains": 120, "attack.enabled": False, "bab.batch_size": 16},
    "kfsb": {"bab.branching": "kfsb", "bab.max_domains": 120, "attack.enabled": False, "bab.batch_size": 7},
    "float32": {"bab.max_domains": 120, "attack.enabled": False, "numerics.semantics": "float32"},
}


def queries(count: int) -> Iterator[tuple[str, bytes, str, np.ndarray, np.ndarray]]:
    """Name, ONNX file, property and box of every network."""
    for number in range(count):
        family, rng = FAMILIES[number % len(FAMILIES)], np.random.default_rng([7, number])
        options = {"n_in": 3, "depth": 2, "width": 8} if family in ("relu", "piecewise") else {}
        model = networks.random_network(rng, family, **options)
        yield f"{number} {family}", model.SerializeToString(), *_with_property(rng, model)


def _with_property(rng: np.random.Generator, model: Any) -> tuple[str, np.ndarray, np.ndarray]:
    """A threshold a little below the least value that is found: most searches have something to do."""
    runtime = truth.Runtime(model)
    n_in, n_out = runtime.n_in, runtime.one(np.zeros(runtime.n_in)).size
    middle = rng.uniform(-0.5, 0.5, n_in)
    radius = float(rng.choice([0.1, 0.5, 1.0]))
    low, high = ((middle + s * radius).astype(np.float32).astype(np.float64) for s in (-1, 1))
    row = search.random_row(rng, n_out, n_in)
    point = truth.minimise(lambda x: search.of_floats(row, x, runtime.one(x)), low, high, rng, 200).point
    least = Fraction(search.of_floats(row, point, runtime.one(point)))
    below = (abs(least) + 1) * Fraction(float(rng.choice([1e-4, 0.01, 0.05, 0.3])))
    formula = search.compared(rng, row, least, -below)
    text = formulas.declarations(n_in, n_out) + search.box_text(low, high) + f"(assert {formula})\n"
    return text, low, high


def record(model: bytes, text: str, low: np.ndarray, high: np.ndarray, ranks: int) -> dict[str, Any]:
    """Everything of one network."""
    import verifier
    from verifier.core.errors import VerifierError
    from verifier.frontend.network import load_network

    with tempfile.TemporaryDirectory() as folder:
        network, property = Path(folder) / "net.onnx", Path(folder) / "prop.vnnlib"
        network.write_bytes(model)
        property.write_text(text)
        out: dict[str, Any] = {}
        shape = load_network(network).input_shape
        for method in ("ibp", "crown", "alpha-crown"):
            try:
                found = verifier.compute_bounds(
                    network, low.reshape(shape), high.reshape(shape), method, return_intermediate=True, config=_BASE
                )
                tensors = {**found.intermediate, "output": (found.lower, found.upper)}
                out[method] = {name: [_bits(t) for t in pair] for name, pair in tensors.items()}
            except VerifierError as error:
                out[method] = type(error).__name__
        for name, settings in SEARCHES.items():
            out[name] = _answer(network, property, {**_BASE, **settings})
        if ranks > 1:
            several = {**_BASE, **SEARCHES["babsr"], "parallel.ranks": ranks}
            for backend in ("single", "fsdp"):
                answer = _answer(network, property, {**several, "parallel.backend": backend})
                out[f"{ranks} ranks, {backend}"] = {k: answer[k] for k in ("verdict", "covers") if k in answer}
        return out


def _bits(tensor: Any) -> str:
    """The numbers of a tensor in hexadecimal, or a hash of many."""
    values = np.asarray(tensor.double()).reshape(-1)
    if values.size <= 4:
        return " ".join(float(v).hex() for v in values)
    return f"{values.size} {hashlib.sha256(values.tobytes()).hexdigest()[:24]} {float(values.min()).hex()}"


def _answer(network: Path, property: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    import verifier
    from verifier.core.errors import VerifierError
    from verifier.solver import pipeline

    try:
        # How far a proof is strengthened afterwards is a matter of time.
        with mock.patch.object(pipeline._Run, "strengthen", lambda run: None):
            result = verifier.verify(network, property, dict(settings))
    except VerifierError as error:
        return {"verdict": type(error).__name__, "reason": str(error).replace(str(network), "NETWORK")}
    covers = {k: getattr(result.covers, k) for k in ("real", "float32", "margin", "error")}
    covers = {k: v.hex() if isinstance(v, float) else v for k, v in covers.items()}
    witness = None if result.witness is None else [float(v).hex() for v in result.witness.inputs]
    return {
        "verdict": result.verdict.value,
        "reason": result.reason,
        "covers": covers,
        "witness": witness,
        "statistics": json.loads(json.dumps(_hexed(_steady(result.statistics)))),
    }


def _steady(value: Any) -> Any:
    """Statistics without what a clock decides."""
    if isinstance(value, Mapping):
        return {k: _steady(v) for k, v in value.items() if "second" not in k and "rate" not in k}
    return [_steady(v) for v in value] if isinstance(value, list | tuple) else value


def _hexed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _hexed(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_hexed(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Where two records differ, in words."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{where} / {key}" if where else key)
    elif before != after:
        yield f"{where}: {str(before)[:160]} -> {str(after)[:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=20, help="networks")
    parser.add_argument("--ranks", type=int, default=2, help="1: nothing by several ranks")
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    held = json.loads(given.file.read_text()) if given.action == "compare" else {}
    count, ranks = held.get("count", given.count), held.get("ranks", given.ranks)
    found = {name: record(*query, ranks) for name, *query in queries(count)}
    if given.action == "write":
        given.file.write_text(json.dumps({"count": count, "ranks": ranks, "networks": found}, indent=1) + "\n")
        print(f"{len(found)} networks recorded")
        return 0
    lines = [f"{name}: {line}" for name, new in found.items() for line in differences(held["networks"][name], new)]
    print("\n".join([*lines, f"{len(found)} networks compared, {len(lines)} differences"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
