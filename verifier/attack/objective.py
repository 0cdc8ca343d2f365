"""The objective that attacks maximise: the smallest slack over the rows of a case, for many points at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verifier.attack.heads import Head, find_head
from verifier.attack.surrogate import guided
from verifier.core.device import facts
from verifier.core.handles import WeightStore
from verifier.core.problem import Problem
from verifier.graph.graph import Graph


@dataclass(frozen=True)
class Objective:
    """The cases under attack on a device. P points, S rows per case, n inputs, K boxes, N cases, M distinct rows.

    Scores are slacks divided by the norm of their row, so that rows and cases compare; the sign is that of the slack.

    Attributes:
        lower, upper: (K, n), the boxes witnesses must lie in, in the type of the network's input.
        row_y: (M, n_out) float64; row_x: (M, n) float64 or None; row_d: (M,) float64.
        weight: (M,) float64, one over the norm of each row.
        case_box: (N,) box of each case, ascending; case_rows: (N, S >= 1) rows of each case, padded with -1.
        batch: points per pass over the network.
        cost: multiply-adds of one evaluation, roughly.
        head: the last function of a network whose rows are over what that is fed; ``n_out`` then counts what
            :meth:`outputs` gives.
        true_y, true_d: with a head, the rows over the network's own outputs: (M, n_out) and (M,) float64.
    """

    graph: Graph
    store: WeightStore
    lower: Tensor
    upper: Tensor
    row_y: Tensor
    row_x: Tensor | None
    row_d: Tensor
    weight: Tensor
    case_box: Tensor
    case_rows: Tensor
    batch: int
    cost: float
    head: Head | None = None
    true_y: Tensor | None = None
    true_d: Tensor | None = None

    @property
    def n_in(self) -> int:
        return int(self.lower.shape[1])

    @property
    def n_boxes(self) -> int:
        return int(self.lower.shape[0])

    @property
    def n_cases(self) -> int:
        return int(self.case_box.shape[0])

    @property
    def device(self) -> torch.device:
        return self.lower.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the points: of the network's input."""
        return self.lower.dtype

    @property
    def step_cost(self) -> float:
        """Multiply-adds of a gradient step of one point."""
        return 3 * self.cost

    def batches(self, n: int, size: int | None = None) -> Iterator[slice]:
        """Slices of at most ``size`` (default: ``batch``) that cover ``n`` points."""
        size = max(1, size or self.batch)
        return (slice(i, min(i + size, n)) for i in range(0, n, size))

    def outputs(self, x: Tensor) -> Tensor:
        """(P, n) points to (P, n_out) outputs in the dtype of ``x``, in float64 where the network rounds to float32.

        One pass, so P must fit the batch.
        """
        x = x.double() if self.graph.rounds else x
        x = x.reshape(x.shape[0], *self.graph.input_shape)
        if self.head is None:
            y = self.graph.forward(x, self.store)
            assert isinstance(y, Tensor)
            return self.graph.flat(y)
        values = self.graph.forward(x, self.store, keep=(self.head.node, self.graph.output))
        assert isinstance(values, dict)
        return self.head.extended(values[self.head.node].flatten(1), values[self.graph.output].flatten(1))

    def slacks(self, x: Tensor, y: Tensor, case: Tensor) -> Tensor:
        """Weighted slack of every row of each point's case, (P, S) float64: +inf for padding, -inf where the network's
        output is not finite."""
        rows = self.case_rows[case]
        index = rows.clamp(min=0)
        x, y = x.double(), y.double()
        if self._small_table:
            value = y @ self.row_y.T
            if self.row_x is not None:
                value = value + x @ self.row_x.T
            slack = ((self.row_d - value) * self.weight).gather(1, index)
        else:
            value = torch.einsum("pso,po->ps", self.row_y[index], y)
            if self.row_x is not None:
                value = value + torch.einsum("psn,pn->ps", self.row_x[index], x)
            slack = (self.row_d[index] - value) * self.weight[index]
        if self.true_y is not None and self.true_d is not None:  # rounding may make a row hold that is over z, or not
            true = (self.true_d - y @ self.true_y.T).gather(1, index)
            slack = torch.where(true >= 0, torch.maximum(slack, true), slack)
        bad = ~torch.isfinite(y).all(1, keepdim=True) | torch.isnan(slack)
        return slack.masked_fill(bad, -torch.inf).masked_fill(rows < 0, torch.inf)

    def depth(self, x: Tensor, y: Tensor, case: Tensor) -> Tensor:
        """Smallest slack relative to the size of the row's terms, (P,) float64; what a margin is measured in."""
        index = self.case_rows[case].clamp(min=0)
        scale = self.row_d[index].abs() + torch.einsum("pso,po->ps", self.row_y[index].abs(), y.double().abs())
        if self.row_x is not None:
            scale = scale + torch.einsum("psn,pn->ps", self.row_x[index].abs(), x.double().abs())
        scale = scale * self.weight[index] + torch.finfo(torch.float32).tiny
        return (self.slacks(x, y, case) / scale).amin(1)

    @torch.no_grad()
    def score(self, x: Tensor, case: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest weighted slack (P,) of points and their outputs (P, n_out), batch by batch."""
        parts = [self.outputs(x[s]) for s in self.batches(x.shape[0])]
        y = torch.cat(parts) if parts else x.new_zeros(0, self.row_y.shape[1])
        return self.slacks(x, y, case).amin(1), y

    def gradient(self, x: Tensor, case: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (P,), outputs (P, n_out) and the gradient (P, n) of a smoothed minimum of the slacks.

        Args:
            temperature: (P,), width of the smoothing relative to the spread of the case's slacks; 0: the smallest only.
        """
        scores, outputs, gradients = [], [], []
        for s in self.batches(x.shape[0]):
            leaf = x[s].detach().requires_grad_()
            with torch.enable_grad():
                y = self.outputs(leaf)
            slack = self.slacks(leaf.detach(), y.detach(), case[s])
            weights = _soft_minimum(slack, temperature[s])
            gradients.append(self.pull_back(leaf, y, case[s], weights))
            scores.append(slack.amin(1))
            outputs.append(y.detach())
        return torch.cat(scores), torch.cat(outputs), torch.cat(gradients)

    def pull_back(self, leaf: Tensor, y: Tensor, case: Tensor, weights: Tensor) -> Tensor:
        """Gradient with respect to ``leaf`` (P, n) of the sum of ``weights`` (P, S) times weighted slacks; NaN is 0."""
        rows = self.case_rows[case]
        index = rows.clamp(min=0)
        w = (weights * self.weight[index]).masked_fill(rows < 0, 0.0)
        if self._small_table:
            table = w.new_zeros(w.shape[0], self.row_y.shape[0]).scatter_add_(1, index, w)
            cotangent = table @ self.row_y
            direct = table @ self.row_x if self.row_x is not None else None
        else:
            cotangent = torch.einsum("ps,pso->po", w, self.row_y[index])
            direct = torch.einsum("ps,psn->pn", w, self.row_x[index]) if self.row_x is not None else None
        # A scalar needs no grad_outputs, whose check would import sympy (half a second).
        with torch.enable_grad():
            total = (y * -cotangent.to(y.dtype)).sum()
        g = gradient(total, leaf)
        if direct is not None:
            g = g - direct.to(g.dtype)
        return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)

    def boxes(self, case: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (P, n) of the boxes of cases (P,)."""
        box = self.case_box[case]
        return self.lower[box], self.upper[box]

    @property
    def _small_table(self) -> bool:
        """Whether evaluating all rows at every point is cheaper than gathering each point's own."""
        return self.row_y.shape[0] <= max(64, 2 * self.case_rows.shape[1])


def inside(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Points moved into their boxes, bit-exactly; what is not a number becomes the lower bound."""
    x = torch.where(torch.isnan(x), lower, x)
    return torch.minimum(torch.maximum(x, lower), upper)


def build_objective(
    graph: Graph, store: WeightStore, problem: Problem, device: torch.device, cases: Sequence[int] | None = None
) -> Objective:
    """The objective of some cases of a problem (default all); cases over empty boxes are left out."""
    chosen = np.arange(problem.n_cases) if cases is None else np.unique(np.asarray(cases, dtype=np.int64))
    nonempty = np.asarray(np.all(problem.witness_lower <= problem.witness_upper, axis=1))
    chosen = chosen[nonempty[problem.case_box[chosen]]]
    chosen = chosen[np.argsort(problem.case_box[chosen], kind="stable")]
    used, case_box = np.unique(problem.case_box[chosen], return_inverse=True)
    rows = problem.case_rows[chosen]
    if rows.shape[1] == 0:
        rows = np.full((len(chosen), 1), -1, dtype=np.int64)
    row_y, row_x, row_d = problem.row_y, problem.row_x, problem.row_d
    row_d = row_d if problem.row_d_inner is None else problem.row_d_inner
    if row_y.shape[0] == 0:
        row_y, row_d = np.zeros((1, problem.n_out)), np.zeros(1)
        row_x = None
    head, true_y, true_d = find_head(graph, store, problem, device), None, None
    if head is not None:
        fixed = np.zeros(len(row_d), dtype=bool) if row_x is None else np.any(row_x != 0, axis=1)
        over, level, moved = head.rows(row_y, row_d, fixed)
        head = replace(head, alone=bool(moved.all())) if moved.any() else None
        if head is not None:
            true_y, true_d = np.pad(row_y, ((0, 0), (2 * problem.n_out, 0))), row_d
            row_y, row_d = over, level
    square = (row_y**2).sum(1) + (0.0 if row_x is None else (row_x**2).sum(1))
    weight = np.where(square > 0, 1.0 / np.sqrt(np.where(square > 0, square, 1.0)), 1.0)

    def put(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(device)

    per_point = 3 * problem.witness_lower.itemsize * sum(node.size for node in graph.nodes)
    batch = min(facts(device).attack_batch_points, max(1, facts(device).attack_batch_bytes // per_point))
    return Objective(
        graph=guided(graph),
        store=store,
        lower=put(problem.witness_lower[used]),
        upper=put(problem.witness_upper[used]),
        row_y=put(row_y),
        row_x=None if row_x is None else put(row_x),
        row_d=put(row_d),
        weight=put(weight),
        case_box=put(case_box.astype(np.int64).reshape(-1)),
        case_rows=put(rows.astype(np.int64)),
        batch=batch,
        cost=graph.multiply_adds,
        head=head,
        true_y=None if true_y is None else put(true_y),
        true_d=None if true_d is None else put(true_d),
    )


def _soft_minimum(slack: Tensor, temperature: Tensor) -> Tensor:
    """Weights (P, S) of a softened minimum; the smallest slack's alone where the temperature is 0."""
    slack = slack.clamp(-1e300, 1e300)
    low = slack.amin(1, keepdim=True)
    hard = torch.zeros_like(slack).scatter_(1, slack.argmin(1, keepdim=True), 1.0)
    finite = slack < 1e300
    spread = torch.where(finite, slack - low, torch.zeros_like(slack)).amax(1, keepdim=True)
    t = temperature[:, None].double() * spread
    soft = torch.softmax(torch.where(finite, (low - slack) / t.clamp(min=1e-300), -torch.inf), 1)
    return torch.where((t > 0) & torch.isfinite(soft), soft, hard)


def gradient(total: Tensor, leaf: Tensor) -> Tensor:
    """Gradient of a sum with respect to ``leaf``; zero where the network leads to it through steps alone."""
    found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(leaf) if found is None else found
