"""What a report comes down to: one sentence, and a handful of numbers before and after."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sepdeploy.core.artifact import Format, Role
from sepdeploy.core.describe import describe_form
from sepdeploy.core.measurement import Counts, Environment, Measured, Method, Numerics, Quality
from sepdeploy.core.options import target_format, target_title
from sepdeploy.core.plan import Decision, Plan, Reason, Replaced
from sepdeploy.core.report import ArtifactResult, Report
from sepdeploy.errors import ContractError
from sepdeploy.render.format_numbers import (
    change_text,
    count_text,
    is_about_the_same,
    percent_text,
    plural,
    points_text,
    printable,
    size_text,
    three_digits,
    times_text,
)

__all__ = [
    "ConvCost",
    "Speedup",
    "SummaryRow",
    "common_method",
    "cost_after",
    "counts_caption",
    "environment_text",
    "kept_counts",
    "numerics_text",
    "outcome_text",
    "plan_sentence",
    "quality_ratio",
    "recovery_sentence",
    "selection_sentence",
    "speedup_between",
    "speedup_text",
    "summarize",
    "target_label",
    "target_result",
    "verdict",
]


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One quantity before and after, as text with units."""

    quantity: str
    original: str
    converted: str
    change: str


@dataclass(frozen=True, slots=True)
class Speedup:
    """How many times faster one file is than another.

    Attributes:
        value: Ratio of times; below 1 is slower.
        low: Lower end of its 95% interval; None if it was not measured pairwise.
        high: Upper end of it.
    """

    value: float
    low: float | None
    high: float | None


def target_result(report: Report, role: Role) -> ArtifactResult | None:
    """The file that the checks are about (`role` converted) or the one it is compared to; None if it was not made.

    Raises:
        UsageError: if the report names a target that does not exist.
    """
    return report.result(_target(report)[0], report.precision, role)


def target_label(report: Report) -> str:
    """The runtime and precision that the checks are about, such as 'LiteRT int8'."""
    return f"{_target(report)[1]} {report.precision.value}"


def _target(report: Report) -> tuple[Format, str]:
    return target_format(report.target), target_title(report.target)


def verdict(report: Report) -> str:
    """The outcome in one sentence: how much faster at what cost, or which promise broke.

    Raises:
        UsageError: if the report names a target that does not exist.
    """
    broken = [check for check in report.checks if not check.is_met]
    if broken:
        names = " and ".join(check.name for check in broken)
        sentences = "; ".join(printable(check.sentence).rstrip(".") for check in broken)
        promise = "promise is" if len(broken) == 1 else "promises are"
        return f"Not a success, the {names} {promise} broken: {sentences}."
    if not report.plan.replaced:
        return f"Nothing was replaced: all {plural(len(report.plan.decisions), 'convolution')} stay as they were."
    return f"The converted network {_speed_clause(report)} {_quality_clause(_final_quality(report))}."


def _speed_clause(report: Report) -> str:
    before, after = _target_costs(report)
    speedup = speedup_between(before, after)
    is_same = speedup is not None and is_about_the_same(speedup.value, 1.0)
    if isinstance(after, Counts) and speedup is not None:
        change = "about as many modelled cycles as" if is_same else f"{_fewer_or_more(speedup)} modelled cycles than"
        return f"needs {change} the original on {target_label(report)}"
    if speedup is None:
        factor = change_text(report.original.macs, report.converted.macs, less="fewer", more="more")
        return f"needs {factor} multiply-accumulates (its latency was not measured)"
    change = "about as fast as" if is_same else f"{_faster_or_slower(speedup)} than"
    return f"is {change} the original on {target_label(report)}"


def _quality_clause(quality: Quality) -> str:
    points = abs(quality.drop_points)
    images = plural(quality.images, "validation image")
    if quality.drop_basis == "relative error":
        return f"with an output error of {percent_text(quality.relative_error)} on {images}"
    if quality.drop_basis == "agreement" and quality.agreement_ratio is not None:
        return f"and agrees with it on {percent_text(quality.agreement_ratio)} of {images}"
    if round(points, 2) == 0:
        return f"with the same accuracy on {images}"
    return f"with {points:.2f} points {'less' if quality.drop_points > 0 else 'more'} accuracy on {images}"


def _final_quality(report: Report) -> Quality:
    """Quality of the file that the checks are about, or of the PyTorch network where there is none."""
    result = target_result(report, Role.CONVERTED)
    return result.quality if result and result.quality else report.converted_quality


def _target_costs(report: Report) -> tuple[Measured | None, Measured | None]:
    before, after = target_result(report, Role.ORIGINAL), target_result(report, Role.CONVERTED)
    return before.measured if before else None, after.measured if after else None


def speedup_between(before: Measured | None, after: Measured | None) -> Speedup | None:
    """How much faster `after` is than `before`; None if one of them was not measured.

    The comparison of both is used where `before` was the reference of it, else the ratio of the medians.
    """
    if before is None or after is None:
        return None
    if before.speedup is None and after.speedup is not None:
        return Speedup(after.speedup, after.speedup_low, after.speedup_high)
    return Speedup(before.cost / after.cost, None, None)


def speedup_text(speedup: Speedup) -> str:
    """Such as '1.84x (1.79 to 1.90)'; the brackets hold the 95% interval."""
    if speedup.low is None or speedup.high is None:
        return times_text(speedup.value)
    return f"{times_text(speedup.value)} ({speedup.low:.2f} to {speedup.high:.2f})"


def summarize(report: Report) -> tuple[SummaryRow, ...]:
    """Quality, size, cost and latency of the original network and the converted one.

    Raises:
        UsageError: if the report names a target that does not exist.
    """
    original, converted = report.original, report.converted
    return (
        _quality_row(report),
        _size_row(report),
        _cost_row("MACs for one image", original.macs, converted.macs),
        _cost_row("Parameters", original.params, converted.params),
        _memory_row(report),
        _target_row(report),
    )


def _quality_row(report: Report) -> SummaryRow:
    before, after = report.original_quality, _final_quality(report)
    images = f"{after.images:,} images"
    result = target_result(report, Role.CONVERTED)
    network = f"PyTorch to {target_label(report)}" if result and result.quality else "PyTorch"
    change = points_text(-after.drop_points)
    if after.drop_basis == "accuracy" and before.accuracy_ratio is not None and after.accuracy_ratio is not None:
        quantity, was, now = "Accuracy", before.accuracy_ratio, after.accuracy_ratio
    elif after.drop_basis == "agreement" and after.agreement_ratio is not None:
        quantity, was, now = "Agreement with the original", 1.0, after.agreement_ratio
    else:
        quantity, was, now = "Relative output error", 0.0, after.relative_error
        change = points_text(after.drop_points)
    return SummaryRow(f"{quantity} ({network}, {images})", percent_text(was), percent_text(now), change)


def quality_ratio(quality: Quality) -> float | None:
    """The ratio that the drop was taken from: accuracy, agreement or relative error; None if it was not measured."""
    ratios = {"accuracy": quality.accuracy_ratio, "agreement": quality.agreement_ratio}
    return ratios.get(quality.drop_basis, quality.relative_error)


_AWARE = "quantization-aware training"
_ROUNDED = f" Of {_AWARE} both numbers are those of the network as its int8 files round it."
_TRAININGS = ("fine-tuning", _AWARE)


def recovery_sentence(report: Report) -> str:
    """How far the recovery has brought the PyTorch network, and what damage is."""
    before, after = report.transferred_quality, report.converted_quality
    was, now = quality_ratio(before), quality_ratio(after)
    name = {"accuracy": "Accuracy", "agreement": "Agreement with the original"}.get(after.drop_basis, "Output error")
    change = ""
    if was is not None and now is not None:
        images = plural(after.images, "validation image")
        change = f"{name} of the PyTorch network: {percent_text(was)} before, {percent_text(now)} after, on {images}. "
    return (
        f"{change}Damage: change of the outputs against the original's on {_judges_text(report)} (divergence of the "
        "class probabilities in nats, or squared relative error)."
        f"{_ROUNDED if any(step.name == _AWARE for step in report.recovery) else ''}"
    )


def selection_sentence(report: Report) -> str:
    """How well the sum of the blocks' prices predicted the whole; empty if nothing was chosen by prices."""
    selection = report.selection
    if selection is None or selection.measured_cost is None or selection.speedup is None:
        return ""
    predicted = selection.original_cost / selection.predicted_cost if selection.predicted_cost > 0 else math.inf
    is_counted = selection.unit == "kcycles"
    unit = f"modelled {selection.unit}" if is_counted else selection.unit
    verb = "counted" if is_counted else "measured"
    return (
        f"Chosen by prices {verb} block by block: {three_digits(selection.original_cost)} {unit} for the original, "
        f"{three_digits(selection.predicted_cost)} {unit} predicted ({times_text(predicted)}); {verb} as a whole "
        f"right after the choice: {three_digits(selection.measured_cost)} {unit} ({times_text(selection.speedup)})."
    )


def _judges_text(report: Report) -> str:
    """The images on which damage was measured: training has its own, of the training images if there are enough."""
    tuned, others = (
        max((step.images for step in report.recovery if (step.name in _TRAININGS) == is_tuned), default=0)
        for is_tuned in (True, False)
    )
    if not tuned:
        return plural(others, "held-out calibration image")
    text = plural(tuned, "held-out image")
    return text if others in (0, tuned) else f"{text} for the training and {others:,} for the other steps"


def _size_row(report: Report) -> SummaryRow:
    results = (target_result(report, Role.ORIGINAL), target_result(report, Role.CONVERTED))
    sizes = [result.artifact.size_bytes if result else None for result in results]
    was, now = ("not made" if size is None else size_text(size) for size in sizes)
    change = ""
    if sizes[0] is not None and sizes[1] is not None:
        change = change_text(sizes[0], sizes[1], less="smaller", more="larger")
    return SummaryRow(f"File size ({target_label(report)})", was, now, change)


def _memory_row(report: Report) -> SummaryRow:
    was, now = (m.in_precision(report.precision) for m in (report.original_memory, report.converted_memory))
    change = change_text(was, now, less="smaller", more="larger")
    return SummaryRow(
        f"Peak activation memory, analytic ({report.precision.value})", size_text(was), size_text(now), change
    )


def _cost_row(quantity: str, before: int, after: int) -> SummaryRow:
    return SummaryRow(
        quantity, count_text(before), count_text(after), change_text(before, after, less="fewer", more="more")
    )


def _target_row(report: Report) -> SummaryRow:
    before, after = _target_costs(report)
    known = after or before
    threads = f", {plural(known.environment.threads, 'thread')}" if known else ""
    speedup = speedup_between(before, after)
    was, now = map(_cost_text, (before, after))
    if isinstance(known, Counts):
        quantity = f"Modelled kcycles ({target_label(report)}{threads}), low to high"
        return SummaryRow(quantity, was, now, _fewer_or_more(speedup) if speedup else "")
    quantity = f"Latency ({target_label(report)}{threads}), median (min)"
    return SummaryRow(quantity, was, now, _faster_or_slower(speedup) if speedup else "")


def _cost_text(measured: Measured | None) -> str:
    if measured is None:
        return "not measured"
    if isinstance(measured, Counts):
        return f"{three_digits(measured.kcycles_low)} to {three_digits(measured.kcycles_high)}"
    return f"{three_digits(measured.median_ms)} ({three_digits(measured.minimum_ms)}) ms"


def _fewer_or_more(speedup: Speedup) -> str:
    return change_text(speedup.value, 1.0, less="fewer", more="more")


def _faster_or_slower(speedup: Speedup) -> str:
    return change_text(speedup.value, 1.0, less="faster", more="slower")


def common_method(latencies: Iterable[Measured]) -> Method | None:
    """The one method behind all `latencies`, None if there are none.

    Raises:
        ContractError: if there are two: such numbers must not share a column.
    """
    methods = {latency.method for latency in latencies}
    if len(methods) > 1:
        raise ContractError(f"one table must not mix methods: {', '.join(sorted(m.value for m in methods))}")
    return methods.pop() if methods else None


def environment_text(environment: Environment) -> str:
    """Where numbers come from, such as 'onnxruntime 1.31.1, 1 thread, AMD EPYC (2 cores), Linux x86_64'."""
    conditions = "".join(f", {condition}" for condition in environment.conditions)
    return printable(
        f"{environment.runtime}, {plural(environment.threads, 'thread')}, {environment.cpu}"
        f" ({plural(environment.cores, 'core')}), {environment.system}{conditions}"
    )


def counts_caption(counts: Iterable[Counts]) -> str:
    """Where counts come from, and what is modelled about the cycles."""
    counts = tuple(counts)
    places = dict.fromkeys(f"{each.environment.runtime} on a {each.environment.cpu}" for each in counts)
    clocks = dict.fromkeys(f"{each.core} at {each.clock_ghz:g} GHz" for each in counts)
    worst = max((each.spread_ratio for each in counts), default=0.0)
    return (
        f"{'; '.join(places)}; repeats agree within {100 * worst:.2g}%. Cycles and milliseconds ({', '.join(clocks)}) "
        "are modelled, not measured: llvm-mca over the executed instructions with every load in the first cache (low), "
        "and every miss of the simulated caches waited for (high). Fewer cycles: against the reference, by the low "
        "end, and at both."
    )


def numerics_text(numerics: Numerics | None) -> str:
    """How far outputs on the core are from those here, for a cell of a table; '-' where nothing was compared."""
    if numerics is None:
        return "-"
    if numerics.failure:
        return "does not run"
    if numerics.difference is None:
        return "not finite"
    if numerics.is_in_steps:
        return (
            plural(int(numerics.difference), "step")
            if numerics.difference % 1 == 0
            else f"{numerics.difference:g} steps"
        )
    return f"{numerics.difference:.1e}"


def plan_sentence(plan: Plan) -> str:
    """How many convolutions are replaced and how many stay; the counts sum."""
    total = plural(len(plan.decisions), "convolution")
    return f"{len(plan.replaced)} of {total} replaced, {len(plan.kept)} kept"


@dataclass(frozen=True, slots=True)
class ConvCost:
    """Cost of one convolution: MACs of all its calls for one image, weights and biases."""

    macs: int
    params: int


def cost_after(decision: Decision) -> ConvCost:
    """Cost of the convolution, or of what replaces it, once the plan is carried out."""
    if isinstance(decision.outcome, Replaced):
        return ConvCost(decision.outcome.candidate.macs, decision.outcome.candidate.params)
    return ConvCost(decision.macs, decision.params)


def outcome_text(decision: Decision) -> str:
    """What becomes of the convolution: the convolutions that replace it, or why it stays."""
    if isinstance(decision.outcome, Replaced):
        return describe_form(decision.outcome.candidate.form)
    detail = f" ({printable(decision.outcome.detail)})" if decision.outcome.detail else ""
    return f"kept: {decision.outcome.reason.value}{detail}"


def kept_counts(plan: Plan) -> tuple[tuple[Reason, int], ...]:
    """Each reason to keep a convolution with how often it occurs, the most frequent first."""
    return tuple(Counter(kept.reason for kept in plan.kept.values()).most_common())
