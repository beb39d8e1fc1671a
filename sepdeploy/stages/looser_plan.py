"""The cheaper plan that is tried where recovery leaves room: what plans cost, and what is said of it."""

from __future__ import annotations

from sepdeploy.core.conv import Trace
from sepdeploy.core.looser_plan import LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.render.format_numbers import change_text, times_text
from sepdeploy.stages.guard import GuardRecord

__all__ = ["looser_notes", "tried_plan"]


def tried_plan(options: ConvertOptions, plan: Plan, guard: GuardRecord, traced: Trace) -> TriedPlan:
    """A plan with what it was chosen to make small: predicted latency or cycles, parameters or MACs."""
    goal, selection = options.selection.goal, guard.selection
    if goal == "latency" and selection is not None:
        return TriedPlan(
            selection.unit,
            selection.original_cost,
            selection.predicted_cost,
            selection.speedup,
            selection.speedup_low,
            selection.speedup_high,
        )
    if goal == "params":
        saved = sum(traced.site(name).params - c.params for name, c in plan.replaced.items())
        return TriedPlan("parameters", traced.total_params, traced.total_params - saved)
    return TriedPlan("MACs", traced.total_macs, plan.macs_of(traced))


def looser_notes(looser: LooserPlan | None) -> tuple[str, ...]:
    """What became of the cheaper plan, for the user: a sentence, none where none was tried."""
    if looser is None:
        return ()
    held, found = looser.held, looser.found
    lost = "" if held.drop_points is None else f"{held.drop_points:.2f} of "
    parts = []
    if found is not None:
        parts.append(_cost_text(found, held))
        if found.drop_points is not None:
            parts.append(f"its file lost {found.drop_points:.2f} points")
    parts.append(looser.outcome.value + (f" ({looser.error})" if looser.error else ""))
    return (
        f"recovery left room under --max-drop ({lost}{looser.max_drop_points:g} points lost), so a cheaper plan was "
        f"tried: {'; '.join(parts)}",
    )


def _cost_text(found: TriedPlan, held: TriedPlan) -> str:
    """Both plans against the original, by what is predicted or counted and by what was measured."""
    is_time, is_modelled = found.unit == "ms", found.unit == "kcycles"
    less, more = ("faster", "slower") if is_time else ("fewer", "more")
    changes = [change_text(plan.original_cost, plan.cost, less=less, more=more) for plan in (found, held)]
    what = "" if is_time else " modelled cycles" if is_modelled else f" {found.unit}"
    predicted = "predicted " if is_time or is_modelled else ""
    text = f"{predicted}{changes[0]}{what} than the original (the plan before it: {changes[1]})"
    if found.speedup is not None and held.speedup is not None:
        verb = "counted" if is_modelled else "measured"
        text += f", {verb} as a whole {times_text(found.speedup)} (before it: {times_text(held.speedup)})"
    return text
