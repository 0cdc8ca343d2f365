"""Bounds of the domains of an input search: which sweeps they get, in which arithmetic, and what those leave open.

A proof rests on numbers whose every rounding error is accounted for: in float32 where the network allows it, else in
float64; domains that float32's errors alone keep open are bounded once more in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from verifier.bab.boxes import Bounded, Hidden, bound_boxes, cuttable, float32_suffices, midpoints
from verifier.bab.case_table import BoxRows, CaseTable
from verifier.bab.clip import Halfspaces, combine, halfspaces, least
from verifier.bab.context import SearchContext
from verifier.bab.domains import BoxDomains
from verifier.bab.recordings import Recordings
from verifier.bab.statistics import SearchStatistics
from verifier.bounds import ibp
from verifier.bounds.crown import Specification, preactivations, row_cost
from verifier.bounds.engine import PLAIN, ROUNDED_32, ROUNDED_64, Arithmetic, Engine, recorder
from verifier.bounds.touch import near, touched
from verifier.bounds.walk import Walk
from verifier.core.claims import Claims, Semantics, real_part
from verifier.core.cuda_graphs import Outputs
from verifier.core.deadline import Deadline
from verifier.core.device import facts
from verifier.core.interval import Interval
from verifier.graph.graph import Graph, Node
from verifier.proof.boxes import BoxLog

# Sweeps of a shape before it is recorded, and numbers of the widest tensor up to which launches take longer than work.
_RECORDED_AFTER, _RECORDED_NUMBERS = 1, 1 << 25
# The share of undecided elements that may be new in a sweep when the next one is recorded.
_NEW_ELEMENTS = 0.02
# Numbers that are kept of every element of a box: bounds, magnitudes, planes.
_KEPT = 8
# Up to here a linear sweep forward is cheap.
_FEW_INPUTS = 32
_FEWEST, _MOST_DOMAINS = 16, 1 << 17
# A sweep without hidden rows is worth its time when it closes at least this share of a batch.
_CHEAP_SHARE = 0.2
# One in float64 for all open domains is worth it from this share on.
_EXACT_SHARE = 0.1
# CROWN's hidden rows save at least so many linear sweeps where they close what a linear sweep leaves open.
_SUBTREE = 96
# Splits narrow a bound's distance from the truth like the square of the widths, once all k coordinates were halved.
_HALVINGS_PER_SPLIT, _MOST_LEVELS = 2.0, 60.0
# Hidden rows that do not close a domain still replace the splits that come as near by linear sweeps; those could also
# come first, and hidden rows at the end alone.
_REPLACED = 1 / 16
# While hidden rows do not pay, a sample is tried every few rounds; in work, it is so much of what was done at most.
_SAMPLE, _SAMPLE_ROUNDS, _SAMPLE_SHARE = 32, 4, 0.5
# A box on which a row moves by so few errors of a run is not worth splitting for runs.
_NOISIEST = 0.05
# Of the rounding errors of a proof that is written down: what a reader that sums in another order may have besides.
_ROOM = 4.0
# Small networks: what is not multiplication costs about this much more with hidden rows.
_LEAST_CROWN_COST = 10.0


class Trial:
    """Whether an optional sweep has gained enough lately to be worth its time.

    Args:
        cost: of trying it on a domain, in the unit of what it gains.
        least: domains that it is tried on before it is judged.
    """

    def __init__(self, cost: float, least: int = 32) -> None:
        self.cost = cost
        self._least = least
        self._tried = 0.0
        self._gained = 0.0

    def pays(self) -> bool:
        return self._tried < self._least or self._gained > self.cost * self._tried

    def mostly(self) -> bool:
        """Whether nearly everything was gained."""
        return self._gained >= 0.9 * self._tried

    def note(self, tried: int, gained: float) -> None:
        """Older trials fade."""
        self._tried, self._gained = 0.7 * self._tried + tried, 0.7 * self._gained + gained


def levels(before: Tensor, after: Tensor, truth: Tensor, coordinates: int) -> Tensor:
    """Levels of a tree of splits that one kind of bounds needs to come as near to the truth as another is, or near
    enough to close: float64 (n,) from 0 to 60.

    Args:
        before, after: float64 (n,), bounds minus thresholds by the two kinds; -inf: none.
        truth: (n,), what bounds cannot exceed: the value at some point.
        coordinates: that are split.
    """
    room = truth.clamp(min=1e-300)  # a bound that is off by less closes
    off = [(truth - bound).nan_to_num(nan=torch.inf).maximum(room) for bound in (before, after)]
    found = coordinates / _HALVINGS_PER_SPLIT * (off[0].log2() - off[1].log2())
    return found.nan_to_num(nan=0.0).clamp(0.0, _MOST_LEVELS)


@dataclass(frozen=True)
class Swept:
    """Domains that a sweep leaves open, and what it knows of them.

    Attributes:
        rows: halfspaces that a counterexample must satisfy, the rows of the case first.
        value: float64 (B,), largest of the rows' bounds minus thresholds; not positive.
    """

    domains: BoxDomains
    rows: Halfspaces
    value: Tensor

    def select(self, index: Tensor) -> Swept:
        return Swept(self.domains[index], self.rows[index], self.value[index])

    @staticmethod
    def cat(parts: list[Swept]) -> Swept:
        rows, names = [p.rows for p in parts], [f.name for f in fields(Halfspaces)]
        return Swept(
            BoxDomains.cat([p.domains for p in parts]),
            Halfspaces(*(torch.cat([getattr(r, name) for r in rows]) for name in names)),
            torch.cat([p.value for p in parts]),
        )


class Sweeps:
    """Sweeps over the network that bound boxes and leave open what they do not refute.

    Args:
        deadline: expires for all ranks of the group at the same question.
        statistics: where what closings cover is noted, and what they are judged by.

    Attributes:
        log: where what closes boxes is written down.
        batch: boxes that get hidden rows at once; ``most``: boxes of a round whose bounds fit into memory.
    """

    def __init__(
        self, context: SearchContext, table: CaseTable, deadline: Deadline, statistics: SearchStatistics
    ) -> None:
        self.graph, self.backend, self.config = context.graph, context.backend, context.config
        self.engine = Engine(self.graph, self.backend, deadline)
        self.table, self.statistics = table, statistics
        certify = context.certify
        self.claims = context.claims if certify else Claims()
        # Who checks a proof chooses slopes by float64 bounds: float32 ones may be on the other side of a tie.
        narrow = float32_suffices(self.graph) and context.proof is None
        self.arithmetic = PLAIN if not certify else ROUNDED_32 if narrow else ROUNDED_64
        self.log: BoxLog | None = None
        self._look_at_runs()
        self._cheap_kind: Hidden = "linear" if self.table.varying.numel() <= _FEW_INPUTS else "interval"
        self._cheap = Trial(_CHEAP_SHARE)
        self._crown = Trial(self._crown_cost() if self._cheap_kind == "linear" else -1.0, least=1)
        self._work = 0.0  # linear sweeps, and others by their cost
        self._exact = Trial(_EXACT_SHARE)
        records, room = recorder(self.backend, context.config.cuda_graphs), context.memory_limit // 8
        self.recordings: dict[str, Recordings] = {
            hidden: Recordings(records, room, _RECORDED_AFTER, numbers=_RECORDED_NUMBERS)
            for hidden in (self._cheap_kind, "crown")
        }
        self._growing = True
        self._spec: Specification | None = None
        self._elements: dict[int, Tensor] = {}
        self.batch = self._batch_size()
        self.most = self._most_boxes()

    def _look_at_runs(self) -> None:
        """Have bounds hold for runs, unless a run may overflow and the real network will do."""
        if self.claims.run is None:
            return
        hull = Interval(self.table.lower.amin(0), self.table.upper.amax(0))
        shape = (1, *self.graph.whole.input_shape)
        box = Interval(*(self.backend.local_part(0, b.reshape(shape)) for b in hull))
        _, magnitudes = ibp.propagate(self.engine.using(replace(ROUNDED_64, run=self.claims.run)), box)
        self.statistics.covered.overflow = ibp.may_overflow(magnitudes, self.backend)
        if self.statistics.covered.overflow and self.claims.semantics is Semantics.BOTH:
            self.claims = Claims()
        self.arithmetic = replace(self.arithmetic, run=self.claims.run)

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
        bytes_each = rows * row_cost(self.graph.whole, 1, self.arithmetic.dtype).nbytes
        return max(_FEWEST, min(_MOST_DOMAINS, facts(self.backend.device).box_batch_bytes // bytes_each))

    def _most_boxes(self) -> int:
        """Domains of a round whose bounds fit into memory."""
        sizes = [node.size for node in self.graph.whole.nodes]  # the same on every rank
        numbers = sum(sizes) * _KEPT
        if self._cheap_kind == "linear":
            numbers += 4 * max(sizes) * self.table.varying.numel()
        size = numbers * torch.finfo(self.arithmetic.dtype).bits // 8
        return max(1, facts(self.backend.device).box_round_bytes // size)

    def sweep(self, batch: BoxDomains) -> Swept:
        """Close what can be closed: by the cheap sweep first, then with CROWN's hidden rows as far as they pay."""
        left = None
        if self._cheap_kind == "linear" or self._cheap.pays():
            left = self._confirmed(batch, self._cheap_kind)
            self._cheap.note(batch.count, batch.count - left.domains.count)
            self._work += batch.count
            batch = replace(left.domains, gap=left.value.float())
        count = self._crown_count(batch.count)
        if count == 0 and left is not None:
            return left
        # A sample is spread evenly.
        some = torch.arange(count, device=batch.case.device) * batch.count // count
        chosen = torch.zeros(batch.count, dtype=torch.bool, device=some.device).index_fill(0, some, True)
        parts = [self._tight(batch[part]) for part in chosen.nonzero()[:, 0].split(min(self.batch, self.most))]
        if count < batch.count:
            assert left is not None
            parts.append(left.select(~chosen))
        return Swept.cat(parts)

    def _crown_count(self, left: int) -> int:
        """How many of the domains that a cheap sweep leaves get CROWN's hidden rows: all, a sample, or none."""
        if self._crown.pays():
            return left
        if self.statistics.rounds % _SAMPLE_ROUNDS:
            return 0
        return min(left, _SAMPLE, int(_SAMPLE_SHARE * self._work / self._crown.cost))

    def _tight(self, batch: BoxDomains) -> Swept:
        """A sweep with CROWN's hidden rows, and what it was worth.

        Args:
            batch: ``gap`` is what the linear sweep found, if there was one.
        """
        left = self._confirmed(batch, "crown")
        if self._cheap_kind == "linear":
            self._work += self._crown.cost * batch.count
            few, after = batch[: 2 * _SAMPLE], left.select(torch.arange(left.domains.count)[: 2 * _SAMPLE])
            closed = (batch.count - left.domains.count) / batch.count
            saved = self.backend.agree(self._saved(few, after, closed))  # ranks choose the same sweeps
            self._crown.note(batch.count, batch.count * saved)
        return left

    def _saved(self, batch: BoxDomains, left: Swept, closed: float) -> float:
        """Linear sweeps that a sweep with hidden rows saved per domain.

        Args:
            batch: some of its domains. left: some of those that it left open.
            closed: share of the domains that it closed.
        """
        coordinates = self.table.varying.numel()
        value = batch.gap.double()
        saved = levels(value, torch.zeros_like(value), self._centre(batch), coordinates).exp2().clamp(min=_SUBTREE)
        total = closed * float(saved.mean())
        if left.domains.count:
            truth = self._centre(left.domains)
            replaced = levels(left.domains.gap.double(), left.value, truth, coordinates).exp2()
            total += (1 - closed) * _REPLACED * float(replaced.mean())
        return total

    def _centre(self, batch: BoxDomains) -> Tensor:
        """(B,) how far the case's rows are from being met at the boxes' centres."""
        return -self.slack(midpoints(self.table.boxes(batch)), batch.case)

    def slack(self, x: Tensor, case: Tensor) -> Tensor:
        """:meth:`CaseTable.slack` of points (P, n_in)."""
        network = self.graph.whole
        x = x.double() if network.rounds else x
        y = network.forward(x.reshape(x.shape[0], *network.input_shape), self.backend.weights)
        assert isinstance(y, Tensor)
        return self.table.slack(x, Graph.flat(y), case)

    def _confirmed(self, batch: BoxDomains, hidden: Hidden) -> Swept:
        """One sweep. Where float32's rounding errors may be to blame for an open domain, float64 has a go."""
        return self._really_open(self._open(batch, hidden), hidden)

    def _open(self, batch: BoxDomains, hidden: Hidden) -> Swept:
        """Domains that a sweep leaves open for all that bounds are to hold for."""
        left, _ = self._bound(batch, self.arithmetic, hidden)
        if self.arithmetic.dtype == torch.float64 or not self.arithmetic.rounding or left.domains.count == 0:
            return left
        # The error of a run stays what it is.
        rounding = left.rows.slack - left.rows.error
        near = (least(left.rows, left.domains.box) + 4 * rounding > 0).any(1)
        if self._exact.pays():
            near = torch.ones_like(near)
        count = int(near.sum())
        if count == 0:
            return left
        again, _ = self._bound(left.domains[near], replace(ROUNDED_64, run=self.claims.run), hidden)
        self._exact.note(count, count - again.domains.count)
        return Swept.cat([left.select(~near), again])

    def _really_open(self, left: Swept, hidden: Hidden) -> Swept:
        """Without the domains that are refuted for the real network and may be closed for that. The others are split
        further: mostly their children are refuted for runs too.

        What stays keeps the rows that hold for runs, since boxes are cut by them.
        """
        if self.claims.semantics is not Semantics.BOTH or left.domains.count == 0:
            return left
        box, rows = left.domains.box, left.rows
        value = least(rows, box)
        noisy = self._noisy(rows, box)
        waits = rows.refuted(real_part(value, rows.error)) | noisy
        near = (value + 4 * rows.slack > 0).any(1) | noisy
        if not self.claims.real_closes(self.statistics.waiting, self.statistics.bounded):
            near = near & ~cuttable(box).any(1)  # cells cannot wait
        self.statistics.waiting += int((waits & ~near).sum())
        if 2 * int(noisy.sum()) > left.domains.count:
            self.claims, self.arithmetic = Claims(), replace(self.arithmetic, run=None)
        at = near.nonzero()[:, 0]
        if not at.numel():
            return left
        _, still = self._bound(left.domains[at], ROUNDED_64, hidden)
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

    def cheap_factor(self) -> int:
        """How many batches of sweeps with hidden rows take as much memory as one without."""
        if self._crown.pays() and not self._cheap.mostly():
            return 1
        rows = 2 * max(node.size for node in self.graph.whole.nodes[1:])
        return max(1, min(64, rows // (2 * self.table.rows.shape[1] + 2 * self.table.varying.numel())))

    def _bound(self, batch: BoxDomains, arithmetic: Arithmetic, hidden: Hidden) -> tuple[Swept, Tensor]:
        """What one sweep leaves open, and (n,) which domains of the batch these are."""
        box = self.table.boxes(batch)
        shape = (batch.count, *self.graph.whole.input_shape)
        given = self.table.rows_of(batch.case, self.graph)
        reshaped = Interval(*(self.backend.local_part(0, b.reshape(shape)) for b in box))
        varying = self.table.varying
        found = self._bounded(arithmetic, reshaped, given, hidden)
        rows = halfspaces(found.walk, given.thresholds, box.to(torch.float64), varying, given.strict)
        value = least(rows, batch.box)
        keep = self.kept(rows, value, arithmetic)
        self._write(batch, keep, hidden, torch.zeros_like(given.thresholds))
        left, place = Swept(batch[keep], rows[keep], value.amax(1)[keep]), keep
        if given.thresholds.shape[1] > 1:
            rows, weights = combine(left.rows, left.domains.box, self.log is not None)
            value = least(rows, left.domains.box)
            best = torch.maximum(left.value, value.amax(1))
            keep = self.kept(rows, value, arithmetic)
            self._write(left.domains, keep, hidden, weights)
            left, place = Swept(left.domains[keep], rows[keep], best[keep]), place[keep]
        if given.strict is not None:
            open_ = self._untouched(left, place, given, found.bounds)
            left, place = left.select(open_), place[open_]
        return left, place

    def _write(self, batch: BoxDomains, keep: Tensor, hidden: Hidden, weights: Tensor) -> None:
        """Write down the boxes of a batch that are not kept, and the weights (B, S) of rows that close them."""
        if self.log is None or keep.numel() == batch.count:
            return
        gone = torch.ones(batch.count, dtype=torch.bool, device=keep.device).index_fill(0, keep, False)
        closed, weights = batch[gone], weights.expand(batch.count, -1)[gone]
        self.log.note(closed.case, closed.lower, closed.upper, hidden, weights)

    def _bounded(self, arithmetic: Arithmetic, box: Interval, given: BoxRows, hidden: Hidden) -> Bounded:
        """Bounds of boxes, by a recording where launches would take longer than the work."""
        engine, varying = self.engine.using(arithmetic), self.table.varying
        recordings, alone = self.recordings[hidden], self.log is not None
        if recordings.possible and given.strict is None and not (self._growing and hidden == "crown"):
            rows = self._elements if hidden == "crown" else None
            spec = self._spec = given.spec if self._spec is None or not self.table.single else self._spec
            batch = box.lower.shape[0]
            free = () if self.table.single else tuple(t for t in (spec.y, spec.x) if t is not None)

            def work(lower: Tensor, upper: Tensor, *free: Tensor) -> Outputs:
                asked = Specification(*free) if free else spec  # a fixed one is read where it is
                now = bound_boxes(engine.unhurried(), Interval(lower, upper), asked, hidden, varying, rows, alone)
                walk, lead = now.walk, now.lower.shape
                numbers = (walk.constant, walk.rounding_error, walk.error)
                return (now.lower, walk.a.expand(*lead, *walk.a.shape[2:]), *(t.expand(lead) for t in numbers))

            inputs = (*box, *(t.expand(batch, *t.shape[1:]) for t in free))
            key = (arithmetic.dtype, arithmetic.rounding, arithmetic.run is None, hidden)
            out = recordings.run(key, self._width(hidden), inputs, work)
            if out is not None:
                lower, a, constant, rounding_error, error = out
                return Bounded(lower, Walk(a, constant, rounding_error, error), {})
        found = bound_boxes(engine, box, given.spec, hidden, varying, alone=alone)
        if recordings.possible and hidden == "crown":
            self._note_elements(found.elements)
        return found

    def _width(self, hidden: Hidden) -> int:
        """Numbers that a box adds to the widest tensor of a sweep."""
        rows = self.table.rows.shape[1]
        if hidden == "crown":
            rows = max([rows, *(2 * e.shape[0] for e in self._elements.values())])
        elif hidden == "linear":
            rows = max(rows, self.table.varying.numel())
        return rows * max(node.size for node in self.graph.nodes)

    def _note_elements(self, found: Mapping[int, Tensor]) -> None:
        """A recording has rows for all elements that were undecided on some box before it was made. None is made until
        hardly any element is new: boxes shrink, and the few that follow have interval bounds."""
        merged = {i: torch.cat([self._elements.get(i, e[:0]), e]).unique() for i, e in found.items()}
        merged = {**self._elements, **merged}
        before, after = (sum(e.shape[0] for e in some.values()) for some in (self._elements, merged))
        self._elements, self._growing = merged, after - before > _NEW_ELEMENTS * after

    def close(self) -> None:
        """Give up the memory of recordings; the search goes on without them."""
        for kept in self.recordings.values():
            kept.close()

    def kept(self, rows: Halfspaces, value: Tensor, arithmetic: Arithmetic) -> Tensor:
        """(n,) positions of the domains that their rows' bounds (B, S) do not refute; notes what those of the others
        hold for."""
        sure = value if self.log is None else value - _ROOM * (rows.slack + 1e-12 * rows.c.abs().nan_to_num(posinf=0.0))
        gone = rows.refuted(sure)
        gap, row = value.max(1)
        error = rows.error.gather(1, row[:, None])[:, 0]
        self.statistics.covered.note(gap[gone], error[gone], int(gone.sum()) if arithmetic.run is None else 0)
        return (~gone).nonzero()[:, 0]

    def _untouched(self, left: Swept, place: Tensor, rows: BoxRows, bounds: dict[int, Interval]) -> Tensor:
        """(n,) positions of the domains but those whose strict rows only touch their thresholds; whole boxes are always
        tried.

        Args:
            place: of the domains that are left in the batch that ``rows`` and ``bounds`` describe.
        """
        strict, thresholds = rows.strict, rows.thresholds
        assert strict is not None
        among = torch.zeros(strict.shape[0], dtype=torch.bool, device=strict.device)
        among[place] = near(left.value, thresholds[place], strict[place]) | (left.domains.depth == 0)
        if self.claims.semantics is Semantics.FLOAT32:  # nothing is left for the error of a run
            return torch.arange(left.domains.count, device=place.device)
        found = touched(self.engine, bounds, rows.spec, thresholds, strict, among)
        self.statistics.covered.weak += int(found[place].sum())
        return (~found[place]).nonzero()[:, 0]


def _products(node: Node) -> int:
    """Multiplications behind a node's value, roughly."""
    return node.size + sum(math.prod(h.shape) for h in node.op.handles if len(h.shape) > 1)
