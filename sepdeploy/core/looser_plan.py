"""What became of the cheaper plan that is tried where recovery leaves room under --max-drop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["LooserOutcome", "LooserPlan", "TriedPlan"]


class LooserOutcome(Enum):
    """Whether the cheaper plan was taken, and why not; the value is what the user reads."""

    HANDED_OVER = "it is the plan that is handed over"
    OVER_LIMIT = "that is more than --max-drop allows, so it was put aside"
    NOT_CHEAPER = "that is too little to be worth another recovery, so it was put aside"
    SLOWER = "the whole measured slower than that of the plan before it, so it was put aside"
    FAILED = "it failed, so it was put aside"


@dataclass(frozen=True, slots=True)
class TriedPlan:
    """A plan by what it was chosen to make small.

    Attributes:
        unit: 'ms' and 'kcycles' of one inference, 'MACs' for one image, or 'parameters'.
        original_cost: Of the original network.
        cost: Of the plan; latency and cycles are predicted, the others are counted.
        speedup: Of the whole against the original, measured right after the choice; None where it was not measured.
        speedup_low: Lower end of its interval.
        speedup_high: Upper end.
        drop_points: What the target's file lost on validation images after recovery; None where it did not come to
            that.
    """

    unit: str
    original_cost: float
    cost: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    drop_points: float | None = None

    def is_surely_slower(self, other: TriedPlan) -> bool:
        """Whether the whole measured slower than that of `other`, by the whole of both intervals."""
        return self.speedup_high is not None and other.speedup_low is not None and self.speedup_high < other.speedup_low


@dataclass(frozen=True, slots=True)
class LooserPlan:
    """What became of the cheaper plan.

    Attributes:
        outcome: Whether it was taken, and why not.
        max_drop_points: What its file was allowed to lose.
        limit_points: What the network was allowed to lose before recovery.
        held: The plan that had kept --max-drop before.
        found: The cheaper one; None if it failed before it was chosen.
        error: What went wrong, where it failed.
    """

    outcome: LooserOutcome
    max_drop_points: float
    limit_points: float
    held: TriedPlan
    found: TriedPlan | None = None
    error: str = ""
