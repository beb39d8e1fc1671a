"""The best plan within limits: one choice for each layer, solved exactly, and the whole front of such plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, le
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.knapsack import Knapsack, Limit, Values

__all__ = ["Limits", "Objective", "Solution", "UnreachableLimitError", "pareto_front", "solve"]

Objective = Literal["latency", "damage", "macs", "params"]

_MEASURES: Mapping[Objective, Callable[[Choice], float]] = MappingProxyType(
    {
        "latency": attrgetter("difference"),
        "damage": attrgetter("damage"),
        "macs": attrgetter("macs"),
        "params": attrgetter("params"),
    }
)

_NAMES = MappingProxyType(
    {"latency": "the change of latency", "damage": "the damage", "macs": "the MACs", "params": "the parameters"}
)

_COUNTS = frozenset({"macs", "params"})
"""Measures that are whole numbers, so that their limits are kept to the last one."""

_TIE_BREAK: tuple[Objective, ...] = ("damage", "latency")

_TOLERANCE = 1e-9
"""Share by which a sum of floats may exceed its limit: a plan's own damage must be a limit that it keeps."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may cost; None is no limit.

    All but `peak_bytes` are for the sum over the layers that are solved for: what the rest of the network adds is for
    the caller to subtract.

    Attributes:
        damage: Sum of `Choice.damage`.
        latency: Sum of `Choice.difference`: the whole's cost less the original's.
        params: Sum of `Choice.params`.
        macs: Sum of `Choice.macs`.
        peak_bytes: `Choice.peak_bytes` of every layer: each is a peak of the whole network, and one layer's form leaves
            the others' alone.
    """

    damage: float | None = None
    latency: float | None = None
    params: int | None = None
    macs: int | None = None
    peak_bytes: int | None = None

    @property
    def of_sums(self) -> dict[Objective, float]:
        """The limits of sums that there are, in the order in which they are given up for an error's sake."""
        limits: dict[Objective, float | None] = {
            "latency": self.latency,
            "damage": self.damage,
            "params": self.params,
            "macs": self.macs,
        }
        return {measure: limit for measure, limit in limits.items() if limit is not None}


@dataclass(frozen=True, slots=True)
class Solution:
    """The best plan.

    Attributes:
        chosen: Layer -> its choice, in the order of the layers.
        objective: What was minimised, summed over the layers.
        difference: Of the whole's cost against the original's.
        damage: Sum over the layers.
        macs: Sum over the layers.
        params: Sum over the layers.
        gap: Most by which another plan could be better, as a share of |objective|; 0 if this is proven to be the best.
    """

    chosen: dict[str, Choice]
    objective: float
    difference: float
    damage: float
    macs: int
    params: int
    gap: float


class UnreachableLimitError(UsageError):
    """No plan keeps a limit.

    Attributes:
        measure: What is limited.
        limit: The limit, as in `Limits`.
        least: The least that a plan reaches, within the other limits where there are any.
    """

    def __init__(self, measure: Objective | Literal["peak_bytes"], limit: float, least: float, detail: str) -> None:
        super().__init__(f"{detail} cannot be at most {limit:.6g}: the least that can be reached is {least:.6g}")
        self.measure, self.limit, self.least = measure, limit, least


def solve(
    layers: Sequence[LayerChoices],
    *,
    minimize: Objective,
    limits: Limits | None = None,
    time_limit_s: float = 5.0,
) -> Solution:
    """The plan of the least cost within the limits.

    Of plans that cost the same (to 1e-7), the one with less damage is taken, then the faster, then the one that
    replaces fewer layers. The same layers and limits give the same plan, unless the time limit strikes. A choice with a
    number that is not finite is never taken.

    Args:
        layers: What each could become.
        minimize: What is summed and made small.
        limits: What must hold besides.
        time_limit_s: Seconds after which the best plan found so far is returned, with its gap.

    Raises:
        UnreachableLimitError: if no plan keeps the limits; it names one of them and how near to it one can get.
        UsageError: if no plan was found in time.

    >>> dense = Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, 100, 10)
    >>> fast = Choice("grouped", None, (), -2.0, -2.1, -1.9, 0.3, 25, 3)
    >>> layers = (LayerChoices("a", (dense, fast)), LayerChoices("b", (dense, replace(fast, damage=0.1))))
    >>> solution = solve(layers, minimize="latency", limits=Limits(damage=0.2))
    >>> {name: choice.label for name, choice in solution.chosen.items()}, solution.difference
    ({'a': 'dense', 'b': 'grouped'}, -2.0)
    """
    limits = limits or Limits()
    offers = tuple(_undominated(layer, minimize, limits) for layer in layers)
    allowed: dict[Objective, float] = {}
    for measure, limit in limits.of_sums.items():
        lightest = [min(map(_MEASURES[measure], choices)) for choices in offers]
        allowed[measure] = limit + (0 if measure in _COUNTS else _TOLERANCE * math.fsum(map(abs, (limit, *lightest))))
        if _sum(measure, lightest) > allowed[measure]:
            raise UnreachableLimitError(measure, limit, _sum(measure, lightest), _NAMES[measure])
    ideal = tuple(choices[0] for choices in offers)
    if _keeps(ideal, allowed):
        return _solution(layers, ideal, minimize, 0.0)
    found = _search(offers, minimize, allowed, time_limit_s)
    if found is not None:
        return _solution(layers, found[0], minimize, found[1])
    # Each limit can be kept, but not all of them: one is given up to say how near to it the others let it come.
    measure = next(iter(allowed))
    others = _limited(limits, measure, None)
    nearest = solve(layers, minimize=measure, limits=others, time_limit_s=time_limit_s)
    within = f"{_NAMES[measure]}, within the other limits,"
    raise UnreachableLimitError(measure, limits.of_sums[measure], nearest.objective, within)


def pareto_front(
    layers: Sequence[LayerChoices],
    *,
    minimize: Objective = "latency",
    points: int = 20,
    limits: Limits | None = None,
    time_limit_s: float = 5.0,
) -> tuple[Solution, ...]:
    """Plans from the least damage to the least cost, none of them worse than another in both.

    Between the two ends, the least damage is found for costs at equal distances: damages span many orders of magnitude,
    so that no spacing of theirs would spread the plans, and a user picks by speed.

    Args:
        layers: What each could become.
        minimize: The cost; anything but 'damage'.
        points: Most plans, at least 2.
        limits: What must hold besides.
        time_limit_s: For each plan, as for `solve`.

    Returns:
        By rising damage and falling cost; `Solution.objective` is the damage.

    Raises:
        UsageError: as `solve`.
        ContractError: if `points` or `minimize` is none of these.
    """
    if points < 2 or minimize == "damage":
        raise ContractError(f"no front of {points} points from damage to {minimize}")
    limits = limits or Limits()

    def solved(objective: Objective, within: Limits) -> Solution:
        return solve(layers, minimize=objective, limits=within, time_limit_s=time_limit_s)

    found = [solved("damage", limits)]
    dearest = _total(found[0].chosen.values(), minimize)
    cheapest = solved(minimize, limits).objective
    for step in range(1, points):
        cost = dearest + (cheapest - dearest) * step / (points - 1)
        limit = math.ceil(cost) if minimize in _COUNTS else cost
        found.append(solved("damage", _limited(limits, minimize, limit)))
    found.sort(key=lambda solution: (_total(solution.chosen.values(), minimize), solution.damage))
    front = found[:1]
    for solution in found[1:]:
        if solution.damage < front[-1].damage:
            front.append(solution)
    return tuple(reversed(front))


def _limited(limits: Limits, measure: Objective, most: float | None) -> Limits:
    """`limits` with that of one sum set anew."""
    change: dict[str, Any] = {measure: most}
    return replace(limits, **change)


def _sum(measure: Objective, values: Iterable[float]) -> float:
    """Exact, in whatever order the layers come."""
    return sum(values) if measure in _COUNTS else math.fsum(values)


def _total(plan: Iterable[Choice], measure: Objective) -> float:
    return _sum(measure, map(_MEASURES[measure], plan))


def _keeps(plan: tuple[Choice, ...], allowed: Mapping[Objective, float]) -> bool:
    return all(_total(plan, measure) <= most for measure, most in allowed.items())


def _solution(layers: Sequence[LayerChoices], plan: tuple[Choice, ...], minimize: Objective, gap: float) -> Solution:
    return Solution(
        chosen={layer.name: choice for layer, choice in zip(layers, plan, strict=True)},
        objective=_total(plan, minimize),
        difference=_total(plan, "latency"),
        damage=_total(plan, "damage"),
        macs=sum(choice.macs for choice in plan),
        params=sum(choice.params for choice in plan),
        gap=gap,
    )


def _undominated(layer: LayerChoices, minimize: Objective, limits: Limits) -> tuple[Choice, ...]:
    """A layer's choices, the best first, without those that are nowhere better than another.

    Raises:
        UnreachableLimitError: if all of them need too much memory.
    """
    choices = [choice for choice in layer.choices if math.isfinite(choice.difference) and math.isfinite(choice.damage)]
    if not choices:
        raise ContractError(f"{layer.name} has no choice with finite numbers")
    if limits.peak_bytes is not None:
        choices = _within_memory(layer.name, choices, limits.peak_bytes)
    order = tuple(dict.fromkeys((minimize, *_TIE_BREAK)))
    # A stable sort, so of equal choices the first is kept: the one that keeps the layer.
    choices.sort(key=lambda choice: tuple(_MEASURES[measure](choice) for measure in order))
    kept: dict[tuple[float, ...], Choice] = {}
    for choice in choices:
        own = tuple(_MEASURES[measure](choice) for measure in dict.fromkeys((*order, *limits.of_sums)))
        if not any(all(map(le, other, own)) for other in kept):
            kept[own] = choice
    return tuple(kept.values())


def _within_memory(name: str, choices: Sequence[Choice], limit: int) -> list[Choice]:
    peaks = [choice.peak_bytes for choice in choices if choice.peak_bytes is not None]
    if len(peaks) < len(choices):
        raise ContractError(f"memory is limited, but what {name} needs is not known")
    if min(peaks) > limit:
        raise UnreachableLimitError("peak_bytes", limit, min(peaks), f"the bytes of activations while {name} runs")
    return [choice for choice, peak in zip(choices, peaks, strict=True) if peak <= limit]


def _search(
    offers: Sequence[tuple[Choice, ...]], minimize: Objective, allowed: Mapping[Objective, float], time_limit_s: float
) -> tuple[tuple[Choice, ...], float] | None:
    """The best plan and its gap; None if no plan keeps all limits."""
    choices = [choice for offered in offers for choice in offered]

    def values(measure: Objective) -> Values:
        return np.array([_MEASURES[measure](choice) for choice in choices], dtype=np.float64)

    is_replacing = np.array([float(choice.candidate is not None) for choice in choices])
    knapsack = Knapsack(
        [len(offered) for offered in offers],
        values(minimize),
        [*(values(measure) for measure in _TIE_BREAK if measure != minimize), is_replacing],
        [Limit(values(measure), most) for measure, most in allowed.items()],
    )
    found = knapsack.search(time_limit_s)
    return None if found is None else (tuple(choices[index] for index in found[0]), found[1])
