"""The cheaper plan that is tried where recovery leaves room: what plans cost, and what is said of it."""

from __future__ import annotations

from sepdeploy.core.conv import Trace
from sepdeploy.core.looser_plan import LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.render.format_numbers import change_text, is_about_the_same, times_text
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
    room = f"{looser.max_drop_points:g} points"
    if held.drop_points is not None:
        room = f"{_drop_text(held.drop_points, looser.max_drop_points)}, of {looser.max_drop_points:g} allowed"
    parts = []
    if found is not None:
        parts.append(_cost_text(found, held))
        if found.drop_points is not None:
            parts.append(f"its file {_drop_text(found.drop_points, looser.max_drop_points)}")
    parts.append(looser.outcome.value + (f" ({' '.join(looser.error.split())})" if looser.error else ""))
    return (f"recovery left room under --max-drop ({room}), so a cheaper plan was tried: {'; '.join(parts)}",)


def _drop_text(points: float, limit: float) -> str:
    """What a file lost or won, with as many digits as tell 1.002 from a limit of 1."""
    digits = 3 if points != limit and round(points, 2) == round(limit, 2) else 2
    return f"{'won' if points < 0 else 'lost'} {abs(points):.{digits}f} points"


def _cost_text(found: TriedPlan, held: TriedPlan) -> str:
    """Both plans against the original, by what is predicted or counted and by what was measured."""
    is_time, is_modelled = found.unit == "ms", found.unit == "kcycles"
    less, more = ("faster", "slower") if is_time else ("fewer", "more")
    changes = [change_text(plan.original_cost, plan.cost, less=less, more=more) for plan in (found, held)]
    is_same = is_about_the_same(found.original_cost, found.cost)
    what = "" if is_time else " modelled cycles" if is_modelled else f" {found.unit}"
    predicted = "predicted " if is_time or is_modelled else ""
    change = f"about the same{what} as" if is_same else f"{changes[0]}{what} than"
    text = f"{predicted}{change} the original (the plan before it: {changes[1]})"
    if found.speedup is not None and held.speedup is not None:
        verb = "counted" if is_modelled else "measured"
        text += f", {verb} as a whole {times_text(found.speedup)} (before it: {times_text(held.speedup)})"
    return text
