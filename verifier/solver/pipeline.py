"""The way of one query, top-down: parity, attack, root bounds, attack again, search.

``unsat`` is answered only when every case is refuted by a positive proof and the graph agrees with the reference
network; ``sat`` only with a witness that was replayed in the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from verifier.attack import pgd
from verifier.bab import input_split, relu_split
from verifier.config import AttackConfig, Config
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.inventory import Inventory, process_peak
from verifier.core.problem import Problem
from verifier.core.progress import Progress
from verifier.core.result import Result, Verdict, Witness
from verifier.frontend.network import Network, parity
from verifier.solver.place import Placed, cpu_threads, place
from verifier.solver.root import Root, bound_root
from verifier.solver.strategy import Features, features, first_look, open_boxes, quick, search_plan
from verifier.spec.replay import replay

Phase = Callable[[Placed], None]


def solve(network: Network, problem: Problem, config: Config, deadline: Deadline, progress: Progress) -> Result:
    """Answer one query.

    Args:
        network: the graph and its reference (onnxruntime or the module).
        deadline: one clock for everything.

    Returns:
        the verdict with its reason; never raises for time or memory.
    """
    run = _Run(network, problem, config, deadline, progress)
    try:
        with cpu_threads(network.graph, config):
            run.answer()
    except DeadlineExceeded as error:
        run.stop(Verdict.TIMEOUT, str(error))
    except (MemoryExceeded, torch.OutOfMemoryError) as error:
        run.stop(Verdict.UNKNOWN, f"out of memory: {error}")
    return run.result()


@dataclass
class _Run:
    """One query on its way; every phase is a method that fits on a screen."""

    network: Network
    problem: Problem
    config: Config
    deadline: Deadline
    progress: Progress
    witness: Witness | None = None
    verdict: Verdict = Verdict.UNKNOWN
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    placed: Placed | None = None
    mismatch: str | None = None
    open: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    roots: list[Root] = field(default_factory=list)

    def answer(self) -> None:
        self.open = np.arange(self.problem.n_cases)
        if not self.open.size:
            self._proved("no case is left: the unsafe set is empty")
            return
        with self._phase("set-up"):
            placed = self.placed = place(self.network.graph, self.config)
            found = features(self.network.graph, self.problem)
            self.mismatch = self._parity(placed)
        for phase in self._phases(found):
            phase(placed)
            if self.witness is not None:
                self.stop(Verdict.SAT, "a counterexample was replayed in the reference network")
                return
            if not self.open.size:
                self._proved(
                    f"every case is refuted by {'a certified' if self.config.numerics.certify else 'a float32'} bound"
                )
                return
            self.deadline.check()
        self.stop(Verdict.UNKNOWN, self.reason or f"{self.open.size} cases are left open")

    def _phases(self, found: Features) -> Iterator[Phase]:
        """Cheap things first: a quick attack and a first look at the bounds settle most queries."""
        attack, search = self.config.attack.enabled, self.config.bab.enabled
        if attack:
            yield partial(self._attack, config=quick(self.config.attack))
        inputs, neurons = search_plan(found, self.config)
        if inputs and search:
            if attack:
                yield partial(self._split_inputs, share=1.0, domains=first_look(self.network.graph))
                yield partial(self._attack, config=self.config.attack)
            yield partial(self._split_inputs, share=inputs, domains=None)
            if not neurons:
                return
        yield self._bound
        if attack:
            yield partial(self._attack, config=self.config.attack)
        if search and neurons:
            yield self._split_neurons

    # -- phases -----------------------------------------------------------------------------------------------------

    def _parity(self, placed: Placed) -> str | None:
        problem = self.problem
        return parity(
            self.network, placed.backend.weights, problem.witness_lower[0], problem.witness_upper[0], self.config.seed
        )

    def _attack(self, placed: Placed, config: AttackConfig) -> None:
        """Look for a counterexample, also near the minimisers of the rows that the root could not refute."""
        points = [r.candidates for r in self.roots if r.candidates.size]
        with self._phase("attack"):
            self.witness = pgd.search(
                self.network.graph,
                placed.backend.weights,
                self.problem,
                config,
                self.deadline.sub(config.time_fraction * min(self.deadline.limit, 600.0)),
                device=placed.backend.device,
                seed=self.config.seed + len(self.statistics),
                accept=self._accept,
                cases=self.open.tolist(),
                starts=np.concatenate(points) if points else None,
                progress=self.progress,
            )

    def _bound(self, placed: Placed) -> None:
        with self._phase("root bounds"):
            for cases in open_boxes(self.problem, self.open):
                root = placed.retry(
                    partial(
                        bound_root,
                        self.network.graph,
                        placed.backend,
                        self.problem,
                        cases,
                        self.config,
                        self.deadline.limit,
                        self.deadline,
                        lambda name: self.progress.update(step=name),
                    )
                )
                self.roots.append(root)
                self._close(cases, root.open)
            worst = [float(r.gap.min()) for r in self.roots if r.gap.size]
            self.statistics["root"] = {
                "method": self.roots[-1].method,
                "open": int(self.open.size),
                "worst": min(worst) if worst else None,
            }
            self.reason = f"{self.open.size} cases are left open after the root bounds" if worst else ""

    def _split_inputs(self, placed: Placed, share: float, domains: int | None) -> None:
        limits = [n for n in (domains, self.config.bab.max_domains) if n is not None]
        bab = self.config.bab.model_copy(update={"max_domains": min(limits, default=None)})
        deadline = self.deadline if share == 1.0 else self.deadline.sub(share * min(self.deadline.remaining(), 600.0))
        with self._phase("branch and bound on inputs"):
            ended = input_split.search(
                self.network.graph,
                placed.backend,
                self.problem,
                self.open,
                bab,
                self.config.numerics.certify,
                deadline,
                self.progress,
                self._accept,
            )
            self.statistics["input_split"] = dict(ended.statistics)
            self.witness, self.open, self.reason = ended.witness, np.asarray(ended.open), ended.reason

    def _split_neurons(self, placed: Placed) -> None:
        with self._phase("branch and bound on neurons"):
            for root in self.roots:
                if not root.open.size:
                    continue
                self.deadline.check()
                if root.rows is None:
                    self.reason = "the configured bounds leave rows open and have no slopes to search with"
                    return
                ended = relu_split.search(
                    self.network.graph,
                    placed.backend,
                    root.state,
                    root.rows,
                    self.config.bab,
                    self.deadline,
                    self.progress,
                    self._accept,
                    placed.pool_bytes,
                )
                self.statistics["relu_split"] = ended.statistics
                self.witness, self.reason = ended.witness, ended.reason
                if ended.witness is not None:
                    return
                if ended.open:
                    worst = ended.statistics["worst"]
                    self.reason = f"{ended.reason}: {ended.open} domains are left open, final gap {worst:.6g}"
                    return
                self._close(root.open, np.zeros(0, np.int64))

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _accept(self, x: np.ndarray) -> Witness | None:
        return replay(self.network, self.problem, x)

    def _close(self, cases: np.ndarray, still: np.ndarray) -> None:
        """Drop the refuted ones among ``cases``."""
        self.open = self.open[~np.isin(self.open, np.setdiff1d(cases, still))]

    def _proved(self, reason: str) -> None:
        if self.mismatch is None:
            self.stop(Verdict.UNSAT, reason)
        else:
            self.stop(Verdict.ERROR, f"the graph does not agree with the reference network: {self.mismatch}")

    def stop(self, verdict: Verdict, reason: str) -> None:
        if self.witness is not None:
            verdict = Verdict.SAT
        if verdict is Verdict.UNKNOWN and self.deadline.expired():
            verdict = Verdict.TIMEOUT
        self.verdict, self.reason = verdict, reason

    def result(self) -> Result:
        certified = self.verdict is Verdict.UNSAT and self.config.numerics.certify
        witness = self.witness if self.verdict is Verdict.SAT else None
        memory = None if self.placed is None else {"ranks": [_inventory(self.placed).entry()]}
        return Result(self.verdict, self.reason, witness, certified, self.seconds, self.statistics, memory)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


def _inventory(placed: Placed) -> Inventory:
    """What a query took. On the CPU the peak is the process's: counting tensors would slow the search down."""
    backend = placed.backend
    if backend.device.type == "cuda":
        peak, kind = int(torch.cuda.max_memory_allocated(backend.device)), "allocator"
    else:
        peak, kind = process_peak(), "rss"
    return Inventory(backend.rank, backend.weights.resident_bytes(), backend.usage, peak, kind)
