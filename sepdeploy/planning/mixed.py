"""Which layers of an int8 file compute in float: where that is faster, and where --max-drop needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sepdeploy.core.mixed import Arithmetic, MixedLayer, MixedPlan, MixReason
from sepdeploy.core.selection import Choice, LayerChoices
from sepdeploy.planning.solve import Limits, solve

__all__ = ["Cost", "Kept", "MixSearch"]

Kept = dict[str, Arithmetic]
"""Layer -> how it computes, of those that do not compute in int8."""

_TRIES = 6
"""Mixes that are measured as wholes on the way to the cheapest that holds the limit."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Change of the cost of a layer's block against int8, conversions around it included.

    `low` and `high` are the ends of its 95% interval where time was measured, else of its modelled range.
    """

    difference: float
    low: float
    high: float


@dataclass(slots=True)
class MixSearch:
    """The fastest mix that holds a limit.

    Attributes:
        costs: Layer -> arithmetic -> cost, for all layers that can be put back; empty where nothing could be measured.
        unit: Of the costs.
        drop: Points that the file of a mix loses on validation images.
        noise: Noise / signal of the outputs of the file of a mix against the float file's, on calibration images.
        is_faster: Whether the file of a mix is measured to be faster than that with all in int8.
        limit_points: Most that the file may lose; None if nothing is limited.
        float_drop_points: What the float file loses.
    """

    costs: Mapping[str, Mapping[Arithmetic, Cost]]
    unit: str
    drop: Callable[[Kept], float]
    noise: Callable[[Kept], float]
    is_faster: Callable[[Kept], bool]
    limit_points: float | None
    float_drop_points: float | None = None
    _gains: dict[str, dict[Arithmetic, float]] = field(default_factory=dict, init=False)
    _base_noise: float = field(default=0.0, init=False)
    _notes: list[str] = field(default_factory=list, init=False)

    def result(self) -> MixedPlan:
        """Search, and say what was found and why."""
        faster = self._faster()
        kept, before, after = faster, None, None
        if self.limit_points is not None:
            before = self.drop({})
            after = self.drop(faster) if faster else before
            if after > self.limit_points:
                kept, after = self._within(faster, after)
        layers = tuple(self._layer(name, kept, faster) for name in self.costs)
        return MixedPlan(layers, self.unit, before, after if kept else None, tuple(self._notes))

    def _faster(self) -> Kept:
        """Layers whose whole interval is below that of int8, if the whole is faster with them."""
        kept = {}
        for name, costs in self.costs.items():
            sure = {arithmetic: cost for arithmetic, cost in costs.items() if cost.high < 0}
            if sure:
                kept[name] = min(sure, key=lambda arithmetic: sure[arithmetic].difference)
        if kept and not self.is_faster(kept):
            self._notes.append(
                f"{len(kept)} layers are cheaper in float on the target one by one, but the file as a whole is not: "
                "they stay in int8 for speed"
            )
            return {}
        return kept

    def _within(self, faster: Kept, drop: float) -> tuple[Kept, float]:
        """The fastest mix that holds the limit, and what it loses; what was there before where none does."""
        limit = self.limit_points or 0.0
        if self.float_drop_points is not None and self.float_drop_points > limit:
            self._notes.append(
                f"the float file loses {self.float_drop_points:.2f} points itself: no mix of precisions holds the limit"
            )
            return faster, drop
        layers = self._weighed(faster)
        total = sum(layer.choices[0].damage for layer in layers)
        low, high = 0.0, total  # damage left: all that can be won is won, and nothing is
        best: tuple[Kept, float] | None = None
        budget = low
        for _ in range(_TRIES):
            kept = _kept(solve(layers, minimize="latency", limits=Limits(damage=budget)).chosen)
            found = self.drop(kept)
            if found <= limit:
                best, low = (kept, found), budget
            elif best is None:
                break
            else:
                high = budget
            budget = math.sqrt(low * high) if low > 0 else high / 16
        if best is None:
            self._notes.append(f"even with every layer in float that this helps, the file loses {found:.2f} points")
            return faster, drop
        return best

    def _weighed(self, faster: Kept) -> tuple[LayerChoices, ...]:
        """What each layer's arithmetic costs, and how much of the noise that it could take away it leaves."""
        self._base_noise = self.noise(faster)
        layers = []
        for name, costs in self.costs.items():
            gains = {arithmetic: self._base_noise - self.noise({**faster, name: arithmetic}) for arithmetic in costs}
            self._gains[name] = gains
            start = faster.get(name, Arithmetic.INT8)
            known = {Arithmetic.INT8: Cost(0.0, 0.0, 0.0), **costs}
            if start is not Arithmetic.INT8:  # taken for speed: going back is no answer to a loss of accuracy
                known.pop(Arithmetic.INT8)
            gains = {**gains, start: 0.0}
            most = max(0.0, *gains.values())
            order = sorted(known, key=lambda arithmetic: arithmetic is not start)
            choices = tuple(
                Choice(
                    arithmetic.value,
                    None,
                    (),
                    known[arithmetic].difference,
                    known[arithmetic].low,
                    known[arithmetic].high,
                    most - gains[arithmetic],
                    0,
                    0,
                )
                for arithmetic in order
            )
            layers.append(LayerChoices(name, choices))
        return tuple(layers)

    def _layer(self, name: str, kept: Kept, faster: Kept) -> MixedLayer:
        arithmetic = kept.get(name, Arithmetic.INT8)
        costs = self.costs[name]
        cost = costs.get(arithmetic, costs.get(Arithmetic.FLOAT32))
        reason = None
        if arithmetic is not Arithmetic.INT8:
            reason = MixReason.FASTER if faster.get(name) is arithmetic else MixReason.ACCURACY
        noise = self._base_noise - self._gains.get(name, {}).get(
            Arithmetic.FLOAT32 if arithmetic is Arithmetic.INT8 else arithmetic, 0.0
        )
        gain = 10 * math.log10(self._base_noise / noise) if self._gains.get(name) and noise > 0 else None
        return MixedLayer(
            name,
            arithmetic,
            reason,
            None if cost is None else cost.difference,
            None if cost is None else cost.low,
            None if cost is None else cost.high,
            gain,
        )


def _kept(chosen: Mapping[str, Choice]) -> Kept:
    arithmetics = {name: Arithmetic(choice.label) for name, choice in chosen.items()}
    return {name: arithmetic for name, arithmetic in arithmetics.items() if arithmetic is not Arithmetic.INT8}
