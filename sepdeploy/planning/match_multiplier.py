"""The channel multiplier at which a variant costs what the original costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from sepdeploy.core.design import MOST_MULTIPLIER, Match
from sepdeploy.core.report import NetworkCost
from sepdeploy.errors import UsageError

__all__ = ["match_multiplier"]

_TOLERANCE = 0.01
"""With 'both', how far one cost may exceed the original's: in the paper's table 6 it is up to 0.4%."""


def match_multiplier(
    cost_at: Callable[[float], NetworkCost], original: NetworkCost, match: Match, step: float
) -> tuple[float, NetworkCost]:
    """Search multiples of `step` for the variant whose cost is nearest to the original's.

    'macs' and 'params' take the nearest in one. 'both' takes the widest that exceeds neither by more than 1%: "we
    approximately match for one and make sure the other not to exceed" ("Optimized Separable Convolution", section 3).

    Args:
        cost_at: Cost of the variant at a multiplier; it grows with it, up to the rounding of channels and groups.
        original: What to match.
        match: Which cost.
        step: Distance of neighbouring multipliers.

    Returns:
        The multiplier and the variant's cost at it.

    Raises:
        UsageError: if no multiple of `step` fits.
    """
    cost_of = cache(lambda place: cost_at(place * step))

    def excess(place: int) -> float:
        """By what factor the variant costs more than the original, less 1."""
        cost = cost_of(place)
        ratios = {"macs": cost.macs / original.macs, "params": cost.params / original.params}
        return (max(ratios.values()) if match == "both" else ratios[match]) - 1

    if not original.macs or not original.params:
        raise UsageError("the network has no multiply-accumulates or no parameters, so there is nothing to match")
    limit = _TOLERANCE if match == "both" else 0.0
    last = max(1, int(MOST_MULTIPLIER / step))
    below = _last_within(lambda place: excess(place) <= limit, min(last, max(1, round(1 / step))), last)
    # Rounding to whole groups makes the cost dip now and then: a neighbour may fit better.
    near = [place for place in range(below - 1, below + 3) if 1 <= place <= last]
    if match == "both":
        fitting = [place for place in near if excess(place) <= limit]
        if not fitting:
            raise UsageError(
                f"even at a channel multiplier of {step:g} this costs more than the original "
                f"({1 + excess(1):.2f}x); give a smaller --step, or --match macs or params"
            )
        best = max(fitting)
    else:
        best = min(near, key=lambda place: abs(excess(place)))
    if best == last:
        raise UsageError(
            f"a channel multiplier of {MOST_MULTIPLIER} is still cheaper than the original: check that the factory's "
            "width argument scales the channels (--width-argument names it), or give --multiplier"
        )
    return best * step, cost_of(best)


def _last_within(fits: Callable[[int], bool], start: int, last: int) -> int:
    """The last place that fits, from `start` by doubling or halving, then by bisection; 0 if there is none."""
    low, high = (start, start) if fits(start) else (start // 2, start)
    while low and not fits(low):
        low, high = low // 2, low
    while low == high:
        if high == last:
            return last
        high = min(2 * high, last)
        if fits(high):
            low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
