"""The multiple-choice knapsack as a mixed-integer programme for HiGHS.

    minimise sum_l c[l, j(l)]    subject to    sum_l w_k[l, j(l)] <= W_k    for each limit k,

with one choice j(l) in each group l (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11). Costs and
weights are counted from the least of their group and scaled by what is within reach, so that values of 1e-6 and of 1e3
fit into one programme in spite of the solver's absolute tolerances.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sepdeploy.core.quiet import silenced_native_stdout
from sepdeploy.errors import ToolError, UsageError

__all__ = ["Knapsack", "Limit"]

Values = NDArray[np.float64]
"""(choices,): one number for each choice of each group, group after group."""

Picked = tuple[int, ...]
"""Indices of the choices that are taken, one per group."""

_TIE = 1e-7
"""Share of the least cost below which two costs count as equal, so that the tie-break decides."""

_COST_SCALE = 1e6
"""The least cost in the solver's units: its absolute gap of 1e-6 is then 1e-12 of it."""

_WEIGHT_SCALE = 1e3
"""A limit in the solver's units: its feasibility tolerance of 1e-6 is then 1e-9 of it."""

_FIRST_GAP = 1e-3
"""Relative gap of the first solve."""

_FEW = 4
"""Choices of each group in the first solve."""

_SOLVED, _OUT_OF_TIME, _INFEASIBLE = 0, 1, 2  # statuses of scipy.optimize.milp


@dataclass(frozen=True, slots=True)
class Limit:
    """A sum that must not be exceeded.

    Attributes:
        values: Of each choice.
        most: Most that the sum over the groups may be.
    """

    values: Values
    most: float


@dataclass(frozen=True, slots=True)
class _Run:
    """What one solve returned: the best choice found, and what the cost above the least cannot be below."""

    picked: Picked | None
    lower: float
    is_finished: bool


class Knapsack:
    """One choice in each group, of least cost within all limits.

    Args:
        sizes: Choices in each group, at least one.
        costs: Of each choice.
        tie_break: Values that decide between equal costs, the less the better, the first before the second.
        limits: What must not be exceeded, one or more; each can be kept alone.
    """

    def __init__(
        self, sizes: Sequence[int], costs: Values, tie_break: Sequence[Values], limits: Sequence[Limit]
    ) -> None:
        self._groups = np.repeat(np.arange(len(sizes)), sizes)
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._costs, self._tie_break, self._limits = costs, tie_break, limits
        self._weights = []
        for limit in limits:
            least = self._least(limit.values)
            self._weights.append((limit.values - least, max(0.0, limit.most - math.fsum(least[self._starts]))))
        self._fits = np.logical_and.reduce([weights <= capacity for weights, capacity in self._weights])
        self._above = np.where(self._fits, costs - self._least(np.where(self._fits, costs, np.inf)), 0.0)
        self._excluded: list[Picked] = []

    def search(self, time_limit_s: float) -> tuple[Picked, float] | None:
        """The best choice, and its gap: the most by which another could be better, as a share of its |cost|.

        A first solve among the few most promising choices of each group tells which costs are within reach. The exact
        one leaves out what the relaxation proves to be in nothing better (Pisinger, "A minimal algorithm for the
        multiple-choice knapsack problem", 1995), and scales costs so that the solver's tolerances hide no difference.

        Returns:
            None if no choice keeps all limits; a gap of 0 if none is better.

        Raises:
            UsageError: if none was found in time.
            ToolError: if the solver fails.
        """
        deadline = time.monotonic() + time_limit_s
        if not np.logical_or.reduceat(self._fits, self._starts).all():
            return None
        best = self._start()
        span = self._most_of_groups(self._above)
        lower, reduced = self._relaxed(span or 1.0)
        run = self._run(self._most_promising(reduced), span, _FIRST_GAP, deadline)
        if run is not None and run.picked is not None:
            best = min(filter(None, (best, run.picked)), key=self._cost)
        unit = span if best is None else self._cost(best)
        is_open = self._fits & (self._above <= unit * (1 + 1e-9)) & (reduced <= unit - lower + _TIE * unit)
        run = self._run(is_open if best else self._fits, unit, 0.0, deadline)
        if run is not None and run.picked is not None:
            if run.is_finished:
                return run.picked, 0.0
            best = min(filter(None, (best, run.picked)), key=self._cost)
        if best is None:
            if run is None:
                return None
            raise UsageError(f"no plan that keeps all limits was found in {time_limit_s:g} s; loosen one of them")
        missing = self._cost(best) - max(lower, run.lower if run is not None else lower)
        total = abs(math.fsum(self._costs[list(best)]))
        return best, 0.0 if missing <= 0 else missing / total if total else math.inf

    def _relaxed(self, unit: float) -> tuple[float, Values]:
        """What the Lagrange relaxation proves, with the multipliers of the linear programme, solved in units of `unit`.

        Returns:
            lower: What no choice's cost above the least is below.
            reduced: (choices,): by how much more it is above `lower`, at least, with one choice forced in; infinite for
                those that exceed a limit alone.
        """
        from scipy.optimize import linprog

        rows, capacities = self._limit_rows(self._fits)
        solved = linprog(
            self._above * (_WEIGHT_SCALE / unit),
            A_ub=rows,
            b_ub=capacities,
            A_eq=self._one_per_group(),
            b_eq=np.ones(len(self._starts)),
            bounds=np.stack([np.zeros(len(self._costs)), self._fits], axis=1),
        )
        # Any multipliers give a valid bound; without a solution those of no limits at all.
        multipliers = np.maximum(0.0, -solved.ineqlin.marginals) if solved.status == _SOLVED else 0 * capacities
        multipliers *= unit / _WEIGHT_SCALE
        penalised = np.where(self._fits, self._above + multipliers @ rows, np.inf)
        least = self._least(penalised)
        return math.fsum(least[self._starts]) - float(multipliers @ capacities), penalised - least

    def _most_promising(self, reduced: Values) -> NDArray[np.bool_]:
        """Those of the least reduced costs in each group."""
        ranks = np.empty(len(reduced), dtype=np.intp)
        ranks[np.lexsort((reduced, self._groups))] = np.arange(len(reduced)) - self._starts[self._groups]
        return np.logical_and(self._fits, ranks < _FEW)

    def _one_per_group(self) -> Any:
        """(groups, choices): 1 where a choice belongs to the group."""
        from scipy.sparse import csr_array

        indices = np.arange(len(self._costs))
        return csr_array((np.ones(len(indices)), (self._groups, indices)))

    def _limit_rows(self, is_open: NDArray[np.bool_]) -> tuple[Values, Values]:
        """The limits in the solver's units, (limits, choices) and (limits,); 0 for choices that are not open."""
        rows = np.where(is_open, np.stack([weights for weights, _ in self._weights]), 0.0)
        capacities = np.array([capacity for _, capacity in self._weights])
        scales = np.maximum(capacities, rows.max(axis=1))
        scales[scales == 0] = 1.0
        return rows * (_WEIGHT_SCALE / scales)[:, None], capacities * (_WEIGHT_SCALE / scales)

    def _least(self, values: Values) -> Values:
        """(choices,): the least value in each choice's group."""
        least: Values = np.minimum.reduceat(values, self._starts)[self._groups]
        return least

    def _most_of_groups(self, values: Values) -> float:
        return float(np.maximum.reduceat(values, self._starts).sum())

    def _cost(self, picked: Picked) -> float:
        return math.fsum(self._above[list(picked)])

    def _keeps(self, picked: Picked) -> bool:
        return all(math.fsum(limit.values[list(picked)]) <= limit.most for limit in self._limits)

    def _start(self) -> Picked | None:
        """The cheapest of those that are lightest for one limit and keep the others; None if none does."""
        ends = [*self._starts[1:], len(self._costs)]
        groups = [slice(start, end) for start, end in zip(self._starts, ends, strict=True)]
        lightest = (
            tuple(int(group.start + limit.values[group].argmin()) for group in groups) for limit in self._limits
        )
        return min(filter(self._keeps, lightest), key=self._cost, default=None)

    def _run(self, is_open: NDArray[np.bool_], unit: float, gap: float, deadline: float) -> _Run | None:
        """One solve among the open choices, with costs in units of `unit`; None if none of them keep all limits.

        A choice that exceeds a limit by less than the solver's tolerance is excluded, and the rest solved again.
        """
        unit = unit or 1.0
        costs = np.where(is_open, _COST_SCALE * (self._above / unit + _TIE * self._ties(is_open)), 0.0)
        while True:
            result = self._call_highs(costs, is_open, gap, max(0.01, deadline - time.monotonic()))
            if result.status == _INFEASIBLE:
                return None
            if result.status not in (_SOLVED, _OUT_OF_TIME):
                raise ToolError(f"the solver for the best plan failed: {result.message}")
            bound = -math.inf if result.mip_dual_bound is None else result.mip_dual_bound
            lower = (bound / _COST_SCALE - _TIE) * unit
            if result.x is None:
                return _Run(None, lower, is_finished=False)
            picked = tuple(np.flatnonzero(result.x > 0.5).tolist())
            if self._keeps(picked):
                return _Run(picked, lower, is_finished=result.status == _SOLVED)
            self._excluded.append(picked)

    def _ties(self, is_open: NDArray[np.bool_]) -> Values:
        """What decides between equal costs, about 1 at most in all; each counts a thousandth of the one before."""
        total = np.zeros(len(self._costs))
        for rank, values in enumerate(self._tie_break):
            above = np.where(is_open, values - self._least(values), 0.0)
            total += 1e-3**rank * above / (self._most_of_groups(above) or 1.0)
        return total

    def _call_highs(self, costs: Values, is_open: NDArray[np.bool_], gap: float, seconds: float) -> Any:
        """`scipy.optimize.milp` over 0-1 variables, one per choice; those not open are fixed at 0."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows, capacities = self._limit_rows(is_open)
        constraints = [
            LinearConstraint(self._one_per_group(), 1, 1),
            LinearConstraint(rows, -np.inf, capacities),
            *(
                LinearConstraint(np.isin(np.arange(len(costs)), picked).astype(np.float64), -np.inf, len(picked) - 1)
                for picked in self._excluded
            ),
        ]
        # HiGHS 1.12 announces there that it repairs a solution, even when told to be silent.
        with silenced_native_stdout():
            return milp(
                costs,
                integrality=np.ones(len(costs)),
                bounds=Bounds(0, is_open.astype(np.float64)),
                constraints=constraints,
                options={"mip_rel_gap": gap, "time_limit": seconds},
            )
