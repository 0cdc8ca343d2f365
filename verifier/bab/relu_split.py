"""Branch and bound on ReLU splits with beta-CROWN: the cases of one input box, to a proof or a counterexample.

A domain is a case of the problem plus the signs of the neurons that were split. Every round takes the worst domains,
chooses a neuron for each, bounds the two children by optimising slopes and split multipliers from the parent's values,
closes those whose bound is certified, tries the minimisers of the others as counterexamples and puts them back.

The answer is a proof only when no domain is left. A domain leaves the pool in three ways alone: its bound is certified
above the threshold, it is replaced by two children that cover it, or an LP certificate closes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from verifier.bab.branching import babsr, kfsb
from verifier.bab.leaf_lp import solve_leaf
from verifier.bab.pool import Fields, Pool
from verifier.bab.splits import SplitSpace, split_space
from verifier.bab.team import Accept, Ending, Figures, Stop, Team, every
from verifier.bounds.alpha import Optimised, Parameters, Schedule, optimise, sweep
from verifier.bounds.crown import BoundState, Specification, crown_rows, relaxations
from verifier.bounds.forms import Form
from verifier.bounds.walk import Walk, backward, concretise
from verifier.config import BabConfig
from verifier.core.backend import Group, ParallelBackend
from verifier.core.deadline import Deadline
from verifier.core.errors import MemoryExceeded
from verifier.core.memory import out_of_memory
from verifier.core.numerics import finite_lower, proved
from verifier.core.progress import Progress
from verifier.core.result import Witness
from verifier.graph.graph import Graph
from verifier.parallel.group import Solo

# Steps after which a batch is looked at: most children of a good split are closed by then.
_FIRST_STAGE = 3

# What makes a domain's children start well but is not needed to know the domain; other groups get it while it is small.
_WARM = ("alpha", "beta")
_WARM_BYTES = 64 << 10

_REASONS = {
    Stop.NONE: "undecided leaves",
    Stop.TIME: "time limit reached",
    Stop.DOMAINS: "domain limit reached",
    Stop.MEMORY: "memory for open domains used up",
}


@dataclass(frozen=True)
class CaseRows:
    """The open cases of one box.

    Attributes:
        spec: rows, (N, S, ...), float64; a case with fewer rows repeats its first.
        thresholds: float64 (N, S); a row is refuted when its bound exceeds it.
        parameters: root slopes, node index -> name -> (N, S, *shape).
    """

    spec: Specification
    thresholds: Tensor
    parameters: Parameters


@dataclass
class SearchResult:
    """How a search ended. ``open`` is the number of domains left; zero together with no witness is a proof."""

    witness: Witness | None
    open: int
    reason: str
    statistics: dict[str, Any] = field(default_factory=dict)


def search(
    graph: Graph,
    backend: ParallelBackend,
    state: BoundState,
    cases: CaseRows,
    config: BabConfig,
    deadline: Deadline,
    progress: Progress,
    accept: Accept,
    memory_limit: int,
    team: Group | None = None,
) -> SearchResult:
    """Refute all cases on one box, or find a counterexample.

    Args:
        state: root bounds (1, *shape).
        accept: replays a candidate (n_in,) and returns a witness when it is one; with several ranks it is called on the
            first rank of the first group alone.
        memory_limit: bytes that the open domains of this rank may take.
        team: this rank's peers in the other groups that take part in the search with the same arguments; default: none.
    """
    group = Solo() if team is None else team
    return _Search(graph, backend, state, cases, config, deadline, progress, accept, memory_limit, group).run()


def _rows(fields: Fields, index: Tensor | slice) -> Fields:
    """Some of the domains."""
    return {k: v[index] for k, v in fields.items()}


class _Search:
    """One search: the root's data and the pool. Every method is one step of a round."""

    def __init__(
        self,
        graph: Graph,
        backend: ParallelBackend,
        state: BoundState,
        cases: CaseRows,
        config: BabConfig,
        deadline: Deadline,
        progress: Progress,
        accept: Accept,
        memory_limit: int,
        group: Group,
    ) -> None:
        self.graph, self.backend, self.state, self.cases = graph, backend, state, cases
        self.config, self.progress = config, progress
        self.deadline = backend.together(deadline)
        self.team = Team(group, backend, accept, self.deadline, config.max_domains)
        self.accept = self.team.offer
        self.memory_limit = int(backend.agree(float(memory_limit), "min"))
        self.space: SplitSpace = split_space(graph, backend, state.bounds)
        self.rows = cases.thresholds.shape[1]
        self.batch = self._batch_size()
        self.pool = Pool()
        self.bounded = self.closed = self.leaves = self.uncertified = self.rounds = 0
        self.stuck = self.split = self.began = 0
        self.witness: Witness | None = None

    def _batch_size(self) -> int:
        """Domains per round: enough to fill the device, few enough for the caches of a CPU."""
        if self.config.batch_size != "auto":
            return self.config.batch_size
        widest = max(n.size for n in self.graph.whole.nodes) * self.rows
        elements = 1 << (18 if self.backend.device.type == "cpu" else 25)
        return int(max(8, min(elements // widest, 1 << 14)))

    def run(self) -> SearchResult:
        meaning = [torch.tensor([g.value for g in self.space.groups]), *(g.elements for g in self.space.groups)]
        self.team.same([*meaning, self.cases.spec.y, self.cases.thresholds])
        return self._result(self.team.run(self))

    # -- what the team asks -----------------------------------------------------------------------------------------

    @property
    def roots(self) -> int:
        return int(self.cases.thresholds.shape[0])

    def open(self) -> int:
        return self.pool.count

    def start(self) -> None:
        self._push_roots()
        self.began = self.roots

    def round(self) -> None:
        self.backend.usage.note_domains(self.pool.bytes())
        crowded = self.pool.bytes() > self.memory_limit // 2
        domains = self.pool.pop(self._take(), worst_first=not crowded)
        n = domains["case"].shape[0]
        try:
            children = self._children(domains)
        except (RuntimeError, MemoryError) as error:
            self._smaller(error, n)
            self.pool.push(domains)
            return
        self.split += n
        self._bound(children)
        self.rounds += 1

    def full(self) -> Stop:
        return Stop.MEMORY if self.pool.bytes() > self.memory_limit else Stop.NONE

    def count(self) -> Figures:
        return Figures(
            roots=self.began,
            children=self.bounded - self.began,
            split=self.split,
            closed=self.closed,
            stuck=self.stuck,
            open=self.pool.count,
            bounded=self.bounded,
            rounds=self.rounds,
            leaves=self.leaves,
            uncertified=self.uncertified,
            worst=self.pool.worst(),
        )

    def show(self, others: Figures) -> None:
        self.progress.update(
            open=self.pool.count + self.stuck + others.open + others.stuck,
            done=self.closed + others.closed,
            domains=self.bounded + others.bounded,
            worst=min(self.pool.worst(), others.worst),
        )

    def give(self, count: int) -> Fields:
        out = self.pool.sample(every(self.pool.count, count))
        small = 2 * self.rows * self.space.size * 4 <= _WARM_BYTES
        return out if small else {k: v for k, v in out.items() if k not in _WARM}

    def take(self, domains: Fields) -> None:
        self.pool.push({**self._warm(domains["case"]), **domains})

    def _take(self) -> int:
        return max(1, self.batch // 2)

    def _result(self, ending: Ending) -> SearchResult:
        total = ending.total
        open_domains = total.open + total.stuck
        done = open_domains == 0 or ending.witness is not None
        statistics = {
            "domains": total.bounded,
            "closed": total.closed,
            "open": open_domains,
            "leaves": total.leaves,
            "rounds": total.rounds,
            "uncertified": total.uncertified,
            "worst": total.worst if total.open else 0.0,
        }
        if ending.groups:
            statistics["groups"] = ending.groups
        return SearchResult(ending.witness, open_domains, "" if done else _REASONS[ending.stop], statistics)

    def _push_roots(self) -> None:
        """One domain per case, without splits."""
        device = self.backend.device
        case = torch.arange(self.roots, device=device)
        signs = torch.zeros((self.roots, self.space.size), dtype=torch.int8, device=device)
        self._bound({"case": case, "signs": signs, **self._warm(case)})

    def _warm(self, case: Tensor) -> Fields:
        """Slopes and multipliers to start from without a parent: the root's slopes and zero."""
        lead = (int(case.shape[0]), self.rows)
        parameters = {i: p["alpha"][case] for i, p in self.cases.parameters.items() if "alpha" in p}
        alpha = self.space.collect(parameters, lead)
        return {"alpha": alpha, "beta": torch.zeros_like(alpha)}

    # -- bounding -----------------------------------------------------------------------------------------------

    def _bound(self, domains: Fields) -> None:
        """Optimise, close what is certified, and put the rest into the pool (or to the LP at leaves).

        A short first stage closes the easy domains, the rest gets the remaining steps. A batch that does not fit into
        memory is halved and tried again.
        """
        total = self.config.iterations
        stages = (_FIRST_STAGE, total - _FIRST_STAGE) if total > 2 * _FIRST_STAGE else (total,)
        size = domains["case"].shape[0]
        self.bounded += size
        work = [(0, _rows(domains, slice(i, i + self.batch))) for i in range(0, size, self.batch)]
        while work and self.witness is None:
            stage, part = work.pop()
            before = self.closed, self.stuck, self.leaves, self.uncertified
            try:
                rest = self._stage(part, stages[stage], stage == len(stages) - 1)
            except (RuntimeError, MemoryError) as error:
                n = part["case"].shape[0]
                self._smaller(error, n)
                self.closed, self.stuck, self.leaves, self.uncertified = before
                work += [(stage, _rows(part, slice(0, n // 2))), (stage, _rows(part, slice(n // 2, n)))]
                continue
            if rest is not None:
                work.append((stage + 1, rest))

    def _smaller(self, error: Exception, n: int) -> None:
        """Halve the batch after an allocation failed; raise what else it was, and where that would not help."""
        if not out_of_memory(error):
            raise error
        if self.backend.size > 1:  # the other ranks of a group go on: only the end of the job is safe
            raise MemoryExceeded(f"a batch of {n} domains does not fit; make bab.batch_size smaller") from error
        if n == 1:
            raise MemoryExceeded("not even one domain fits") from error
        self.batch = max(1, n // 2)

    def _stage(self, part: Fields, iterations: int, last: bool) -> Fields | None:
        """One stage of a batch; what is left for the next one, or None when all is done or stored."""
        part, found = self._optimise(part, iterations)
        done = self._certified(part, found)
        self.closed += int(done.sum())
        still = (~done).nonzero()[:, 0]
        if still.shape[0] == 0:
            return None
        if last or self.deadline.expired():
            self._store(part, found, still)
            return None
        return _rows(part, still)

    def _optimise(self, part: Fields, iterations: int) -> tuple[Fields, Optimised]:
        """Best slopes and multipliers for a batch; returns the batch with them written back."""
        bounds = self.space.domain_bounds(part["signs"])
        signs = self.space.multiplier_signs(part["signs"])
        schedule = Schedule(iterations, self.config.learning_rate_alpha, self.config.learning_rate_beta, 0.98)
        found = optimise(
            self.graph,
            self.backend,
            self._forms(part["case"]),
            self.state.box,
            bounds,
            self._parameters(part),
            schedule,
            self.deadline,
            signs,
            self.space.scatter(part["beta"]),
        )
        self.backend.usage.note_rows(found.state)
        lead = (part["case"].shape[0], self.rows)
        out = dict(part)
        out["alpha"] = self.space.collect({i: p["alpha"] for i, p in found.parameters.items() if "alpha" in p}, lead)
        out["beta"] = self.space.collect(found.multipliers, lead)
        gap = found.lower.double() - self.cases.thresholds[part["case"]]
        out["gap"], out["row"] = gap.max(1)
        out["gap"] = out["gap"].float()
        return out, found

    def _forms(self, case: Tensor) -> dict[int, Form]:
        return self.cases.spec.select(case).forms(self.backend, self.graph.output, torch.float32)

    def _parameters(self, part: Fields) -> Parameters:
        """Root parameters of the case, with the domain's own ReLU slopes written over them."""
        out: Parameters = {
            i: {name: v[part["case"]] for name, v in group.items()} for i, group in self.cases.parameters.items()
        }
        for g in self.space.groups:
            if g.owner in out and "alpha" in out[g.owner]:
                g.write(out[g.owner]["alpha"].flatten(2), part["alpha"][..., g.start : g.stop])
        return out

    def _certified(self, part: Fields, found: Optimised) -> Tensor:
        """(B,) bool: domains that are refuted, in float64 with rounding charged when the state is certified."""
        done = part["gap"] > 0
        if self.state.certified and bool(done.any()):
            index = done.nonzero()[:, 0]
            sure = self._certify(_rows(part, index), found, index)
            done[index] = sure
            self.uncertified += int((~sure).sum())
        return done

    def _certify(self, part: Fields, found: Optimised, index: Tensor) -> Tensor:
        """Whether some row of each domain is refuted in float64 with every rounding charged."""
        state = replace(self.state, bounds=self.space.domain_bounds(part["signs"]))
        signs = self.space.multiplier_signs(part["signs"])
        parameters = {i: {k: v[index] for k, v in d.items()} for i, d in found.parameters.items()}
        splits = {i: signs[i].double() * m[index].double() for i, m in found.multipliers.items()}
        lower, _ = crown_rows(
            self.graph, self.backend, state, self.cases.spec.select(part["case"]), parameters, splits, torch.float64
        )
        return proved(lower, self.cases.thresholds[part["case"]]).any(1)

    # -- open domains ---------------------------------------------------------------------------------------------

    def _store(self, part: Fields, found: Optimised, still: Tensor) -> None:
        """Try minimisers as counterexamples, rank split candidates, send decided domains to the LP."""
        if still.shape[0] == 0:
            return
        self._try(found.candidate[still], part["case"][still])
        if self.witness is not None:
            return
        ranked = self._rank(part, found)
        part = _rows(part, still)
        part["candidates"] = ranked[still]
        decided = (part["signs"] != 0).all(1) if self.space.size else torch.ones_like(part["case"], dtype=torch.bool)
        if bool(decided.any()):
            for i in decided.nonzero()[:, 0].tolist():
                self._leaf(_rows(part, slice(i, i + 1)))
            part = _rows(part, ~decided)
        self.pool.push(part)

    def _try(self, x: Tensor, case: Tensor) -> None:
        """Evaluate minimisers (n, S, *in) and offer those that violate the property to the replay."""
        flat = self.backend.whole(0, x.expand(case.shape[0], *x.shape[1:]).flatten(0, 1))
        y = self.graph.whole.forward(flat, self.backend.weights)
        assert isinstance(y, Tensor)
        spec, d = self.cases.spec.select(case), self.cases.thresholds[case]
        value = torch.einsum("bso,bto->bts", spec.y.flatten(2), y.double().reshape(case.shape[0], self.rows, -1))
        if spec.x is not None:
            value = value + torch.einsum("bsi,bti->bts", spec.x.flatten(2), flat.double().reshape(*value.shape[:2], -1))
        slack = (d[:, None] - value).amin(-1).flatten()
        best = torch.topk(slack, min(3, slack.shape[0]))
        for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if s >= 0 and self.witness is None:
                self.witness = self.accept(flat[i].reshape(-1).cpu().numpy())

    def _rank(self, part: Fields, found: Optimised) -> Tensor:
        """(B, 2k) candidate columns of every domain, from the walk that bounded it."""
        k = min(self.config.candidates, max(1, self.space.size))
        if self.space.size == 0:
            return torch.zeros((part["case"].shape[0], 1), dtype=torch.int64, device=self.backend.device)
        pick = torch.arange(part["case"].shape[0], device=self.backend.device)
        kept = {i: a.expand(len(pick), *a.shape[1:])[pick, part["row"]][:, None] for i, a in found.kept.items()}
        scores = babsr.intercept_scores(self.space, part["signs"], kept)
        first = torch.topk(scores, k, dim=1).indices
        if self.config.branching == "babsr":
            return first
        gaps = babsr.gap_scores(self.space, part["signs"], kept, part["alpha"][pick, part["row"]], self._z(part, found))
        # A column that is ranked by both counts once: mask the first list before taking the second.
        gaps.scatter_(1, first, float("-inf"))
        return torch.cat([first, torch.topk(gaps, k, dim=1).indices], 1)

    def _z(self, part: Fields, found: Optimised) -> Tensor:
        """(B, U) pre-activations at the last minimiser of the chosen row."""
        lead = torch.Size((part["case"].shape[0], self.rows))
        planes = relaxations(self.graph, self.space.domain_bounds(part["signs"]), torch.float32, found.parameters)
        walk = Walk(found.candidate, found.lower, found.lower, found.kept)
        z = sweep(self.graph, self.backend, walk, planes, found.candidate, lead)
        columns = self.space.collect({i: v[0] for i, v in z.items()}, (lead[0], lead[1]))
        return columns[torch.arange(lead[0], device=columns.device), part["row"]]

    # -- branching --------------------------------------------------------------------------------------------------

    def _children(self, domains: Fields) -> Fields:
        """Split every domain at one column; both signs."""
        signs, candidates = domains["signs"], domains["candidates"]
        # Ranked lists can run into split columns when few are free: replace these by the domain's first candidate.
        taken = signs.gather(1, candidates) != 0
        first_free = (signs == 0).to(torch.int8).argmax(1, keepdim=True)
        candidates = torch.where(taken, first_free, candidates)
        if self.config.branching != "babsr" and candidates.shape[1] > 1:
            candidates = kfsb.choose(candidates, lambda c, s: self._quick(domains, c, s))
        column = candidates[:, :1]
        plus = {k: v for k, v in domains.items() if k in ("case", "signs", "alpha", "beta")}
        minus = dict(plus)
        plus["signs"] = signs.scatter(1, column, 1)
        minus["signs"] = signs.scatter(1, column, -1)
        return {k: torch.cat([plus[k], minus[k]]) for k in plus}

    def _quick(self, domains: Fields, column: Tensor, sign: int) -> Tensor:
        """(B,) gap of one child with the parent's slopes and multipliers."""
        signs = domains["signs"].scatter(1, column[:, None], sign)
        planes = relaxations(self.graph, self.space.domain_bounds(signs), torch.float32, self._parameters(domains))
        multiplier = self.space.multiplier_signs(signs)
        beta = self.space.scatter(domains["beta"])
        splits = {i: multiplier[i] * beta[i] for i in beta}
        walk = backward(self.graph, self.backend, self._forms(domains["case"]), planes, torch.float32, None, splits)
        lower = finite_lower(concretise(self.backend, walk, self.state.box, False))
        return (lower.double() - self.cases.thresholds[domains["case"]]).amax(1).float()

    def _leaf(self, domain: Fields) -> None:
        """Every neuron is decided: an LP whose duals certify, or whose minimiser may be a counterexample."""
        self.leaves += 1
        if not self.config.leaf_lp or self.deadline.expired():
            self.stuck += 1
            return
        case = domain["case"]
        state = replace(self.state, bounds=self.space.domain_bounds(domain["signs"]))
        signs = self.space.multiplier_signs(domain["signs"])
        found = solve_leaf(
            self.graph,
            self.backend,
            state,
            signs,
            self.cases.spec.select(case),
            self.cases.thresholds[case][0],
            self.deadline,
        )
        if found.closed:
            self.closed += 1
            return
        self.stuck += 1
        if found.candidate is not None and self.witness is None:
            self.witness = self.accept(found.candidate)
