"""Settings that choose a path through the verifier, and limits inside it that small networks would never reach.

A *path* makes a threshold of the code small (or a shortcut unavailable), so that a network of ten neurons takes the way
of one with ten million. All of them leave every verdict as it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from verifier.core.device import facts

Settings = dict[str, Any]

# Devices that hold few boxes at once.
_SMALL = {kind: replace(facts(kind), box_batch_bytes=4096) for kind in ("cpu", "cuda")}
# Name of a path: the attributes it changes.
PATHS: dict[str, list[tuple[str, str, Any]]] = {
    # Refinements of the hidden bounds begin at once and come often.
    "early refinement": [("verifier.bab.refine", "_FIRST", 0.02), ("verifier.bab.refine", "_GROWTH", 2.0)],
    # Learning from refuted phases after the first search, however little it promises.
    "patient learning": [
        ("verifier.bab.refine", "_LEARNING", 0),
        ("verifier.bab.refine", "_FIRST", 0.02),
        ("verifier.bab.learning.attempt", "_SLICE", 1_000_000),
    ],
    # Neuron splits on the graph itself.
    "no compact network": [("verifier.bab.compact", "_MOST_NUMBERS", 0)],
    # Every proof in float64.
    "float64": [
        ("verifier.bab.sweeps", "float32_suffices", lambda *_, **__: False),
        ("verifier.bounds.crown", "float32_has_error_bounds", lambda *_, **__: False),
    ],
    # Windows on planes of any size, long sums from few terms on, blocks of few rows.
    "small windows": [("verifier.graph.linear_forms", "_SMALLEST_PLANE", 1)],
    "long sums": [("verifier.bounds.walk", "_LONG_SUM", 2), ("verifier.core.sums", "BLOCK", 3)],
    "small batches": [("verifier.core.device", "_KINDS", _SMALL)],
    "many splits": [
        ("verifier.bab.sweeps", "_SUBTREE", 8),
        ("verifier.bab.input_split", "_SPLITS_PER_ROUND", 6),
        ("verifier.bab.value_split", "_MOST_DEPTH", 6),
    ],
    "early recordings": [("verifier.bab.recordings", "_AFTER", 1)],
    # Children of value splits start from the root's parameters.
    "nothing kept": [("verifier.bab.value_split", "_KEPT_BYTES", 0)],
}


@contextmanager
def taken(paths: Sequence[str]) -> Iterator[None]:
    """Within it the paths are taken; one whose attribute is gone is an error, so that none is lost unnoticed."""
    with ExitStack() as stack:
        for name in paths:
            for module, attribute, value in PATHS[name]:
                stack.enter_context(mock.patch.object(importlib.import_module(module), attribute, value))
        yield


def random_paths(rng: np.random.Generator) -> tuple[str, ...]:
    if rng.random() < 0.3:
        return ()
    names = list(PATHS)
    return tuple(sorted(str(n) for n in rng.choice(names, int(rng.integers(1, 3)), replace=False)))


def random_settings(rng: np.random.Generator, device: str, domains: int = 400) -> Settings:
    """Some settings away from their defaults, the attack mostly off so that proofs are what is tried.

    Args:
        domains: about how many domains a search may take.
    """
    out: Settings = {"device": device, "attack.enabled": bool(rng.random() < 0.2), "threads": 1}

    def maybe(key: str, values: Sequence[Any], chance: float = 0.3) -> None:
        if rng.random() < chance:
            out[key] = values[int(rng.integers(0, len(values)))]

    maybe("bab.branching", ["babsr", "kfsb", "input", "kfsb"], 0.8)
    maybe("bab.input_split", ["smart", "longest"])
    maybe("bab.batch_size", [1, 2, 7, 64])
    maybe("bab.iterations", [0, 1, 5])
    maybe("bab.candidates", [1, 2, 5])
    maybe("bab.probes", [0, 2, 5], 0.4)
    maybe("bab.leaf_lp", [False], 0.15)
    maybe("bab.value_splits", [False], 0.1)
    maybe("bab.clip", [False], 0.2)
    maybe("bab.cuda_graphs", [False])
    maybe("bounds.method", ["ibp", "crown", "alpha-crown"], 0.4)
    maybe("bounds.alpha.iterations", [0, 2, 10])
    maybe("bounds.alpha.intermediate_iterations", [0, 2, 10])
    maybe("memory.chunk_bytes", [256, 2048, 65536])
    maybe("parallel.stream", [64, 256, 4096], 0.1)
    maybe("parallel.offload", [True], 0.1)
    maybe("parallel.prefetch", [False], 0.1)
    maybe("seed", [1, 2, 3])
    # Refinements come only where domains have no limit; the time limit ends those searches.
    maybe("bab.max_domains", [domains // 8, domains, 2 * domains], 0.75)
    if out["attack.enabled"]:
        out |= {"attack.restarts": 10, "attack.steps": 10}
    return out


def plain(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("threads", "device")) or "defaults"
