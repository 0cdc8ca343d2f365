"""Branch and bound on input boxes, for problems in which few input coordinates vary.

As in Wang et al., *ReluVal*, USENIX Security 2018, with certified linear bounds instead of symbolic intervals.

A domain is a box and the case whose unsafe set it is searched for. A round takes a batch of domains off the stack,
bounds them, closes those in which some row (or convex combination of rows) of the case is certified to be violated
everywhere, tries points of the others as counterexamples, cuts them by the certified rows, and pushes their halves.

A proof rests on numbers whose every rounding is charged: in float32 where the network allows it, else in float64;
domains that float32's charges alone keep open are bounded once more in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verifier.bab.boxes import (
    CHARGED_32,
    CHARGED_64,
    SEARCH,
    Arithmetic,
    Domains,
    Hidden,
    Pool,
    bound_boxes,
    charges_in_float32,
    cuttable,
    halve,
    midpoints,
)
from verifier.bab.clip import Halfspaces, combine, cut, halfspaces, least
from verifier.bab.context import SearchContext
from verifier.bab.pool import Fields
from verifier.bab.team import Ending, Figures, Stop, Team, every
from verifier.bounds import ibp
from verifier.bounds.crown import Specification, preactivations, row_bytes
from verifier.bounds.touch import near, touched
from verifier.core.claims import Claims, Covered, Semantics, real_part
from verifier.core.errors import DeadlineExceeded, MemoryExceeded
from verifier.core.interval import Interval
from verifier.core.memory import out_of_memory
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.graph.graph import Graph, Node

# Bytes of coefficients that one batch keeps alive.
_BATCH_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}
# Bytes that the bounds of a round's boxes take at most, one box at least.
_ROUND_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}
# Numbers that are kept of every element of a box: bounds, magnitudes, planes.
_KEPT = 8
_POOL_BYTES = 2 << 30
# Up to here a linear sweep forward is cheap.
_FEW_INPUTS = 32
_FEWEST, _MOST_DOMAINS = 16, 1 << 17
_SPLITS_PER_ROUND = 4
_OFFERS_PER_ROUND = 4
# A sweep without hidden rows is worth its time when it closes at least this share of a batch.
_CHEAP_SHARE = 0.2
# One in float64 for all open domains is worth it from this share on.
_EXACT_SHARE = 0.1
# A domain that the linear sweep leaves open is worth as many linear sweeps as its subtree would have domains, should
# CROWN's hidden rows close it; while they do not pay, a sample is tried every few rounds.
_SUBTREE = 96
# A box on which a row moves by so few errors of a run is not worth splitting for runs.
_NOISIEST = 0.05
# Small networks: what is not multiplication costs about this much more with hidden rows.
_LEAST_CROWN_COST = 10.0
_SAMPLE, _SAMPLE_ROUNDS = 32, 4


@dataclass(frozen=True)
class InputSplitResult:
    """What the search leaves.

    Attributes:
        witness: an accepted counterexample, or None.
        open: int64, cases that are not refuted; empty and without a witness means proved.
        reason: why cases are open, one sentence without a full stop; empty when there are none.
        statistics: ``domains`` bounded, ``closed``, ``open_domains``, ``depth`` reached, ``bound`` (worst of the open
            domains), ``rounds``; with several groups ``groups``, what each of them bounded and received.
        covered: what the bounds that closed boxes hold for.
    """

    witness: Witness | None
    open: np.ndarray
    reason: str
    statistics: Mapping[str, Any] = field(default_factory=dict)
    covered: Covered = field(default_factory=Covered)


def varying_inputs(problem: Problem, cases: np.ndarray) -> np.ndarray:
    """Coordinates that differ within a box of some of these cases, int64 (k,)."""
    return np.flatnonzero(problem.free(np.unique(problem.case_box[cases])).any(0))


def search(context: SearchContext, problem: Problem, cases: np.ndarray) -> InputSplitResult:
    """Refute cases by splitting their boxes, or find a counterexample.

    Args:
        cases: int64 indices of the cases that are still open.
    """
    cases = np.asarray(cases, dtype=np.int64)
    real = np.all(problem.lower <= problem.upper, axis=1)
    cases = cases[real[problem.case_box[cases]]]
    if cases.size == 0:
        return InputSplitResult(None, cases, "", {"domains": 0, "closed": 0})
    with torch.no_grad():
        return _Search(context, problem, cases).run()


@dataclass(frozen=True)
class _Table:
    """The cases on the device; K boxes, N cases, M rows, S rows per case.

    Attributes:
        lower, upper: float32 (K, n_in).
        box: (N,) int64.
        rows: (N, S >= 1) int64, padded with -1.
        y: float64 (M, n_out); x: float64 (M, n_in) or None; d: float64 (M,).
        strict: bool (M,), or None: no row is strict.
        varying: (k,) int64.
        single: all cases have the same rows.
    """

    lower: Tensor
    upper: Tensor
    box: Tensor
    rows: Tensor
    y: Tensor
    x: Tensor | None
    d: Tensor
    strict: Tensor | None
    varying: Tensor
    single: bool

    @staticmethod
    def of(problem: Problem, cases: np.ndarray, device: torch.device) -> _Table:
        def put(a: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(a)).to(device)

        rows = problem.case_rows
        if rows.shape[1] == 0 or problem.row_y.shape[0] == 0:
            rows = np.full((problem.n_cases, 1), -1, dtype=np.int64)
        y, x, d = problem.row_y, problem.row_x, problem.row_d
        if y.shape[0] == 0:
            y, x, d = np.zeros((1, problem.n_out)), None, np.zeros(1)
        return _Table(
            put(problem.lower),
            put(problem.upper),
            put(problem.case_box.astype(np.int64)),
            put(rows.astype(np.int64)),
            put(y.astype(np.float64)),
            None if x is None else put(x.astype(np.float64)),
            put(d.astype(np.float64)),
            None if problem.row_strict is None else put(problem.row_strict),
            put(varying_inputs(problem, cases)),
            bool((rows[cases] == rows[cases[0]]).all()),
        )

    def boxes(self, domains: Domains) -> Interval:
        """Full boxes, float32 (D, n_in)."""
        index = self.box[domains.case]
        low, up = self.lower[index], self.upper[index]
        low[:, self.varying], up[:, self.varying] = domains.lower, domains.upper
        return Interval(low, up)

    def specification(self, case: Tensor, graph: Graph) -> tuple[Specification, Tensor]:
        """Rows of the domains' cases, and their thresholds (B, S): +inf where a row is padding."""
        rows = self.rows[case[:1] if self.single else case]
        index = rows.clamp(min=0)
        pad = rows < 0
        y = self.y[index].masked_fill(pad[..., None], 0.0).reshape(*rows.shape, *graph.whole.output_shape)
        x = None
        if self.x is not None:
            x = self.x[index].masked_fill(pad[..., None], 0.0).reshape(*rows.shape, *graph.whole.input_shape)
        threshold = self.d[index].masked_fill(pad, torch.inf).expand(case.shape[0], -1)
        return Specification(y, x), threshold

    def strict_rows(self, case: Tensor) -> Tensor | None:
        """(B, S) bool: strict rows of the domains' cases; padding is not."""
        if self.strict is None:
            return None
        rows = self.rows[case]
        return self.strict[rows.clamp(min=0)] & (rows >= 0)

    def slack(self, x: Tensor, y: Tensor, case: Tensor) -> Tensor:
        """Smallest ``d - row`` over the rows of each point's case: (P,) float64; NaN outputs give -inf."""
        rows = self.rows[case]
        index = rows.clamp(min=0)
        value = torch.einsum("pso,po->ps", self.y[index], y.double())
        if self.x is not None:
            value = value + torch.einsum("psn,pn->ps", self.x[index], x.double())
        slack = (self.d[index] - value).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
        return slack.masked_fill(rows < 0, torch.inf).amin(1)


@dataclass
class _Figures:
    """Running totals; ``children`` were made by splits, ``split`` domains were replaced by them."""

    domains: int = 0
    closed: int = 0
    children: int = 0
    split: int = 0
    rounds: int = 0
    depth: int = 0
    refused: int = 0


class _Trial:
    """Whether an optional sweep has closed enough lately to be worth its time.

    Args:
        share: of the domains it is tried on, what it must close; from 1 on it never pays.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._tried = 0.0
        self._closed = 0.0

    @property
    def possible(self) -> bool:
        return self._share < 1

    def pays(self) -> bool:
        return self.possible and (self._tried < 32 or self._closed > self._share * self._tried)

    def mostly(self) -> bool:
        """Whether nearly everything was closed."""
        return self._closed >= 0.9 * self._tried

    def note(self, tried: int, closed: int) -> None:
        """Older trials fade."""
        self._tried, self._closed = 0.7 * self._tried + tried, 0.7 * self._closed + closed


@dataclass(frozen=True)
class _Swept:
    """Domains that a sweep leaves open, and what it knows of them.

    Attributes:
        rows: halfspaces that a counterexample must satisfy, the rows of the case first.
        value: float64 (D,), largest of the rows' bounds minus thresholds; not positive.
    """

    domains: Domains
    rows: Halfspaces
    value: Tensor

    def select(self, index: Tensor) -> _Swept:
        return _Swept(self.domains[index], self.rows[index], self.value[index])

    @staticmethod
    def cat(parts: list[_Swept]) -> _Swept:
        rows, names = [p.rows for p in parts], [f.name for f in fields(Halfspaces)]
        return _Swept(
            Domains.cat([p.domains for p in parts]),
            Halfspaces(*(torch.cat([getattr(r, name) for r in rows]) for name in names)),
            torch.cat([p.value for p in parts]),
        )


class _Search:
    """One search; see :func:`search` for the arguments."""

    def __init__(self, context: SearchContext, problem: Problem, cases: np.ndarray) -> None:
        self.graph, self.backend, self.config = context.graph, context.backend, context.config
        self.progress, backend = context.progress, context.backend
        self.deadline = backend.together(context.deadline)
        self.team = Team(context.team, backend, context.accept, self.deadline, self.config.max_domains)
        self.accept = self.team.offer
        self.table = _Table.of(problem, cases, backend.device)
        certify = context.certify
        self.claims, self.covered, self.waiting = context.claims if certify else Claims(), Covered(), 0
        self.arithmetic = SEARCH if not certify else CHARGED_32 if charges_in_float32(self.graph) else CHARGED_64
        self._look_at_runs()
        self.figures = _Figures()
        self._cheap_kind: Hidden = "linear" if self.table.varying.numel() <= _FEW_INPUTS else "interval"
        self._cheap = _Trial(_CHEAP_SHARE)
        self._crown = _Trial(self._crown_cost() / _SUBTREE if self._cheap_kind == "linear" else -1.0)
        self._exact = _Trial(_EXACT_SHARE)
        self.witness: Witness | None = None
        self.stuck: list[Domains] = []
        self.broken = False
        self.batch = self._batch_size()
        self._most = self._most_boxes()
        self.cases = torch.from_numpy(cases).to(backend.device)
        self.began = 0
        self.pool = Pool(self._roots()[:0])

    def _look_at_runs(self) -> None:
        """Have bounds hold for runs, unless a run may overflow and the real network will do."""
        if self.claims.run is None:
            return
        hull = Interval(self.table.lower.amin(0), self.table.upper.amax(0))
        shape = (1, *self.graph.whole.input_shape)
        box = Interval(*(self.backend.part(0, b.reshape(shape)) for b in hull)).to(torch.float64)
        _, charges = ibp.propagate(self.graph, self.backend, box, run=self.claims.run)
        self.covered.overflow = ibp.may_overflow(charges, self.backend)
        if self.covered.overflow and self.claims.semantics is Semantics.BOTH:
            self.claims = Claims()
        self.arithmetic = replace(self.arithmetic, run=self.claims.run)

    def _roots(self) -> Domains:
        """The boxes of all cases."""
        case = self.cases
        index = self.table.box[case]
        varying = self.table.varying
        return Domains(
            self.table.lower[:, varying][index],
            self.table.upper[:, varying][index],
            case,
            torch.zeros_like(case, dtype=torch.int16),
            torch.full_like(case, -torch.inf, dtype=torch.float32),
        )

    def _crown_cost(self) -> float:
        """Multiplications of a sweep with hidden rows (half the neurons open) over those of a linear sweep."""
        nodes = self.graph.whole.nodes
        work = np.cumsum([_products(node) for node in nodes])
        rows = sum(float(work[i]) * nodes[i].size for i in preactivations(self.graph))
        return max(_LEAST_CROWN_COST, rows / max(1.0, float(work[-1]) * (self.table.varying.numel() + 3)))

    def _batch_size(self) -> int:
        """Domains per round: so many that their coefficients stay near the cache, or fill a part of the GPU."""
        if self.config.batch_size != "auto":
            return self.config.batch_size
        rows = max(2 * max(node.size for node in self.graph.whole.nodes[1:]), self.table.rows.shape[1])
        bytes_each = rows * row_bytes(self.graph.whole, 1, self.arithmetic.dtype)
        return max(_FEWEST, min(_MOST_DOMAINS, _BATCH_BYTES[self.backend.device.type] // bytes_each))

    def _most_boxes(self) -> int:
        """Domains of a round whose bounds fit into memory."""
        sizes = [node.size for node in self.graph.whole.nodes]  # the same on every rank
        numbers = sum(sizes) * _KEPT
        if self._cheap_kind == "linear":
            numbers += 4 * max(sizes) * self.table.varying.numel()
        size = numbers * torch.finfo(self.arithmetic.dtype).bits // 8
        return max(1, _ROUND_BYTES[self.backend.device.type] // size)

    def run(self) -> InputSplitResult:
        table = self.table
        linear = [t for t in (table.y, table.x, table.d) if t is not None]
        self.team.same([self.cases, table.lower, table.upper, table.box, table.rows, table.varying, *linear])
        return self._result(self.team.run(self))

    # ----------------------------------------------------------------------------------------- what the team asks

    @property
    def roots(self) -> int:
        return int(self.cases.shape[0])

    @property
    def bounded(self) -> int:
        return self.figures.domains

    def open(self) -> int:
        return len(self.pool)

    def start(self) -> None:
        self.pool = Pool(self._roots())
        self.began = self.roots

    def round(self) -> None:
        self.backend.usage.note_domains(self.pool.bytes)
        batch = self.pool.pop(min(self.batch * self._cheap_factor(), self._most))
        before, stuck = (replace(self.figures), replace(self.covered), self.waiting), len(self.stuck)
        try:
            self._round(batch)
        except DeadlineExceeded:
            self._undo(batch, before, stuck)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if self.backend.size > 1:  # the other ranks of a group go on: only the end of the job is safe
                raise MemoryExceeded(f"a round of {len(batch)} input boxes; make bab.batch_size smaller") from error
            self._undo(batch, before, stuck)
            self.batch //= 2
            self.broken = self.batch == 0

    def _undo(self, batch: Domains, before: tuple[_Figures, Covered, int], stuck: int) -> None:
        """Put a batch back, as if its round had not begun."""
        figures, self.covered, self.waiting = before
        self.figures = replace(figures, rounds=self.figures.rounds, refused=self.figures.refused)
        del self.stuck[stuck:]
        self.pool.push(batch)

    def full(self) -> Stop:
        if self.broken:
            return Stop.DEVICE
        return Stop.MEMORY if self.pool.bytes > _POOL_BYTES else Stop.NONE

    def count(self) -> Figures:
        figures = self.figures
        bounds = [d.bound for d in (*self.stuck, self.pool.domains) if len(d)]
        return Figures(
            roots=self.began,
            children=figures.children,
            split=figures.split,
            closed=figures.closed,
            stuck=sum(len(d) for d in self.stuck),
            open=len(self.pool),
            bounded=figures.domains,
            rounds=figures.rounds,
            depth=figures.depth,
            worst=min((float(b.min()) for b in bounds), default=math.inf),
            weak=self.covered.weak,
            margin=self.covered.margin,
            error=self.covered.error,
        )

    def show(self, others: Figures) -> None:
        figures = self.figures
        self.progress.update(
            open=len(self.pool) + others.open,
            done=figures.closed + others.closed,
            depth=max(figures.depth, others.depth),
            domains=figures.domains + others.bounded,
        )

    def give(self, count: int) -> Fields:
        domains = self.pool.sample(every(len(self.pool), count))
        return {f.name: getattr(domains, f.name) for f in fields(Domains)}

    def take(self, domains: Fields) -> None:
        self.pool.push(Domains(**domains))

    def _round(self, batch: Domains) -> None:
        figures = self.figures
        figures.rounds += 1
        left = self._sweep(batch)
        figures.domains += len(batch)
        figures.closed += len(batch) - len(left.domains)
        if len(left.domains) == 0 or self._candidates(left):
            return
        smaller = torch.zeros_like(left.domains.case, dtype=torch.bool)
        if self.config.clip:
            left, smaller = self._clip(left)
        self.pool.push(self._split(left, smaller))

    # ------------------------------------------------------------------------------------------------------- bounds

    def _sweep(self, batch: Domains) -> _Swept:
        """Close what can be closed: by the cheap sweep first, then with CROWN's hidden rows as far as they pay."""
        left = None
        if self._cheap_kind == "linear" or self._cheap.pays():
            left = self._charged(batch, self._cheap_kind)
            self._cheap.note(len(batch), len(batch) - len(left.domains))
            batch = left.domains
        count = self._crown_count(len(batch))
        if count == 0 and left is not None:
            return left
        # A sample is spread evenly.
        some = torch.arange(count, device=batch.case.device) * len(batch) // count
        chosen = torch.zeros(len(batch), dtype=torch.bool, device=some.device).index_fill(0, some, True)
        parts = [
            self._charged(batch[part], "crown") for part in chosen.nonzero()[:, 0].split(min(self.batch, self._most))
        ]
        self._crown.note(count, count - sum(len(p.domains) for p in parts))
        if count < len(batch):
            assert left is not None
            parts.append(left.select(~chosen))
        return _Swept.cat(parts)

    def _crown_count(self, left: int) -> int:
        """How many of the domains that a cheap sweep leaves get CROWN's hidden rows: all, a sample, or none."""
        if self._crown.pays():
            return left
        return min(left, _SAMPLE) if self.figures.rounds % _SAMPLE_ROUNDS == 0 and self._crown.possible else 0

    def _charged(self, batch: Domains, hidden: Hidden) -> _Swept:
        """One sweep. Where float32's charges may be to blame for an open domain, float64 has a go."""
        return self._really_open(self._open(batch, hidden), hidden)

    def _open(self, batch: Domains, hidden: Hidden) -> _Swept:
        """Domains that a sweep leaves open for all that bounds are to hold for."""
        left, _ = self._bound(batch, self.arithmetic, hidden)
        if self.arithmetic.dtype == torch.float64 or not self.arithmetic.charged or len(left.domains) == 0:
            return left
        # The error of a run stays what it is.
        charges = left.rows.slack - left.rows.error
        near = (least(left.rows, left.domains.box) + 4 * charges > 0).any(1)
        if self._exact.pays():
            near = torch.ones_like(near)
        count = int(near.sum())
        if count == 0:
            return left
        again, _ = self._bound(left.domains[near], replace(CHARGED_64, run=self.claims.run), hidden)
        self._exact.note(count, count - len(again.domains))
        return _Swept.cat([left.select(~near), again])

    def _really_open(self, left: _Swept, hidden: Hidden) -> _Swept:
        """Without the domains that are refuted for the real network and may be closed for that. The others are split
        further: mostly their children are refuted for runs too.

        What stays keeps the rows that hold for runs, since boxes are cut by them.
        """
        if self.claims.semantics is not Semantics.BOTH or len(left.domains) == 0:
            return left
        box, rows = left.domains.box, left.rows
        value = least(rows, box)
        noisy = self._noisy(rows, box)
        waits = rows.refuted(real_part(value, rows.error)) | noisy
        near = (value + 4 * rows.slack > 0).any(1) | noisy
        if not self.claims.real_closes(self.waiting, self.figures.domains):
            near = near & ~cuttable(box).any(1)  # cells cannot wait
        self.waiting += int((waits & ~near).sum())
        if 2 * int(noisy.sum()) > len(left.domains):
            self.claims, self.arithmetic = Claims(), replace(self.arithmetic, run=None)
        at = near.nonzero()[:, 0]
        if not at.numel():
            return left
        _, still = self._bound(left.domains[at], CHARGED_64, hidden)
        closed = torch.zeros_like(near)
        closed[at] = True
        closed[at[still]] = False
        return left.select(~closed)

    @staticmethod
    def _noisy(rows: Halfspaces, box: Interval) -> Tensor:
        """(D,) bool: boxes on which the best row moves by little more than the error of a run."""
        best = least(rows, box).argmax(1, keepdim=True)
        moves = (rows.a.abs() * (box.upper - box.lower).double()[:, None]).sum(-1)
        return (rows.error > _NOISIEST * moves).gather(1, best)[:, 0]

    def _cheap_factor(self) -> int:
        """How many batches of sweeps with hidden rows take as much memory as one without."""
        if self._crown.possible and not self._cheap.mostly():
            return 1
        rows = 2 * max(node.size for node in self.graph.whole.nodes[1:])
        return max(1, min(64, rows // (2 * self.table.rows.shape[1] + 2 * self.table.varying.numel())))

    def _bound(self, batch: Domains, arithmetic: Arithmetic, hidden: Hidden) -> tuple[_Swept, Tensor]:
        """What one sweep leaves open, and (n,) which domains of the batch these are."""
        box = self.table.boxes(batch)
        shape = (len(batch), *self.graph.whole.input_shape)
        spec, threshold = self.table.specification(batch.case, self.graph)
        reshaped = Interval(*(self.backend.part(0, b.reshape(shape)) for b in box))
        varying = self.table.varying
        found = bound_boxes(self.graph, self.backend, reshaped, spec, arithmetic, self.deadline, hidden, varying)
        strict = self.table.strict_rows(batch.case)
        rows = halfspaces(found.walk, threshold, box.to(torch.float64), self.table.varying, strict)
        value = least(rows, batch.box)
        keep = self._kept(rows, value, arithmetic)
        left, place = _Swept(batch[keep], rows[keep], value.amax(1)[keep]), keep
        if threshold.shape[1] > 1:
            rows = combine(left.rows, left.domains.box)
            value = least(rows, left.domains.box)
            best = torch.maximum(left.value, value.amax(1))
            keep = self._kept(rows, value, arithmetic)
            left, place = _Swept(left.domains[keep], rows[keep], best[keep]), place[keep]
        if strict is not None:
            open_ = self._untouched(left, place, reshaped, found.bounds, spec, threshold, strict)
            left, place = left.select(open_), place[open_]
        return left, place

    def _kept(self, rows: Halfspaces, value: Tensor, arithmetic: Arithmetic) -> Tensor:
        """(n,) positions of the domains that their rows' bounds (D, S) do not refute; notes what those of the others
        hold for."""
        gone = rows.refuted(value)
        gap, row = value.max(1)
        error = rows.error.gather(1, row[:, None])[:, 0]
        self.covered.note(gap[gone], error[gone], int(gone.sum()) if arithmetic.run is None else 0)
        return (~gone).nonzero()[:, 0]

    def _untouched(
        self,
        left: _Swept,
        place: Tensor,
        box: Interval,
        bounds: dict[int, Interval],
        spec: Specification,
        threshold: Tensor,
        strict: Tensor,
    ) -> Tensor:
        """(n,) positions of the domains but those whose strict rows only touch their thresholds; whole boxes are always
        tried.

        Args:
            place: of the domains that are left in the batch that ``box``, ``bounds``, ``threshold``, ``strict`` and,
                unless all have the same rows, ``spec`` describe.
        """
        among = torch.zeros(strict.shape[0], dtype=torch.bool, device=strict.device)
        among[place] = near(left.value, threshold[place], strict[place]) | (left.domains.depth == 0)
        if self.claims.semantics is Semantics.FLOAT32:  # nothing is left for the error of a run
            return torch.arange(len(left.domains), device=place.device)
        found = touched(self.graph, self.backend, box, bounds, spec, threshold, strict, among)
        self.covered.weak += int(found[place].sum())
        return (~found[place]).nonzero()[:, 0]

    # --------------------------------------------------------------------------------------------------- candidates

    def _candidates(self, left: _Swept) -> bool:
        """Try centres and minimisers of the open domains; True once there is a witness."""
        domains = left.domains
        row = least(left.rows, domains.box).argmax(1)
        a = left.rows.a[torch.arange(len(domains), device=row.device), row]
        corner = torch.where(a > 0, domains.lower, domains.upper)
        case = torch.cat([domains.case, domains.case])
        full = self.table.boxes(Domains.cat([domains, domains]))
        x = midpoints(full)
        x[: len(domains), self.table.varying] = corner
        slack = self._slack(x, case)
        # Ones that were refused before should not cost a replay each round.
        if self.figures.refused > 20 and self.figures.rounds % 16:
            return False
        order = slack.topk(min(_OFFERS_PER_ROUND, slack.shape[0]))
        for value, i in zip(order.values.tolist(), order.indices.tolist(), strict=True):
            if value < 0:
                break
            self.witness = self.accept(x[i].cpu().numpy())
            if self.witness is not None:
                return True
            self.figures.refused += 1
        return False

    def _slack(self, x: Tensor, case: Tensor) -> Tensor:
        network = self.graph.whole
        x = x.double() if network.rounds else x
        y = network.forward(x.reshape(x.shape[0], *network.input_shape), self.backend.weights)
        assert isinstance(y, Tensor)
        return self.table.slack(x, Graph.flat(y), case)

    # -------------------------------------------------------------------------------------------------------- split

    def _clip(self, left: _Swept) -> tuple[_Swept, Tensor]:
        """Cut the boxes by the rows, which may close them on what remains; what is left, and (D,) which are smaller."""
        domains = left.domains
        box = cut(left.rows, domains.box)
        value = least(left.rows, box)
        keep = self._kept(left.rows, value, self.arithmetic)
        self.figures.closed += len(domains) - int(keep.numel())
        smaller = ((box.lower > domains.lower) | (box.upper < domains.upper)).any(1)
        domains = Domains(box.lower, box.upper, domains.case, domains.depth, domains.bound)
        return _Swept(domains[keep], left.rows[keep], left.value[keep]), smaller[keep]

    def _split(self, left: _Swept, smaller: Tensor) -> Domains:
        """Halve every domain, several times while the next batch has room; worst bounds last.

        Args:
            smaller: (D,) domains that are smaller than the boxes that were bounded. A single cell is stuck only when
                its own bounds leave it open.
        """
        domains, rows = left.domains, left.rows
        domains = Domains(domains.lower, domains.upper, domains.case, domains.depth, left.value.float())
        order = torch.argsort(domains.bound, descending=True, stable=True)
        domains, rows, smaller = domains[order], rows[order], smaller[order]
        room = max(1, self.batch // max(1, 2 * len(domains)))
        times = max(1, min(_SPLITS_PER_ROUND, int(math.log2(room))))
        index = torch.arange(len(domains), device=order.device)
        cells: list[Domains] = []
        for _ in range(times):
            can = cuttable(domains.box)
            some = can.any(1)
            if not bool(some.all()):
                self.stuck.append(domains[~some & ~smaller])
                cells.append(domains[~some & smaller])
                domains, index, can = domains[some], index[some], can[some]
                if len(domains) == 0:
                    break
            score = self._scores(rows[index], domains.box)
            dim = score.masked_fill(~can, -1.0).argmax(1)
            self.figures.split += len(domains)
            domains, index = halve(domains, dim), torch.cat([index, index])
            self.figures.children += len(domains)
            smaller = torch.ones_like(index, dtype=torch.bool)
        if cells:
            domains = Domains.cat([*cells, domains])
        if len(domains):
            self.figures.depth = max(self.figures.depth, int(domains.depth.max()))
        return domains

    def _scores(self, rows: Halfspaces, box: Interval) -> Tensor:
        """How much a split of each coordinate should help, float64 (D, k) >= 0.

        ``longest``: the width. ``smart``: how far the case's rows move along the coordinate, as a share of all
        coordinates, plus the coordinate's share of the widths; without the second part a row that has become flat
        would never have its other coordinates split, on which the relaxations depend as well.
        """
        width = (box.upper.double() - box.lower.double()).clamp(min=0)
        if self.config.input_split == "longest":
            return width
        moves = (rows.a.abs().sum(1) * width).nan_to_num(nan=0.0)
        return _shares(moves) + _shares(width)

    # ------------------------------------------------------------------------------------------------------- result

    def _result(self, ending: Ending) -> InputSplitResult:
        total = ending.total
        left = total.open + total.stuck
        statistics: dict[str, Any] = {
            "domains": total.bounded,
            "closed": total.closed,
            "open_domains": left,
            "depth": total.depth,
            "rounds": total.rounds,
        }
        if math.isfinite(total.worst):
            statistics["bound"] = total.worst
        if ending.groups:
            statistics["groups"] = ending.groups
        mine = np.unique(Domains.cat([*self.stuck, self.pool.domains]).case.cpu().numpy())
        cases = np.unique(np.concatenate(self.team.group.objects(mine)))
        reason = self._reason(ending.stop, total) if left and ending.witness is None else ""
        covered = total.covered
        covered.overflow = self.covered.overflow
        return InputSplitResult(ending.witness, cases, reason, statistics, covered)

    def _reason(self, stop: Stop, total: Figures) -> str:
        """Why boxes are open."""
        match stop:
            case Stop.TIME:
                return f"the time limit was reached with {total.open} input boxes open"
            case Stop.DOMAINS:
                return f"bab.max_domains = {self.config.max_domains} was reached with {total.open} input boxes open"
            case Stop.MEMORY:
                return f"{total.open} open input boxes fill the memory set aside for them"
            case Stop.DEVICE:
                return "the device's memory does not hold the bounds of a single input box"
            case Stop.NONE:
                return f"{total.stuck} input boxes are single floating-point cells that the bounds cannot decide"


def _shares(value: Tensor) -> Tensor:
    """Rows divided by their sums."""
    return value / value.sum(1, keepdim=True).clamp(min=1e-300)


def _products(node: Node) -> int:
    """Multiplications behind a node's value, roughly."""
    return node.size + sum(math.prod(h.shape) for h in node.op.handles if len(h.shape) > 1)
