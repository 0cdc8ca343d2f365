"""One network and many labelled inputs: the questions that can be asked of them, quickly in batches or one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from verifier.api import Terms, answer
from verifier.config import Config
from verifier.core.deadline import Deadline
from verifier.core.errors import ConfigError, InputError
from verifier.core.problem import Problem
from verifier.core.result import Result, Witness
from verifier.spec.build import robustness

if TYPE_CHECKING:
    from torch import Tensor

    from verifier.frontend.network import Network
    from verifier.solver.setup import Setup

# Boxes that the graph is compared with the reference for at once.
_PARITY_BOXES = 256


@dataclass(frozen=True, eq=False)
class Questions:
    """Is every point within a radius of an input classified like its label?

    Attributes:
        inputs: (N, n_in), float64.
        labels: (N,).
        clip: range of valid inputs, or None.
    """

    network: Network
    inputs: np.ndarray
    labels: np.ndarray
    clip: tuple[float, float] | None
    config: Config

    def __post_init__(self) -> None:
        n, classes = self.network.n_in, self.network.n_out
        if self.inputs.ndim != 2 or self.inputs.shape[1] != n:
            raise InputError(f"an input has {self.inputs[0].size} numbers but the network takes {n}")
        if classes < 2:
            raise InputError("the network has one output; a classifier has one for every class")
        if self.labels.shape != (len(self.inputs),):
            raise InputError(f"there are {self.labels.size} labels for {len(self.inputs)} inputs; give one each")
        if ((self.labels < 0) | (self.labels >= classes)).any():
            raise InputError(f"a label is outside 0 to {classes - 1}, the classes of the network")
        if not self.config.numerics.certify:
            raise ConfigError("numerics.certify is off; what is certified needs it")
        if self.config.parallel.ranks not in (1, "auto"):
            raise ConfigError("parallel.ranks: data sets are certified by one process; leave it at 1")

    def problem(self, index: int, epsilon: float) -> Problem:
        """The question about one input and radius."""
        label = int(self.labels[index])
        return robustness(self.inputs[index], epsilon, label, self.network.n_out, self.clip)

    def ask(self, index: int, epsilon: float, timeout: float | None) -> Result:
        """The answer of ``verify``."""
        deadline = Deadline(timeout)
        return answer(self.network, self.problem(index, epsilon), self.config, Terms(deadline))

    def replayed(self, index: int, epsilon: float, x: np.ndarray) -> Witness | None:
        """A counterexample that the reference network confirms."""
        from verifier.spec.replay import replay

        return replay(self.network, self.problem(index, epsilon), x, self.network.input_dtype)

    def predictions(self) -> np.ndarray:
        """What the network itself says of the inputs, (N,)."""
        return self.network.evaluate(self.inputs.astype(self.network.input_dtype)).argmax(1)

    @property
    def quick_counts(self) -> bool:
        """Whether batched bounds prove what is asked: they hold for the network in real arithmetic."""
        return self.config.numerics.semantics != "float32"

    def quick(self, pairs: Sequence[tuple[int, float]], deadline: Deadline) -> np.ndarray:
        """(P,) bool: which pairs of input and radius CROWN bounds of a batch certify.

        What counts is what counts for ``verify``: certified bounds of the box rounded outward, and a graph that agrees
        with the reference at points of these boxes.

        Raises:
            DeadlineExceeded: time ran out.
        """
        if not pairs or not self.quick_counts:
            return np.zeros(len(pairs), dtype=bool)
        problems = [self.problem(*pair) for pair in pairs]
        labels = self.labels[[index for index, _ in pairs]]
        with self._at_work() as setup:
            found = [
                self._quick(setup, problems[i : i + _PARITY_BOXES], labels[i : i + _PARITY_BOXES], deadline)
                for i in range(0, len(pairs), _PARITY_BOXES)
            ]
        return np.concatenate(found)

    def _quick(self, setup: Setup, problems: Sequence[Problem], labels: np.ndarray, deadline: Deadline) -> np.ndarray:
        from verifier.bounds.batches import batch_size, batches, bound_rows, bound_state
        from verifier.bounds.crown import Specification
        from verifier.bounds.engine import Engine
        from verifier.core.numerics import proved
        from verifier.frontend.network import parity
        from verifier.solver.boxes import boxes_on, method_of

        typed = [problem.typed(self.network.input_dtype) for problem in problems]
        low, up = (np.concatenate([getattr(p, name) for p in typed]) for name in ("witness_lower", "witness_upper"))
        if parity(self.network, setup.backend.weights, low, up, self.config.seed, deadline).mismatch is not None:
            return np.zeros(len(problems), dtype=bool)  # verify says so
        low, up = (np.concatenate([getattr(p, name) for p in problems]) for name in ("lower", "upper"))
        engine, method = Engine(setup.graph, setup.backend, deadline), method_of(self.config, "crown", True)
        out = np.zeros(len(problems), dtype=bool)
        for part in batches(len(problems), batch_size(setup.graph, setup.backend.chunk_bytes)):
            state = bound_state(engine, boxes_on(engine, low[part], up[part]), method)
            rows = self._rows(labels[part]).to(setup.backend.device)
            lower = bound_rows(engine, state, Specification(rows), method).lower
            out[part] = proved(lower, lower.new_zeros(())).all(1).cpu().numpy()
        return out

    def attack(self, pairs: Sequence[tuple[int, float]], deadline: Deadline) -> list[Witness | None]:
        """For every pair a counterexample that a short attack on all of them found and the reference confirmed.

        Raises:
            DeadlineExceeded: time ran out.
        """
        import torch

        from verifier.attack.batched import margin_candidates

        out: list[Witness | None] = []
        wide = torch.float64 if self.network.input_dtype == np.float64 else torch.float32
        for start in range(0, len(pairs), _PARITY_BOXES):
            some = pairs[start : start + _PARITY_BOXES]
            problems = [self.problem(*pair).typed(self.network.input_dtype) for pair in some]
            ends = (np.concatenate([getattr(p, name) for p in problems]) for name in ("witness_lower", "witness_upper"))
            labels = torch.from_numpy(self.labels[[index for index, _ in some]])
            with self._at_work() as setup:
                device = setup.backend.device
                low, up = (torch.from_numpy(end).to(device, wide) for end in ends)
                store, seed = setup.backend.weights, self.config.seed + start
                found = margin_candidates(setup.graph, store, (low, up), labels.to(device), seed, deadline)
            points, margins = found[0].cpu().numpy(), found[1].cpu().numpy()
            for pair, x, margin in zip(some, points, margins, strict=True):
                out.append(self.replayed(*pair, x) if margin <= 0 else None)
        return out

    def _rows(self, labels: np.ndarray) -> Tensor:
        """The label's output minus every other one, (B, C - 1, *output_shape)."""
        import torch

        eye = np.eye(self.network.n_out)
        rows = np.stack([np.delete(eye[label] - eye, label, axis=0) for label in labels])
        return torch.from_numpy(rows).reshape(*rows.shape[:2], *self.network.graph.output_shape)

    @contextmanager
    def _at_work(self) -> Iterator[Setup]:
        from verifier.solver.setup import cpu_threads

        with cpu_threads(self.network.graph, self.config):
            yield self._setup

    @cached_property
    def _setup(self) -> Setup:
        from verifier.solver.setup import set_up

        return set_up(self.network.graph, self.config)

    def fingerprints(self) -> list[str]:
        """One per input, of everything that its verdicts depend on but the radius."""
        whole = hashlib.sha256(self.network.sha256.encode())
        if not self.network.sha256:
            for node in self.network.graph.nodes:
                whole.update(repr((node.op, node.inputs, node.shape)).encode())
            for handle, tensor in self.network.graph.parameters.items():
                whole.update(handle.name.encode() + tensor.contiguous().numpy().tobytes())
        whole.update(repr((self.clip, self.config.numerics.semantics)).encode())
        out = []
        for x, label in zip(self.inputs, self.labels, strict=True):
            one = whole.copy()
            one.update(x.tobytes() + str(int(label)).encode())
            out.append(one.hexdigest()[:32])
        return out
