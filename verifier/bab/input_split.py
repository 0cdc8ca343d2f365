"""Branch and bound on input boxes, for problems in which few input coordinates vary.

As in Wang et al., *ReluVal*, USENIX Security 2018, with certified linear bounds instead of symbolic intervals.

A domain is a box and the case whose unsafe set it is searched for. A round takes a batch of domains off the stack,
bounds them, closes those in which some row (or convex combination of rows) of the case is certified to be violated
everywhere, tries points of the others as counterexamples, cuts them by the certified rows, and pushes their halves:
where to cut a box is known as soon as it is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from verifier.bab.balance import every
from verifier.bab.boxes import cuttable, halve, midpoints
from verifier.bab.case_table import CaseTable, varying_inputs
from verifier.bab.clip import Halfspaces, cut, least
from verifier.bab.context import SearchContext
from verifier.bab.domains import BoxDomains
from verifier.bab.exchange import Ending, Exchange
from verifier.bab.pool import Pool
from verifier.bab.search import branch_and_bound
from verifier.bab.statistics import SearchStatistics, SearchTotals, Stop
from verifier.bab.sweeps import Sweeps, Swept
from verifier.core.claims import Covered
from verifier.core.deadline import Deadline
from verifier.core.errors import MemoryExceeded, VerifierError
from verifier.core.interval import Interval
from verifier.core.problem import Problem
from verifier.core.result import Witness
from verifier.proof.boxes import BoxLog

__all__ = ["InputSplitResult", "search", "varying_inputs"]

_POOL_BYTES = 2 << 30
_SPLITS_PER_ROUND = 4
_OFFERS_PER_ROUND = 4


@dataclass(frozen=True)
class InputSplitResult:
    """What the search leaves.

    Attributes:
        witness: an accepted counterexample, or None.
        open: int64, cases that are not refuted; empty and without a witness means proved.
        reason: why cases are open, one sentence without a full stop; empty when there are none.
        totals: what was done and left.
        covered: what the bounds that closed boxes hold for.
    """

    witness: Witness | None
    open: np.ndarray
    reason: str
    totals: SearchTotals = field(default_factory=SearchTotals)
    covered: Covered = field(default_factory=Covered)


def search(context: SearchContext, problem: Problem, cases: np.ndarray) -> InputSplitResult:
    """Refute cases by splitting their boxes, or find a counterexample.

    Args:
        cases: int64 indices of the cases that are still open.
    """
    cases = np.asarray(cases, dtype=np.int64)
    real = np.all(problem.lower <= problem.upper, axis=1)
    cases = cases[real[problem.case_box[cases]]]
    if cases.size == 0:
        return InputSplitResult(None, cases, "")
    exchange: Exchange[BoxDomains] = Exchange(context)
    with torch.no_grad():
        splitting = InputSplitting(context, problem, cases, exchange.deadline, exchange.offer)
        exchange.same(splitting.meaning())
        log = splitting.sweeps.log = None if context.proof is None else BoxLog(varying_inputs(problem, cases))
        try:
            ending = branch_and_bound(splitting, exchange)
        finally:
            splitting.sweeps.close()
    left = np.unique(np.concatenate(exchange.group.objects(splitting.open_cases())))
    if context.proof is not None and log is not None and ending.witness is None:
        context.proof.refuted_boxes(log, np.setdiff1d(cases, left))
    return _result(ending, left, splitting, context.config.max_domains)


def _result(ending: Ending, left: np.ndarray, splitting: InputSplitting, most: int | None) -> InputSplitResult:
    total = ending.totals.statistics
    reason = _reason(ending.stop, total, most) if ending.totals.left and ending.witness is None else ""
    covered = total.covered
    covered.overflow = splitting.statistics.covered.overflow
    return InputSplitResult(ending.witness, left, reason, ending.totals, covered)


def _reason(stop: Stop, total: SearchStatistics, most: int | None) -> str:
    """Why boxes are open."""
    match stop:
        case Stop.TIME:
            return f"the time limit was reached with {total.open} input boxes open"
        case Stop.DOMAINS:
            return f"bab.max_domains = {most} was reached with {total.open} input boxes open"
        case Stop.MEMORY:
            return f"{total.open} open input boxes fill the memory set aside for them"
        case Stop.DEVICE:
            return "the device's memory does not hold the bounds of a single input box"
        case Stop.NONE:
            return f"{total.stuck} input boxes are single floating-point cells that the bounds cannot decide"


class InputSplitting:
    """Splits of input boxes, as branch and bound asks for them.

    Args:
        deadline: expires for all ranks of the group at the same question.
        replay: judges a candidate (n_in,).

    Attributes:
        stuck: boxes that are single floating-point cells.
        broken: memory does not hold the bounds of a single box.
        too_many: the fewest boxes whose bounds did not fit into memory.
    """

    kind = BoxDomains

    def __init__(
        self,
        context: SearchContext,
        problem: Problem,
        cases: np.ndarray,
        deadline: Deadline,
        replay: Callable[[np.ndarray], Witness | None],
    ) -> None:
        self.graph, self.backend, self.config = context.graph, context.backend, context.config
        self.progress, self.replay = context.progress, replay
        self.table = CaseTable.of(problem, cases, context.backend.device)
        self.cases = torch.from_numpy(cases).to(context.backend.device)
        self.statistics = SearchStatistics()
        self.sweeps = Sweeps(context, self.table, deadline, self.statistics)
        self.witness: Witness | None = None
        self.pool: Pool[BoxDomains] = Pool()
        self.stuck: list[BoxDomains] = []
        self.broken = False
        self.too_many: float = math.inf

    def meaning(self) -> list[Tensor]:
        """What gives the numbers of a domain their meaning."""
        table = self.table
        linear = [t for t in (table.y, table.x, table.d) if t is not None]
        return [self.cases, table.lower, table.upper, table.box, table.rows, table.varying, *linear]

    def open_cases(self) -> np.ndarray:
        """Cases of the domains that are left, int64, ascending."""
        left = [*self.stuck, *([self.pool.domains] if self.pool.count else [])]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(d.case.cpu().numpy() for d in left)]))

    # -- the steps of a round -------------------------------------------------------------------------------------

    @property
    def roots(self) -> int:
        return int(self.cases.shape[0])

    def start(self) -> None:
        """The boxes of all cases."""
        self.statistics.roots = self.roots
        self.pool.push(self.table.roots(self.cases))

    def pick(self) -> BoxDomains:
        """The last ones: a search in depth keeps few of them."""
        self.backend.usage.note_domains(self.pool.nbytes())
        return self.pool.last(min(self.sweeps.batch * self.sweeps.cheap_factor(), self.sweeps.most))

    def branch(self, domains: BoxDomains) -> BoxDomains:
        """The domains themselves: they were halved when their parents were bounded (:meth:`push`)."""
        return domains

    def parts(self, domains: BoxDomains) -> list[BoxDomains]:
        return [domains]

    def bound(self, domains: BoxDomains) -> Swept:
        """What the sweeps leave open; their numbers are certificates."""
        return self.sweeps.sweep(domains)

    def certify(self, domains: BoxDomains, found: Swept) -> Swept:
        self.statistics.bounded += domains.count
        self.statistics.closed += domains.count - found.domains.count
        return found

    def offer(self, left: Swept) -> Witness | None:
        """Centres and minimisers of the open domains."""
        domains = left.domains
        if domains.count == 0:
            return None
        row = least(left.rows, domains.box).argmax(1)
        a = left.rows.a[torch.arange(domains.count, device=row.device), row]
        corner = torch.where(a > 0, domains.lower, domains.upper)
        case = torch.cat([domains.case, domains.case])
        full = self.table.boxes(BoxDomains.cat([domains, domains]))
        x = midpoints(full)
        x[: domains.count, self.table.varying] = corner
        slack = self.sweeps.slack(x, case)
        # Ones that were refused before should not cost a replay each round.
        if self.statistics.refused > 20 and self.statistics.rounds % 16:
            return None
        order = slack.topk(min(_OFFERS_PER_ROUND, slack.shape[0]))
        # Ranks replay together, so that they agree on how many are worth it whatever each of them computed.
        count = int(self.backend.agree(float((order.values >= 0).sum())))
        for i in order.indices[:count].tolist():
            witness = self.replay(x[i].cpu().numpy())
            if witness is not None:
                return witness
            self.statistics.refused += 1
        return None

    def push(self, left: Swept) -> None:
        """Cut the boxes by their rows, and halve what is left of them."""
        if left.domains.count == 0:
            return
        smaller = torch.zeros_like(left.domains.case, dtype=torch.bool)
        if self.config.clip:
            left, smaller = self._clip(left)
        self.pool.push(self._split(left, smaller))

    def _clip(self, left: Swept) -> tuple[Swept, Tensor]:
        """Cut the boxes by the rows, which may close them on what remains; what is left, and (B,) which are smaller."""
        domains = left.domains
        box = cut(left.rows, domains.box)
        value = least(left.rows, box)
        keep = self.sweeps.kept(left.rows, value, self.sweeps.arithmetic)
        self.statistics.closed += domains.count - int(keep.numel())
        smaller = ((box.lower > domains.lower) | (box.upper < domains.upper)).any(1)
        domains = replace(domains, lower=box.lower, upper=box.upper)
        return Swept(domains[keep], left.rows[keep], left.value[keep]), smaller[keep]

    def _split(self, left: Swept, smaller: Tensor) -> BoxDomains:
        """Halve every domain, several times while the next batch has room; worst bounds last.

        Args:
            smaller: (B,) domains that are smaller than the boxes that were bounded. A single cell is stuck only when
                its own bounds leave it open.
        """
        domains, rows = left.domains, left.rows
        domains = replace(domains, gap=left.value.float())
        order = torch.argsort(domains.gap, descending=True, stable=True)
        domains, rows, smaller = domains[order], rows[order], smaller[order]
        room = max(1, self.sweeps.batch // max(1, 2 * domains.count))
        times = max(1, min(_SPLITS_PER_ROUND, int(math.log2(room))))
        index = torch.arange(domains.count, device=order.device)
        cells: list[BoxDomains] = []
        for _ in range(times):
            can = cuttable(domains.box)
            some = can.any(1)
            if not bool(some.all()):
                stuck = domains[~some & ~smaller]
                self.stuck.append(stuck)
                self.statistics.stuck += stuck.count
                cells.append(domains[~some & smaller])
                domains, index, can = domains[some], index[some], can[some]
                if domains.count == 0:
                    break
            score = self._scores(rows[index], domains.box)
            dim = score.masked_fill(~can, -1.0).argmax(1)
            self.statistics.split += domains.count
            domains, index = halve(domains, dim), torch.cat([index, index])
            self.statistics.children += domains.count
            smaller = torch.ones_like(index, dtype=torch.bool)
        if cells:
            domains = BoxDomains.cat([*cells, domains])
        if domains.count:
            self.statistics.depth = max(self.statistics.depth, int(domains.depth.max()))
        return domains

    def _scores(self, rows: Halfspaces, box: Interval) -> Tensor:
        """How much a split of each coordinate should help, float64 (B, k) >= 0.

        ``longest``: the width. ``smart``: how far the case's rows move along the coordinate, as a share of all
        coordinates, plus the coordinate's share of the widths; without the second part a row that has become flat
        would never have its other coordinates split, on which the relaxations depend as well.
        """
        width = (box.upper.double() - box.lower.double()).clamp(min=0)
        if self.config.input_split == "longest":
            return width
        moves = (rows.a.abs().sum(1) * width).nan_to_num(nan=0.0)
        return _shares(moves) + _shares(width)

    # -- limits -----------------------------------------------------------------------------------------------------

    def shrink(self, count: int) -> None:
        if count < self.too_many:  # not again for others of the same size
            self.too_many, self.sweeps.batch = count, max(1, self.sweeps.batch // 2)
            self.sweeps.close()

    def undo(self, before: SearchStatistics) -> None:
        self.statistics.restore(before)
        while sum(d.count for d in self.stuck) > before.stuck:
            self.stuck.pop()

    def postpone(self, domains: BoxDomains, error: VerifierError) -> None:
        self.pool.push(domains)
        self.broken |= isinstance(error, MemoryExceeded)

    def full(self) -> Stop:
        if self.broken:
            return Stop.DEVICE
        return Stop.MEMORY if self.pool.nbytes() > _POOL_BYTES else Stop.NONE

    # -- what other groups and the user are told ------------------------------------------------------------------

    def count(self) -> SearchStatistics:
        stuck = min((float(d.gap.min()) for d in self.stuck if d.count), default=math.inf)
        return replace(self.statistics, open=self.pool.count, worst=min(stuck, self.pool.worst()))

    def show(self, others: SearchStatistics) -> None:
        statistics = self.statistics
        self.progress.update(
            open=self.pool.count + others.open,
            done=statistics.closed + others.closed,
            depth=max(statistics.depth, others.depth),
            domains=statistics.bounded + others.bounded,
        )

    def give(self, count: int) -> BoxDomains:
        return self.pool.take_in_order(every(self.pool.count, count).to(self.backend.device))

    def take(self, domains: BoxDomains) -> None:
        self.pool.push(domains)


def _shares(value: Tensor) -> Tensor:
    """Rows divided by their sums."""
    return value / value.sum(1, keepdim=True).clamp(min=1e-300)
