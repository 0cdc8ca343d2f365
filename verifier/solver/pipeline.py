"""The way of one query, top-down: parity, attack, root bounds, attack again, search.

``unsat`` is answered only when every case is refuted by a positive proof and the graph agrees with the reference
network; ``sat`` only with a witness that was replayed in the reference.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from verifier.attack import methods
from verifier.attack.attacks.runs import run_candidates
from verifier.attack.race import hunt
from verifier.attack.target import Target
from verifier.bab.relu_split import SearchResult
from verifier.bab.statistics import SearchTotals
from verifier.config import AttackConfig, Config
from verifier.core import plugins
from verifier.core.claims import Claims, Covered, Semantics
from verifier.core.deadline import Deadline
from verifier.core.errors import DeadlineExceeded, MemoryExceeded, RankFailed, UnsupportedError
from verifier.core.handles import WeightStore
from verifier.core.inventory import Inventory
from verifier.core.memory import out_of_memory
from verifier.core.problem import Problem
from verifier.core.progress import Progress
from verifier.core.result import Covers, Result, Verdict, Witness
from verifier.core.runtime import RunModel
from verifier.frontend.network import Network, parity
from verifier.frontend.runtime import not_covered, optimised_not_covered, run_model
from verifier.parallel.backends import placement
from verifier.parallel.stores import Resident
from verifier.parallel.world import World, solo
from verifier.proof.writer import Proof
from verifier.solver import proofs
from verifier.solver.counts import SearchKind, entry
from verifier.solver.phases import (
    Begin,
    BoundRoot,
    CoverRuns,
    DeepenRoot,
    LookAtNeurons,
    Memory,
    RankState,
    SplitInputs,
    SplitNeurons,
    splits_values,
)
from verifier.solver.ranks import broadcast_end, broadcast_query, run_on_all
from verifier.solver.root import Root
from verifier.solver.setup import cpu_threads, device_of, set_up
from verifier.solver.strategy import (
    LEAST_LOOK,
    Features,
    features,
    first_look,
    open_boxes,
    quick,
    search_plan,
    starts_on_host,
)
from verifier.spec.replay import replay

Step = Callable[[RankState], None]
_HOST = torch.device("cpu")
_LOG = logging.getLogger(__name__)
# The share of the time that is left which root bounds may take when a search follows.
_ROOT_SHARE = 0.5
# The share of the time that is left which a first look at neurons may take.
_LOOK_SHARE = 1 / 6
# Seconds that nothing optional is begun in.
_SPARE_SECONDS = 0.1


def solve(
    network: Network,
    problem: Problem,
    config: Config,
    deadline: Deadline,
    progress: Progress,
    world: World | None = None,
    wanted: proofs.Wanted | None = None,
) -> Result:
    """Answer one query.

    Args:
        network: the graph and its reference (onnxruntime or the module).
        deadline: one clock for everything.
        world: the ranks of the job, this one being the first; default this process alone.
        wanted: a proof file, which is there in the end when the verdict is ``unsat``.

    Returns:
        the verdict with its reason; never raises for time or memory.
    """
    world = world or solo(device_of(config))
    problem = problem.typed(network.input_dtype)
    proof = None
    if wanted is not None:
        config = proofs.settings(config)
        proof = proofs.begin(wanted, network, problem, config, world.size)
    run = _Run(network, problem, config, deadline, progress, world, proof=proof)
    try:
        with world.explained(), cpu_threads(network.graph, config, world.local_size):
            try:
                run.search(run.begin())
                run.strengthen()
            except DeadlineExceeded as error:
                run.stop(Verdict.TIMEOUT, str(error))
            except (MemoryExceeded, torch.OutOfMemoryError) as error:
                run.stop(Verdict.UNKNOWN, f"out of memory: {error}")
                run.desynchronised = run.state is not None
            run.finish()
    except RankFailed as error:
        run.lost(error)
    finally:
        run.write_proof()
    return run.result()


@dataclass
class _Run:
    """One query on its way; every phase is a method that fits on a screen."""

    network: Network
    problem: Problem
    config: Config
    deadline: Deadline
    progress: Progress
    world: World
    proof: Proof | None = None
    witness: Witness | None = None
    spare: Witness | None = None  # it lies in a box rounded to nearest, but not in the exact one
    attacking: bool = False
    verdict: Verdict = Verdict.UNKNOWN
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    searches: dict[SearchKind, SearchTotals] = field(default_factory=dict)
    mismatch: str | None = None
    compared: dict[str, Any] | None = None  # what parity looked at
    open: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    state: RankState | None = None
    memory: list[Inventory] | None = None
    desynchronised: bool = False  # whether other ranks may be in the middle of a phase
    model: RunModel | None = None
    uncovered: str = ""  # why no run is covered
    covered: Covered = field(default_factory=Covered)
    strong: Covered = field(default_factory=Covered)  # the same without the parts that a search can go on with
    real: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # open cases, refuted but for runs
    stands: tuple[str, Covered] | None = None  # reason and cover of a proof that is being strengthened
    hunts: int = 0  # attacks between searches so far
    points: list[np.ndarray] = field(default_factory=list)  # minimisers of what looks have left open
    began: float = field(default_factory=time.monotonic)

    def begin(self) -> Iterable[Step]:
        """Set the query up; the steps to its answer."""
        self._look_at_runs()
        self.open = np.arange(self.problem.n_cases)
        if not self.open.size:
            self._proved("no case is left: the unsafe set is empty")
            return ()
        broadcast_query(self.world, self.network.graph, self.problem, self.config)
        found = features(self.network.graph, self.problem)
        host = starts_on_host(found, self.config, self.world.device, self.world.size)
        self._set_up(solo(_HOST) if host else self.world)
        return self._steps(found, host)

    def _look_at_runs(self) -> None:
        """What is known of float32 runs of this network.

        Raises:
            UnsupportedError: the proof is to hold for runs, and nothing is known of them.
        """
        self.model = run_model()
        self.uncovered = not_covered(self.network, self.model) or ""
        if not self.config.numerics.certify:
            self.uncovered = "numerics.certify is off"
        if self.proof is not None:
            self.uncovered = "a proof file speaks of the network in real arithmetic"
        if self.uncovered and self.config.numerics.semantics == "float32":
            raise UnsupportedError(f"numerics.semantics is float32, but {self.uncovered}")

    def _claims(self) -> Claims:
        """What bounds are made to hold for from the beginning."""
        if self.config.numerics.semantics == "float32":
            return Claims(Semantics.FLOAT32, self.model)
        return Claims() if self.uncovered else Claims(Semantics.BOTH, self.model)

    def search(self, steps: Iterable[Step]) -> None:
        """Step after step, until nothing is open or a counterexample is found."""
        if self.verdict is not Verdict.UNKNOWN:
            return
        for step in steps:
            assert self.state is not None
            step(self.state)  # which may move the query
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

    def _set_up(self, world: World) -> RankState:
        """The network where the ranks of a job want it, checked against the reference there."""
        with self._phase("set-up"):
            setup = set_up(self.network.graph, self.config, world)
            asked = self.problem if self.proof is None else proofs.question(self.problem)
            state = RankState(asked, self.config, world, setup, self.deadline, self.progress, self._accept)
            state.proof = self.proof
            if self.config.attack.enabled and world.size == 1:
                state.hunt = partial(self._hunt, state)
            self.state = state
            run_on_all(state, Begin(self._claims()))
            self.mismatch = self.mismatch or self._parity(state)
        return state

    def _steps(self, found: Features, host: bool) -> Iterator[Step]:
        """Cheap things first: a quick attack and a first look at the bounds settle most queries.

        Args:
            host: the query begins on the CPU and moves to its device for what the first look leaves.
        """
        attack, search = self.config.attack.enabled, self.config.bab.enabled
        if attack:
            yield partial(self._attack, config=quick(self.config.attack))
        assert self.state is not None
        plan = search_plan(found, self.config, splits_values(self.state))
        thorough = partial(self._attack, config=self.config.attack)
        if plan.inputs and search:
            if attack:
                boxes = first_look(found)  # no more than a few where inputs are not what is split first after that
                boxes = min(boxes, LEAST_LOOK) if plan.before else boxes
                yield partial(self._split_inputs, share=1.0, domains=boxes)
                if host:
                    yield self._move
                if not plan.before:
                    yield thorough
            if plan.neurons or plan.before:  # what a search can be spared is known after its root bounds
                yield self._bound
            if plan.before:
                yield self._look_at_neurons
                if attack:
                    yield thorough
                yield self._deepen
                yield partial(self._split_neurons, share=plan.before)
            yield partial(self._split_inputs, share=plan.inputs, domains=None)
            if not plan.neurons:
                return
        else:
            yield self._bound
            if search:
                yield self._look_at_neurons
        if attack:
            yield thorough
        yield self._deepen
        if search and plan.neurons:
            yield self._split_neurons

    # -- steps ------------------------------------------------------------------------------------------------------

    def _move(self, state: RankState) -> None:
        """From the CPU to the device of the job."""
        self._set_up(self.world)

    def _own(self, state: RankState) -> tuple[WeightStore, torch.device]:
        """All weights for this rank alone, and where they are: the host when they are shared with other ranks."""
        setup = state.setup
        if self.world.size == 1 or placement(self.config).replicated:
            return setup.backend.weights, setup.backend.device
        host = Resident(_HOST, 0)
        for handle, tensor in self.network.graph.parameters.items():
            host.put(handle, tensor)
        return host, host.device

    def _parity(self, state: RankState) -> str | None:
        lower, upper = self.problem.witness_lower, self.problem.witness_upper
        found = parity(self.network, self._own(state)[0], lower, upper, self.config.seed, self.deadline)
        self.compared = found.record
        return found.mismatch

    def _attack(self, state: RankState, config: AttackConfig) -> None:
        """Look for a counterexample, also near the minimisers of the rows that the root could not refute, and of the
        domains that a look has left open."""
        starts = (*(r.candidates for r in state.roots if r.candidates.size), *self.points)
        with self._phase("attack"), self._looking_inside():
            seed = self.config.seed + len(self.statistics)
            self.witness = methods.search(self._target(state, config, starts, seed), config.methods)

    def _target(self, state: RankState, config: AttackConfig, starts: tuple[np.ndarray, ...], seed: int) -> Target:
        """The open cases, as attacks are asked for a counterexample."""
        store, device = self._own(state)
        return Target(
            self.network.graph,
            store,
            self.problem,
            config,
            self.deadline.sub(config.time_fraction * min(self.deadline.limit, 600.0)),
            device=device,
            seed=seed,
            accept=self._accept,
            cases=self.open.tolist(),
            starts=starts,
            progress=self.progress,
        )

    def _hunt(self, state: RankState, points: np.ndarray, share: float) -> Witness | None:
        """Look for a counterexample between two searches, from points where bounds of open domains are smallest."""
        self.hunts += 1
        seed = self.config.seed + len(self.statistics) + self.hunts
        with self._looking_inside():
            try:
                self.witness = hunt(self._target(state, self.config.attack, (points,), seed), share)
            except RuntimeError as error:  # the search can do without
                if not out_of_memory(error):
                    raise
        return self.witness

    def _bound(self, state: RankState, share: float = _ROOT_SHARE) -> None:
        """Root bounds of every box. Where a search follows, a root that takes too long is cut short."""
        with self._phase("root bounds"):
            boxes, state.noted = open_boxes(self.problem, self.open), None
            earlier, later = len(state.roots), self.config.bab.enabled and splits_values(state)
            try:
                for number, cases in enumerate(boxes):
                    self.deadline.check("the root bounds")
                    each = share / (len(boxes) - number) * min(self.deadline.remaining(), 600.0)
                    seconds = each if self.config.bab.enabled else math.inf
                    root = run_on_all(state, BoundRoot(cases, self.deadline.limit, seconds, later))
                    self._took(root, cases)
            finally:
                self._note_roots(state, state.roots[earlier:], len(boxes))
            worst = self.statistics["root"]["worst"]
            self.reason = "" if worst is None else f"{self.open.size} cases are left open after the root bounds"

    def _deepen(self, state: RankState) -> None:
        """Optimise the slopes of hidden nodes where that was put off."""
        put_off = [(number, self._still(root)) for number, root in enumerate(state.roots) if root.steps]
        left = [(number, cases) for number, cases in put_off if cases.size]
        if not left:
            return
        with self._phase("root bounds"):
            try:
                for place, (number, cases) in enumerate(left):
                    self.deadline.check("the root bounds")
                    each = _ROOT_SHARE / (len(left) - place) * min(self.deadline.remaining(), 600.0)
                    self._took(run_on_all(state, DeepenRoot(number, cases, self.deadline.limit, each)), cases)
            finally:
                self._note_roots(state, state.roots, len(state.roots))

    def _took(self, root: Root, cases: np.ndarray) -> None:
        """What root bounds of some cases say of them."""
        self._close(cases, root.open)
        self._note(root.covered)
        self.real = np.union1d(self.real, root.real)

    def _still(self, root: Root) -> np.ndarray:
        """Its cases that are open."""
        return root.open[np.isin(root.open, self.open)]

    def _note_roots(self, state: RankState, roots: Sequence[Root], boxes: int) -> None:
        """What the roots of some boxes found, also where time or memory ended them."""
        now = state.noted
        worst = [float(root.gap.min()) for root in roots if root.gap.size]
        worst += [now.worst] if now is not None and now.worst is not None else []
        cuts = [root.cut for root in roots] + ([now.cut] if now is not None else [])
        cut = {
            "boxes": boxes - len(roots),
            "hidden": sum(c.hidden for c in cuts),
            "slopes": sum(c.slopes for c in cuts),
            "rows": sum(c.rows for c in cuts),
        }
        method = now.method if now is not None else roots[-1].method if roots else ""
        least = min(worst, default=math.inf)
        self.statistics["root"] = {
            "method": method,
            "open": int(self.open.size),
            "worst": None if least == math.inf else least,
            "cut": cut if any(cut.values()) else None,
        }

    def _split_inputs(self, state: RankState, share: float, domains: int | None) -> None:
        limits = [n for n in (domains, self.config.bab.max_domains) if n is not None]
        bab = self.config.bab.model_copy(update={"max_domains": min(limits, default=None)})
        seconds = math.inf if share == 1.0 else share * min(self.deadline.remaining(), 600.0)
        with self._phase("branch and bound on inputs"):
            ended = run_on_all(state, SplitInputs(self.open, bab, seconds))
            self._count("input_split", ended.totals)
            self.witness, self.open, self.reason = ended.witness, np.asarray(ended.open), ended.reason
            self._note(ended.covered)

    def _look_at_neurons(self, state: RankState) -> None:
        """What a short search closes before more is spent on it, box by box until the first that it does not close."""
        with self._phase("branch and bound on neurons"):
            for number, root in enumerate(state.roots):
                cases = self._still(root)
                if not cases.size or root.rows is None:
                    continue
                self.deadline.check()
                seconds = _LOOK_SHARE * min(self.deadline.remaining(), 600.0)
                try:
                    ended = run_on_all(state, LookAtNeurons(number, cases, seconds))
                except DeadlineExceeded:  # that of the look; the next step asks whether the query's time is over
                    return
                if ended is not None and ended.points is not None:
                    self.points.append(ended.points)
                if ended is None or not self._searched(state, root, ended):
                    return

    def _split_neurons(self, state: RankState, share: float = 1.0) -> None:
        """Box by box.

        Args:
            share: of the time that is left; when it is not all, boxes that stay open are left to another search.
        """
        with self._phase("branch and bound on neurons"):
            for number, root in enumerate(state.roots):
                cases = self._still(root)
                if not cases.size:
                    continue
                self.deadline.check()
                if root.rows is None:
                    self.reason = "the configured bounds leave rows open and have no slopes to search with"
                    return
                each = share / (len(state.roots) - number) * min(self.deadline.remaining(), 600.0)
                try:
                    ended = run_on_all(state, SplitNeurons(number, cases, math.inf if share == 1.0 else each))
                except DeadlineExceeded:
                    if share == 1.0:
                        raise
                    return
                if not self._searched(state, root, ended) and (self.witness is not None or share == 1.0):
                    return

    def _searched(self, state: RankState, root: Root, ended: SearchResult) -> bool:
        """What a search of neurons of one box found; whether it closed it."""
        self._count("value_split" if splits_values(state) else "relu_split", ended.totals)
        self.witness, self.reason = ended.witness, ended.reason
        if ended.witness is not None:
            return False
        if ended.open:
            left = ended.totals.statistics
            worst = left.worst if left.open else 0.0
            self.reason = f"{ended.reason}: {ended.open} domains are left open, final gap {worst:.6g}"
            return False
        self._note(ended.covered, None if ended.weak is None else ended.weak.covered)
        self._close(root.open, np.zeros(0, np.int64))
        return True

    def _note(self, covered: Covered, strong: Covered | None = None) -> None:
        """What closings hold for.

        Args:
            strong: those that a search for runs need not go on with; default all.
        """
        self.covered.add(covered)
        self.strong.add(covered if strong is None else strong)

    def _count(self, kind: SearchKind, totals: SearchTotals) -> None:
        """Add what one more search of a kind did."""
        self.searches[kind] = totals.after(self.searches.get(kind))
        self.statistics[kind] = entry(kind, self.searches[kind])

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def _accept(self, x: np.ndarray) -> Witness | None:
        """The judge of candidates. While an attack runs, it goes on looking for a point of the exact box."""
        found = replay(self.network, self.problem, x, exact=True)
        if found is None and self.spare is None:
            self.spare = self.world.witness = replay(self.network, self.problem, x)
        if found is None and not self.attacking:
            found = self.spare
        if found is not None:
            self.witness = self.world.witness = found  # it stands, whatever happens to other ranks from here on
        return found

    @contextmanager
    def _looking_inside(self) -> Iterator[None]:
        """An attack, after which a point that is only in the box rounded to nearest has to do."""
        self.attacking = True
        try:
            yield
        finally:
            self.attacking = False
            self.witness = self.witness or self.spare

    def _close(self, cases: np.ndarray, still: np.ndarray) -> None:
        """Drop the refuted ones among ``cases``."""
        self.open = self.open[~np.isin(self.open, np.setdiff1d(cases, still))]

    def _proved(self, reason: str) -> None:
        if self.mismatch is not None:
            self.stop(Verdict.ERROR, f"the graph does not agree with the reference network: {self.mismatch}")
            return
        if self.config.numerics.semantics == "float32":
            self._look_at_optimised()
            missing = self._not_covered()
            if missing:
                self.stop(Verdict.UNKNOWN, f"what is proved does not hold for float32 runs: {missing}")
                return
        self.stop(Verdict.UNSAT, reason)

    def finish(self) -> None:
        """Everyone says what it took, and goes."""
        if self.desynchronised and self.world.size > 1:
            return
        if self.state is not None:
            self.memory = run_on_all(self.state, Memory())
        broadcast_end(self.world, self.result())

    def lost(self, error: RankFailed) -> None:
        """A rank is gone: nothing more is proved; a witness stands, and so does a proof that was complete."""
        if self.stands is not None and self.witness is None:
            self._fall_back(*self.stands)
            return
        self.stop(Verdict.UNKNOWN if self.world.heartbeat.memory else Verdict.ERROR, str(error))

    def stop(self, verdict: Verdict, reason: str) -> None:
        if self.witness is not None:
            verdict = Verdict.SAT
        elif verdict in (Verdict.UNKNOWN, Verdict.TIMEOUT) and self._real_proof():
            self._note(Covered(weak=int(self.open.size)))
            self._proved("every case is refuted by a certified bound")
            return
        if verdict is Verdict.UNKNOWN and self.deadline.expired():
            verdict = Verdict.TIMEOUT
        self.verdict, self.reason = verdict, reason

    def result(self) -> Result:
        certified = self.verdict is Verdict.UNSAT and self.config.numerics.certify
        witness = self.witness if self.verdict is Verdict.SAT else None
        if witness is not None:
            shapes = self.network.input_shape, self.network.output_shape
            witness = replace(witness, input_shape=shapes[0], output_shape=shapes[1])
        memory = None if self.memory is None else {"ranks": [rank.entry() for rank in self.memory]}
        device = (self.state.setup.backend if self.state else self.world).device.type
        figures = self.statistics if self.compared is None else {"parity": self.compared, **self.statistics}
        figures = {**figures, "plugins": self._plugins()} if self._plugins() else figures
        return Result(
            self.verdict, self.reason, witness, certified, self.seconds, figures, memory, device, self._covers()
        )

    def _plugins(self) -> list[dict[str, str]]:
        """What other packages have brought to this query so far, as it stands in a record."""
        found = dict.fromkeys((*self.network.plugins, *plugins.taking_part()))
        return [plugin.entry() for plugin in found]

    def _covers(self) -> Covers:
        """What the proof holds for."""
        if self.verdict is not Verdict.UNSAT or not self.config.numerics.certify:
            return Covers()
        found, reason = self.covered, self._not_covered()
        name = self.model.name if self.model is not None else ""
        margin = found.margin if math.isfinite(found.margin) else None
        return Covers(True, not reason, name, reason, margin, found.error if name and not self.uncovered else None)

    def _not_covered(self) -> str:
        """Why what was closed does not hold for runs, one phrase; empty when it does."""
        if self.uncovered:
            return self.uncovered
        if self.covered.overflow:
            return "values of the network may be too large for float32's range"
        weak = self.covered.weak
        return f"{weak} parts of the problem are refuted for the network in real arithmetic alone" if weak else ""

    def write_proof(self) -> None:
        """The proof file, if one is asked for; meanwhile the verdict stands."""
        if self.proof is None:
            return
        proved = self.verdict is Verdict.UNSAT
        if proved:
            self.progress.standing(self.result())
        with self._phase("proof file"):
            self.statistics["proof"] = proofs.end(self.proof, proved)

    # -- runs -------------------------------------------------------------------------------------------------------

    def _real_proof(self) -> bool:
        """Whether all that is open is refuted for the network in real arithmetic."""
        real = self.config.numerics.semantics == "real" and self.open.size
        return bool(real) and bool(np.isin(self.open, self.real).all())

    def _look_at_optimised(self) -> None:
        """What onnxruntime's optimised graph adds to what is known of runs. It takes about as long as set-up did, where
        the same graph was made."""
        if self.uncovered or self.state is None or self.network.file is None:
            return
        if self.deadline.remaining() < _SPARE_SECONDS + 2 * self.seconds.get("set-up", 0.0):
            self.uncovered = "no time was left for a look at onnxruntime's optimised graph"
            return
        try:
            self.uncovered = optimised_not_covered(self.network) or ""
        except Exception as error:  # a proof does not hang on it
            self.uncovered = f"onnxruntime's optimised graph could not be looked at ({type(error).__name__})"

    def strengthen(self) -> None:
        """Have an ``unsat`` cover float32 runs too, or find the run that violates it, for as long as it took to prove
        and for at most half of the time that is left; meanwhile it stands, whatever happens."""
        if self.verdict is not Verdict.UNSAT or not self.config.numerics.certify:
            return
        if self.config.numerics.semantics == "float32":
            return
        self._look_at_optimised()
        state, spent = self.state, time.monotonic() - self.began
        seconds = min(spent, 0.5 * self.deadline.remaining())
        if (
            state is None
            or not self.covered.weak
            or self.covered.overflow
            or self.uncovered
            or seconds < _SPARE_SECONDS
        ):
            return
        self.progress.standing(self.result())
        self.stands, first = (self.reason, self.covered), self.deadline
        self.verdict, self.covered = Verdict.UNKNOWN, Covered()  # only a proof for runs changes what is claimed
        try:
            self._again(state, first.sub(seconds))
        except DeadlineExceeded:
            pass
        except RankFailed:
            raise
        except Exception as error:
            _LOG.info("note: the proof was not strengthened (%s: %s)", type(error).__name__, error)
            self.desynchronised = True
        self.deadline = state.deadline = first
        if self.witness is not None:
            self.verdict, self.reason = Verdict.SAT, "a counterexample was replayed in the reference network"
        elif self.verdict is not Verdict.UNSAT or self._not_covered():
            self._fall_back(*self.stands)
        self.stands = None

    def _fall_back(self, reason: str, covered: Covered) -> None:
        """To a proof of the network in real arithmetic."""
        self.verdict, self.reason, self.covered, self.open = Verdict.UNSAT, reason, covered, self.open[:0]

    def _again(self, state: RankState, deadline: Deadline) -> None:
        """Close for runs what is closed for the real network alone; else the whole query once more, for runs."""
        self.deadline = state.deadline = deadline
        candidates = [r.candidates for r in state.roots if r.candidates.size]
        if self.config.attack.enabled and self._run_violates(candidates):
            return
        if not self.strong.weak:
            self._go_on(state)
            return
        self.open, self.real = np.arange(self.problem.n_cases), self.real[:0]
        run_on_all(state, Begin(Claims(Semantics.FLOAT32, self.model)))
        found = features(self.network.graph, self.problem)
        self.search(self._steps(found, host=False))

    def _go_on(self, state: RankState) -> None:
        """Every search with the domains that it closed for the real network alone."""
        with self._phase("branch and bound on neurons"):
            covered = replace(self.strong)
            for number in range(len(state.weak)):
                ended = run_on_all(state, CoverRuns(number))
                self._count("relu_split", ended.totals)
                self.witness = ended.witness
                if ended.witness is not None or ended.open:
                    return
                covered.add(ended.covered)
        assert self.stands is not None
        self.covered, self.verdict, self.reason = covered, Verdict.UNSAT, self.stands[0]

    def _run_violates(self, candidates: list[np.ndarray]) -> bool:
        """Whether a run near the points where bounds are smallest, or at random ones, is a counterexample."""
        with self._phase("runs"):
            for x in run_candidates(self.problem, candidates, self.config.seed):
                if self.deadline.expired() or self._accept(x) is not None:
                    break
        return self.witness is not None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name)
        if self._plugins():  # for the record of a query that is cut off; figures are numbers and texts
            self.progress.update(plugins=json.dumps(self._plugins()))
        self.world.heartbeat.phase(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
