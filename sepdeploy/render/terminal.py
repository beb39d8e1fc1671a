"""Tables for the terminal, as Rich renderables; the caller prints them.

Layer and file names fold, numbers never do. All text from outside is shown as it is: no markup, no control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Size
from sepdeploy.core.conv import ConvSite, Trace
from sepdeploy.core.measurement import Counts, Latency, LayerCounts, Quality
from sepdeploy.core.plan import Candidate, Kept, Plan, Reason
from sepdeploy.core.report import ArtifactResult, Report
from sepdeploy.render.format_numbers import plural, three_digits, times_text
from sepdeploy.render.summary import (
    common_method,
    cost_after,
    counts_caption,
    environment_text,
    numerics_text,
    outcome_text,
    plan_sentence,
    quality_ratio,
    recovery_sentence,
    summarize,
)
from sepdeploy.render.tables import NONE, Column, add_row, add_totals, kilo, make_table, mega

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "artifacts_table",
    "counts_table",
    "cycles_table",
    "inspect_table",
    "latency_table",
    "layers_table",
    "plan_table",
    "recovery_table",
    "summary_table",
]

CandidateTable = Mapping[str, Mapping[str, Candidate | Kept]]
"""Site name -> scheme name -> what the scheme offers for it."""

_TIME_COLUMNS = (Column("median\n(ms)"), Column("min\n(ms)"), Column("p10 to p90\n(ms)"))
_QUALITY_HEADERS = {"agreement": "agrees", "relative error": "error"}
_SPEEDUP_COLUMN = Column("speedup\n(95% CI)")


def summary_table(report: Report) -> Table:
    """The network before and after: quality, file size, MACs, parameters and latency.

    Raises:
        UsageError: if the report names a target that does not exist.
    """
    table = make_table(
        "Before and after",
        [Column("", "name"), Column("original"), Column("converted"), Column("change")],
    )
    for row in summarize(report):
        add_row(table, row.quantity, row.original, row.converted, row.change)
    return table


def recovery_table(report: Report) -> Table:
    """What was tried after the transfer to win accuracy back, and what came of it."""
    columns = [Column("step", "name"), Column("damage\nbefore"), Column("after"), Column("verdict"), Column("", "name")]
    table = make_table("Recovery", columns, caption=recovery_sentence(report))
    for step in report.recovery:
        damages = (three_digits(step.damage_before), three_digits(step.damage_after))
        add_row(table, step.name, *damages, "kept" if step.is_kept else "undone", step.detail)
    return table


def artifacts_table(report: Report) -> Table:
    """Every file with its size, quality and latency; a speedup is that over the reference of its runtime.

    Files that were counted and not timed have no columns of latency (`cycles_table`).

    Format, precision and role stand in the file's name: 'original/model.int8.tflite'.

    Raises:
        ContractError: if the latencies came about in different ways.
    """
    latencies = [result.latency for result in report.artifacts if result.latency]
    basis = report.converted_quality.drop_basis
    columns = [
        Column("file", "name"),
        Column("size\n(MB)"),
        Column(f"{_QUALITY_HEADERS.get(basis, basis)}\n(%)"),
        Column("SQNR\n(dB)"),
    ]
    if any(result.counts for result in report.artifacts):
        cores = dict.fromkeys(result.numerics.core for result in report.artifacts if result.numerics)
        table = make_table("Files", [*columns, *(Column(f"differs on\n{core}") for core in cores)])
        for result in report.artifacts:
            compared = (numerics_text(result.numerics),) if cores else ()
            add_row(table, result.artifact.path, *_quality_cells(result), *compared)
        return table
    table = make_table("Files", [*columns, *_TIME_COLUMNS, _SPEEDUP_COLUMN], caption=_measurement_caption(latencies))
    for result in report.artifacts:
        times = (*_time_cells(result.latency), _speedup_cell(result.latency))
        add_row(table, result.artifact.path, *_quality_cells(result), *times)
    return table


def _quality_cells(result: ArtifactResult) -> Iterable[str]:
    quality = result.quality
    yield three_digits(result.artifact.size_bytes / 1e6)
    yield _quality_cell(quality)
    yield NONE if quality is None or quality.sqnr_db is None else f"{quality.sqnr_db:.1f}"


def _quality_cell(quality: Quality | None) -> str:
    if quality is None:
        return NONE
    ratio = quality_ratio(quality)
    return NONE if ratio is None else f"{100 * ratio:.2f}"


def _time_cells(latency: Latency | None) -> Iterable[str]:
    if latency is None:
        return (NONE, NONE, NONE)
    spread = f"{three_digits(latency.p10_ms)} - {three_digits(latency.p90_ms)}"
    return (three_digits(latency.median_ms), three_digits(latency.minimum_ms), spread)


def _speedup_cell(latency: Latency | None) -> str:
    if latency is None:
        return NONE
    if latency.speedup is None:
        return "reference"
    if latency.speedup_low is None or latency.speedup_high is None:
        return times_text(latency.speedup)
    return f"{times_text(latency.speedup)}\n{latency.speedup_low:.2f} - {latency.speedup_high:.2f}"


def latency_table(results: Mapping[str, Latency]) -> Table:
    """Latencies of files by name; all must come from one method.

    Raises:
        ContractError: if the latencies came about in different ways.
    """
    columns = [Column("file", "name"), *_TIME_COLUMNS, Column("repeats"), _SPEEDUP_COLUMN]
    table = make_table("Latency of one inference", columns, caption=_measurement_caption(results.values()))
    for name, latency in results.items():
        add_row(table, name, *_time_cells(latency), f"{latency.repeats:,}", _speedup_cell(latency))
    return table


def cycles_table(results: Mapping[str, Counts]) -> Table:
    """The cycles that a model of an Arm core gives to files, and the milliseconds at its stated clock."""
    columns = [
        Column("file", "name"),
        *map(Column, ("instructions\n(M)", "kcycles\nlow", "kcycles\nhigh", "ms\nlow - high", "times fewer\ncycles")),
    ]
    table = make_table("Modelled cycles of one inference", columns, caption=counts_caption(results.values()))
    for name, counts in results.items():
        times = f"{three_digits(counts.low_ms)} - {three_digits(counts.high_ms)}"
        cycles = (three_digits(counts.kcycles_low), three_digits(counts.kcycles_high), times)
        add_row(table, name, mega(counts.instructions), *cycles, _fewer_cell(counts))
    return table


def layers_table(name: str, layers: Sequence[LayerCounts]) -> Table:
    """What each layer of a file executes; they sum to the whole."""
    columns = [
        Column("layer", "name"),
        *map(
            Column,
            ("instructions\n(k)", "MACs\n(k)", "L1 misses", "kcycles\nlow", "kcycles\nhigh", "share of\nlow (%)"),
        ),
    ]
    table = make_table(
        f"Layer by layer: {name}",
        columns,
        caption="A layer is the difference of two runs, without it and with it: below 0 where the runtime does the "
        "rest in another way then. Cycles are modelled.",
    )
    whole = sum(layer.kcycles_low for layer in layers) or 1.0
    for layer in layers:
        counts = (kilo(layer.instructions), kilo(layer.macs), f"{layer.l1_misses:,}")
        cycles = (three_digits(layer.kcycles_low), three_digits(layer.kcycles_high))
        add_row(table, layer.name, *counts, *cycles, f"{100 * layer.kcycles_low / whole:.1f}")
    return table


def counts_table(results: Mapping[str, Counts]) -> Table:
    """What files execute on an emulated core, in thousands; one column for each file."""
    names = dict(enumerate(results, 1))
    table = make_table(
        "Counted under emulation, one inference (thousands)",
        [Column("", "name"), *(Column(f"file {place}") for place in names)],
        caption="\n".join(f"file {place}: {name}" for place, name in names.items()),
    )
    files = tuple(results.values())
    sums = {name: sum(each.classes.get(name, 0) for each in files) for each in files for name in each.classes}
    rows = {
        "multiply-accumulates of all lanes": [each.macs for each in files],
        "loads": [each.classes_sum("load") for each in files],
        "stores": [each.classes_sum("store") for each in files],
        "bytes loaded": [each.loaded_bytes for each in files],
        "bytes stored": [each.stored_bytes for each in files],
        "L1 misses": [each.l1_misses for each in files],
        "L2 misses": [each.l2_misses for each in files],
        "instructions": [each.instructions for each in files],
    } | {
        f"  {name.replace('_', ' ')}": [each.classes.get(name, 0) for each in files]
        for name in sorted(sums, key=lambda name: -sums[name])
    }
    for name, values in rows.items():
        add_row(table, name, *map(kilo, values))
    return table


def _fewer_cell(counts: Counts) -> str:
    if counts.speedup is None:
        return "reference"
    return f"{times_text(counts.speedup)}\n{counts.speedup_low:.2f} - {counts.speedup_high:.2f}"


def _measurement_caption(latencies: Iterable[Latency]) -> str:
    latencies = tuple(latencies)
    method = common_method(latencies)
    if method is None:
        return "Latency was not measured."
    places = dict.fromkeys(environment_text(latency.environment) for latency in latencies)
    counts = dict.fromkeys(f"{plural(each.repeats, 'repeat')} after {each.warmup:,} warm-up" for each in latencies)
    return f"Latency: {method.value}; {'; '.join(counts)}. {'; '.join(places)}."


def plan_table(plan: Plan) -> Table:
    """What becomes of each convolution and why, with MACs and parameters before and after."""
    columns = [
        Column("convolution", "name"),
        Column("becomes", "name"),
        Column("MACs\n(M)"),
        Column("after\n(M)"),
        Column("MACs\nratio"),
        Column("params\n(k)"),
        Column("after\n(k)"),
    ]
    table = make_table(f"Plan: {plan.scheme}, {plan_sentence(plan)}", columns)
    for decision in plan.decisions:
        after = cost_after(decision)
        cells = _cost_cells(decision.macs, after.macs, decision.params, after.params)
        add_row(table, decision.name, outcome_text(decision), *cells)
    add_totals(table, "all convolutions", "", *_plan_totals(plan))
    return table


def _cost_cells(macs: int, macs_after: int, params: int, params_after: int) -> Sequence[str]:
    ratio = times_text(macs_after / macs) if macs else NONE
    return (mega(macs), mega(macs_after), ratio, kilo(params), kilo(params_after))


def _plan_totals(plan: Plan) -> Sequence[str]:
    after = [cost_after(decision) for decision in plan.decisions]
    return _cost_cells(
        sum(decision.macs for decision in plan.decisions),
        sum(cost.macs for cost in after),
        sum(decision.params for decision in plan.decisions),
        sum(cost.params for cost in after),
    )


def inspect_table(trace: Trace, candidates: CandidateTable, headings: Mapping[str, str] | None = None) -> Table:
    """Every convolution with its geometry and cost, and what each scheme would make of it.

    Args:
        trace: The network.
        candidates: Site name -> scheme name -> candidate or the reason against it. A scheme's column shows the ratio of
            MACs, or a letter for that reason; the caption spells schemes and reasons out.
        headings: Scheme name -> heading of its column; its name where there is none.
    """
    schemes = list(dict.fromkeys(scheme for offers in candidates.values() for scheme in offers))
    letters = _reason_letters(trace, candidates)
    shown = {scheme: (headings or {}).get(scheme) or scheme.replace("_", "\n") for scheme in schemes}
    headers = ("kernel", "channels", "output", "MACs\n(M)", "share\n(%)", "params\n(k)", *shown.values())
    columns = [Column("convolution", "name"), *map(Column, headers)]
    table = make_table("Convolutions", columns, caption=_inspect_caption(shown, letters))
    for site in trace.sites:
        share = f"{100 * site.macs / trace.total_macs:.1f}" if trace.total_macs else NONE
        offers = [_offer_cell(site, candidates.get(site.name, {}).get(scheme), letters) for scheme in schemes]
        add_row(table, site.name, *_geometry_cells(site), mega(site.macs), share, kilo(site.params), *offers)
    add_totals(table, *_inspect_totals(trace, candidates, schemes))
    return table


def _geometry_cells(site: ConvSite) -> Sequence[str]:
    output = _output_cell(site)
    if site.spec is None:
        return (site.module_type, NONE, output)
    spec = site.spec
    kernel = _product(spec.kernel_size)
    stride = "" if spec.stride == (1, 1) else f" /{_size(spec.stride)}"
    dilation = "" if spec.dilation == (1, 1) else f" d{_size(spec.dilation)}"
    groups = " dw" if spec.is_depthwise else f" g{spec.groups}" if spec.groups > 1 else ""
    return (f"{kernel}{stride}{dilation}{groups}", f"{spec.in_channels}>{spec.out_channels}", output)


def _output_cell(site: ConvSite) -> str:
    if not site.calls:
        return "not run"
    sizes = dict.fromkeys(_product(call.output_shape[2:]) for call in site.calls)
    times = f" (x{len(site.calls)})" if len(site.calls) > 1 else ""
    return f"{', '.join(sizes)}{times}"


def _offer_cell(site: ConvSite, offer: Candidate | Kept | None, letters: Mapping[Reason, str]) -> str:
    if isinstance(offer, Candidate):
        return times_text(offer.macs / site.macs) if site.macs else NONE
    reason = offer.reason if offer else site.reason
    return f"({letters[reason]})" if reason is not None and reason in letters else NONE


def _inspect_totals(trace: Trace, candidates: CandidateTable, schemes: Sequence[str]) -> Sequence[str]:
    def ratio(scheme: str) -> str:
        saved = 0
        for site in trace.sites:
            offer = candidates.get(site.name, {}).get(scheme)
            saved += site.macs - offer.macs if isinstance(offer, Candidate) else 0
        return times_text((trace.total_macs - saved) / trace.total_macs) if trace.total_macs else NONE

    cells = [mega(trace.total_macs), "100.0", kilo(trace.total_params)]
    return ("whole network", "", "", "", *cells, *(ratio(scheme) for scheme in schemes))


def _reason_letters(trace: Trace, candidates: CandidateTable) -> Mapping[Reason, str]:
    """a, b, ... for the reasons in the order in which the table shows them."""
    reasons: dict[Reason, None] = {}
    for site in trace.sites:
        for offer in candidates.get(site.name, {}).values():
            if not isinstance(offer, Candidate):
                reasons[offer.reason] = None
    return dict(zip(reasons, ascii_lowercase, strict=False))


def _inspect_caption(headings: Mapping[str, str], letters: Mapping[Reason, str]) -> str | None:
    if not headings:
        return None
    named = [f"{h} is {name.replace('_', ' ')}" for name, h in headings.items() if h != name.replace("_", "\n")]
    meaning = "MACs with each scheme, as a ratio to those now" + (f"; {', '.join(named)}" if named else "")
    return "\n".join((f"{meaning}.", *(f"({letter}) {reason.value}" for reason, letter in letters.items())))


def _product(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _size(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else _product(size)
