"""A program whose splits and rows may be violated at a price: it has an optimum in every domain.

Whether a domain of nearly contradictory splits has a point is a question that a solver with tolerances may leave open.
How much all that is asked of the domain must be violated in sum is one that it answers: e_k >= 0 is what a split of
neuron k is violated by, r_s >= 0 what a row is, and their sum is minimised. Where that is positive there is no point,
and the duals of the optimum are the multipliers of a proof, none of a split or a row larger than 1.
"""

from __future__ import annotations

import numpy as np

from verifier.bab.learning.programs import Program, solver_of


class Elastic:
    """The program, and the domain that it is set to.

    Args:
        program: rows without splits, the case's own last; they stay as they are but for these.
        box: (low, high) of the columns without splits.
        z, h: columns (U,) of the neurons that may be split; ``tie``: rows h - z of these.
        rows: S, of the case.
    """

    def __init__(
        self,
        program: Program,
        box: tuple[np.ndarray, np.ndarray],
        z: np.ndarray,
        h: np.ndarray,
        tie: np.ndarray,
        rows: int,
    ) -> None:
        n, m, u = program.columns, len(program.lower), len(z)
        self.columns, self.rows, self.tie, self.count = n, m, tie, u
        own, here = np.arange(m - rows, m), np.arange(u)
        at = [program.at, own]
        column = [program.column, n + u + np.arange(rows)]
        value = [program.value, -np.ones(rows)]
        # Of every neuron: z + e >= 0, z - e <= 0, h - z - e <= 0 and h - e <= 0; free as long as it is not split.
        for block, (on_z, on_h, on_e) in enumerate(((1, 0, 1), (1, 0, -1), (-1, 1, -1), (0, 1, -1))):
            for place, weight in ((z, on_z), (h, on_h), (n + here, on_e)):
                if weight:
                    at.append(m + block * u + here)
                    column.append(place)
                    value.append(np.full(u, float(weight)))
        free = np.full(4 * u, np.inf)
        order = np.argsort(np.concatenate(at), kind="stable")
        self.program = Program(
            np.concatenate(at)[order],
            np.concatenate(column)[order],
            np.concatenate(value)[order],
            np.concatenate([program.lower, -free]),
            np.concatenate([program.upper, free]),
            n + u + rows,
        )
        more = np.zeros(u + rows)
        low, high = np.concatenate([box[0], more]), np.concatenate([box[1], more + np.inf])
        cost = np.concatenate([np.zeros(n), more + 1.0])
        self.solver = solver_of(self.program, (low, high), cost)
        self.signs = np.zeros(u, dtype=np.int8)

    def solve(self, signs: np.ndarray, seconds: float) -> tuple[float, np.ndarray, np.ndarray, int] | None:
        """The least violation of a domain in sum, the columns there, multipliers of the rows without splits, and
        iterations of the simplex method; None when there was no time.

        Args:
            signs: (U,) +1 for z >= 0, -1 for z <= 0, 0 for none.
        """
        import highspy

        self._move(signs)
        solver = self.solver
        solver.setOptionValue("time_limit", solver.getRunTime() + max(seconds, 0.01))
        solver.run()
        iterations = max(0, int(solver.getInfo().simplex_iteration_count))
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        found = solver.getSolution()
        duals = np.array(found.row_dual)
        y = duals[: self.rows].copy()
        y[self.tie] += duals[self.rows + 2 * self.count : self.rows + 3 * self.count]  # the same row, bounded above
        total = float(solver.getInfo().objective_function_value)
        return total, np.array(found.col_value)[: self.columns], y, iterations

    def _move(self, signs: np.ndarray) -> None:
        """Change the sides of the rows that tell the domain from the last one."""
        changed = np.flatnonzero(signs != self.signs)
        self.signs = signs.astype(np.int8)
        if not changed.size:
            return
        active, inactive = signs[changed] > 0, signs[changed] < 0
        infinite = np.full(len(changed), np.inf)
        sides = (
            (np.where(active, 0.0, -infinite), infinite),
            (-infinite, np.where(inactive, 0.0, infinite)),
            (-infinite, np.where(active, 0.0, infinite)),
            (-infinite, np.where(inactive, 0.0, infinite)),
        )
        at = np.concatenate([self.rows + block * self.count + changed for block in range(4)]).astype(np.int32)
        low, high = (np.concatenate([side[k] for side in sides]) for k in (0, 1))
        self.solver.changeRowsBounds(len(at), at, low, high)
