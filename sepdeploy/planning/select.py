"""Choose a form for every layer: search the damage budget until the measured drop meets the limit.

The damages of single layers do not add up, and no damage says how many points it costs. So the solver's plans along the
front of cost and damage are carried out and measured: the last one that holds the limit is found by bisection, then
budgets between it and the first that breaks it are solved anew. Every plan is transferred and measured as a whole, so
what the sums mispredict is corrected by measurement, and the network handed over has been measured on all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_bytes
from sepdeploy.core.measurement import Quality
from sepdeploy.core.options import AUTO
from sepdeploy.core.plan import Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.core.report import GuardStep, LayerTransfer
from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.planning.convert import TransferMemory, convert_network
from sepdeploy.planning.evaluate import Evaluator
from sepdeploy.planning.guard import Guarded, GuardMemory
from sepdeploy.planning.solve import Limits, Objective, Solution, pareto_front, solve
from sepdeploy.transfer.layer import Batches, TransferMethod

__all__ = ["Search", "plan_of"]

_FRONT_POINTS = 24
_REFINEMENTS = 2
"""Budgets solved anew between the last plan that holds and the first that does not."""

_FINAL_TRIES = 3
"""Plans measured in full, each with a smaller budget than the one before, until the original is left."""


def plan_of(
    trace: Trace, layers: Sequence[LayerChoices], chosen: Mapping[str, Choice], unit: str, lowered_for: str
) -> Plan:
    """The plan that makes of every layer what was chosen for it.

    Args:
        trace: The network.
        layers: What was weighed; sites that are not among them are kept for their own reason.
        chosen: Layer -> one of its choices.
        unit: Of the prices, for the reasons.
        lowered_for: What they were priced on, as in `Plan`.
    """
    weighed = {layer.name: layer for layer in layers}

    def outcome(name: str) -> Replaced | Kept:
        if name not in weighed:
            return Kept(trace.site(name).reason or Reason.NOTHING_WEIGHED, "the plan does not list it")
        layer = weighed[name]
        choice = chosen[name]
        if choice.candidate is not None:
            return Replaced(replace(choice.candidate, lowering=choice.lowering))
        return layer.kept or _why_kept(layer, unit)

    decisions = (Decision(site.name, site.macs, site.params, outcome(site.name)) for site in trace.sites)
    return Plan(AUTO, SchemeOptions(), tuple(decisions), lowered_for)


def _why_kept(layer: LayerChoices, unit: str) -> Kept:
    others = layer.choices[1:]
    if not others:
        return Kept(Reason.NOTHING_WEIGHED, "; ".join(f"{label}: {why}" for label, why in layer.refused.items()))
    fastest = min(others, key=lambda choice: choice.difference)
    numbers = f"{fastest.label}: {fastest.difference:+.3g} {unit}, damage {fastest.damage:.3g}"
    return Kept(Reason.NOT_FASTER if fastest.difference >= 0 else Reason.NOT_CHOSEN, numbers)


class Search:
    """One search for the best plan.

    Args:
        original: The trained network in eval mode.
        trace: Its trace.
        layers: What was weighed.
        unit: Of the prices.
        lowered_for: What they were priced on, as in `Plan`.
        batches: Calibration images for the transfer.
        evaluator: Measures on the validation images.
        minimize: What the solver makes small, damage apart.
        limits: What holds besides the drop; a limit of damage is set by the search.
        method: How weights are found.
        memory: What an earlier run with the same inputs measured; it is extended.
        progress: Called with a line of text before each longer step.

    Attributes:
        gap: Most by which a plan could be better than the solver's, where it ran out of time; 0 if none can.
    """

    def __init__(
        self,
        original: nn.Module,
        trace: Trace,
        layers: tuple[LayerChoices, ...],
        unit: str,
        lowered_for: str,
        batches: Batches,
        evaluator: Evaluator,
        *,
        minimize: Objective,
        limits: Limits,
        method: TransferMethod,
        memory: GuardMemory,
        progress: Callable[[str], None],
    ) -> None:
        self.original, self.trace, self.layers = original, trace, layers
        self.unit, self.lowered_for = unit, lowered_for
        self.batches, self.evaluator, self.method = batches, evaluator, method
        self.minimize, self.limits, self.memory, self.progress = minimize, limits, memory, progress
        self._transfers: dict[bool, TransferMemory] = {True: {}, False: {}}  # quick, in full
        self._steps: list[GuardStep] = []
        self.gap = 0.0

    def within_drop(self, limit_points: float) -> Guarded:
        """The cheapest network whose measured drop is at most the limit; at the end of all tries the original."""
        front = pareto_front(self.layers, minimize=self.minimize, points=_FRONT_POINTS, limits=self.limits)
        self.gap = max(solution.gap for solution in front)
        low, high = -1, len(front)
        while high - low > 1:
            middle = (low + high) // 2
            if self._holds(front[middle], limit_points):
                low = middle
            else:
                high = middle
        held = front[low] if low >= 0 else self.nothing()
        broken = front[high].damage if high < len(front) else math.nan
        for _ in range(_REFINEMENTS if high < len(front) else 0):
            between = self._solved(_middle(held.damage, broken))
            if between.chosen == held.chosen:
                break
            if self._holds(between, limit_points):
                held = between
            else:
                broken = between.damage
        return self._finished_within(held, limit_points)

    def least_damage(self) -> Plan:
        """The plan of the least damage within the limits, whatever it loses.

        Raises:
            UnreachableLimitError: if there is none.
        """
        solution = solve(self.layers, minimize="damage", limits=self.limits)
        self.gap = solution.gap
        return self._plan(solution)

    def front(self, points: int, images: int) -> Iterator[tuple[Solution, Quality]]:
        """Plans from the least damage to the least cost, transferred quickly, with their quality on some images."""
        for solution in pareto_front(self.layers, minimize=self.minimize, points=points, limits=self.limits):
            self.progress(f"selection: front, predicted {solution.difference:+.3g} {self.unit}")
            yield self.measured(solution.chosen, images)

    def measured(self, chosen: Mapping[str, Choice], images: int) -> tuple[Solution, Quality]:
        """One such plan."""
        solution = self._of(chosen)
        network = self.sketch(self._plan(solution))
        return solution, self.evaluator.quality(network, most=images)[0]

    def _of(self, chosen: Mapping[str, Choice]) -> Solution:
        """Given choices with their sums."""
        only = tuple(replace(layer, choices=(chosen[layer.name],)) for layer in self.layers)
        return solve(only, minimize=self.minimize)

    def nothing(self) -> Solution:
        """The original network as a plan: a form without any damage may be faster, but is not the original."""
        return self._of({layer.name: layer.choices[0] for layer in self.layers})

    def sketch(self, plan: Plan) -> nn.Module:
        """The network of a plan, transferred quickly: to be timed, not to be handed over."""
        return self._build(plan, is_quick=True)[0]

    def finish(self, plan: Plan, limit_points: float | None) -> Guarded:
        """Transfer a plan in full and measure its network on all images."""
        self.progress(f"selection: measuring the network with {len(plan.replaced)} layers replaced on all images")
        network, transfers = self._build(plan, is_quick=False)
        quality = self.evaluator.quality(network)[0] if plan.replaced else self.evaluator.original_quality()
        self._steps.append(_step(plan, quality, limit_points))
        return Guarded(plan, network, transfers, tuple(self._steps), quality)

    def _holds(self, solution: Solution, limit_points: float) -> bool:
        """Whether the network of a plan, transferred quickly, holds the limit; records the step."""
        plan = self._plan(solution)
        if not plan.replaced:
            return True
        key = f"{limit_points!r}: {_key(plan)}"
        known = self.memory.get(key)
        if not isinstance(known, GuardStep):
            self.progress(
                f"selection: {len(plan.replaced)} layers replaced, predicted {solution.difference:+.3g} {self.unit}"
            )
            quality, is_partial = self.evaluator.quality(self.sketch(plan), limit_points)
            known = _step(plan, quality, limit_points, is_partial=is_partial)
            self.memory[key] = known
        self._steps.append(known)
        return known.is_accepted

    def _finished_within(self, solution: Solution, limit_points: float) -> Guarded:
        for _ in range(_FINAL_TRIES):
            guarded = self.finish(self._plan(solution), limit_points)
            if guarded.quality.drop_points <= limit_points or not guarded.plan.replaced:
                return guarded
            # Damage and drop go together near the limit; a bit more is taken off, for nothing is won by a second miss.
            share = limit_points / guarded.quality.drop_points
            solution = self._solved(0.9 * share * solution.damage)
        return self.finish(self._plan(self.nothing()), limit_points)

    def _solved(self, damage: float) -> Solution:
        solution = solve(self.layers, minimize=self.minimize, limits=replace(self.limits, damage=damage))
        self.gap = max(self.gap, solution.gap)
        return solution

    def _plan(self, solution: Solution) -> Plan:
        return plan_of(self.trace, self.layers, solution.chosen, self.unit, self.lowered_for)

    def _build(self, plan: Plan, *, is_quick: bool) -> tuple[nn.Module, tuple[LayerTransfer, ...]]:
        return convert_network(
            self.original,
            self.trace,
            plan,
            self.batches,
            method=self.method,
            memory=self._transfers[is_quick],
            is_quick=is_quick,
        )


def _step(plan: Plan, quality: Quality, limit_points: float | None, *, is_partial: bool = False) -> GuardStep:
    return GuardStep(
        added=tuple(plan.replaced),
        replaced=len(plan.replaced),
        drop_points=quality.drop_points,
        images=quality.images,
        is_accepted=limit_points is None or quality.drop_points <= limit_points,
        is_partial=is_partial,
    )


def _middle(low: float, high: float) -> float:
    """Between two damages, by ratio where neither is 0."""
    return math.sqrt(low * high) if low > 0 else high / 2


def _key(plan: Plan) -> str:
    return sha256_of_bytes(repr([(name, candidate.form) for name, candidate in plan.replaced.items()]).encode())
