"""The report as one HTML page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from sepdeploy.core.measurement import Latency
from sepdeploy.core.plan import Decision, Replaced
from sepdeploy.core.report import ArtifactResult, LayerTransfer, Report
from sepdeploy.render.format_numbers import (
    count_text,
    error_text,
    percent_text,
    plural,
    printable,
    size_text,
    three_digits,
    times_text,
)
from sepdeploy.render.int8 import float_layer_text, int8_caption, int8_results, share_text, sqnr_text
from sepdeploy.render.summary import (
    common_method,
    cost_after,
    counts_caption,
    environment_text,
    kept_counts,
    numerics_text,
    outcome_text,
    plan_sentence,
    quality_ratio,
    recovery_sentence,
    selection_sentence,
    summarize,
    target_label,
    target_result,
    verdict,
)

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render_html"]


@dataclass(frozen=True, slots=True)
class _Bar:
    """A latency on the shared axis of the chart; all values are percent of its width."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _FileRow:
    """One file with its place in the latency chart; `bar` is None where it was not timed."""

    result: ArtifactResult
    bar: _Bar | None
    is_target: bool


@dataclass(frozen=True, slots=True)
class _LayerRow:
    """One convolution; the shares are percent of the costliest convolution's MACs, for the bars."""

    decision: Decision
    is_replaced: bool
    outcome: str
    macs_after: int
    share_before: float
    share_after: float
    transfer: LayerTransfer | None


def render_html(report: Report) -> str:
    """The report as a self-contained page in light and dark, readable on paper too.

    Args:
        report: What to show; every number on the page comes from it and every text in it is escaped.

    Returns:
        HTML5 text; equal reports give equal text.

    Raises:
        UsageError: if the report names a target that does not exist.
        ContractError: if its latencies came about in different ways.
    """
    latencies = [result.latency for result in report.artifacts if result.latency]
    counts = [(result.artifact.path, result.counts) for result in report.artifacts if result.counts]
    method = common_method(latencies)
    template = _environment().from_string(files("sepdeploy.render").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        report=report,
        verdict=verdict(report),
        target=target_label(report),
        summary=summarize(report),
        files=_file_rows(report),
        int8_results=int8_results(report),
        int8_caption=int8_caption(report),
        layers=_layer_rows(report),
        plan_sentence=plan_sentence(report.plan),
        recovery_sentence=recovery_sentence(report) if report.recovery else "",
        selection_sentence=selection_sentence(report),
        kept_counts=kept_counts(report.plan),
        latency_method=method.value if method else None,
        counts=counts,
        compared_cores=list(dict.fromkeys(r.numerics.core for r in report.artifacts if r.numerics)),
        counts_caption=counts_caption([each for _, each in counts]),
        environments=list(dict.fromkeys(environment_text(latency.environment) for latency in latencies)),
        repeats=list(dict.fromkeys((latency.repeats, latency.warmup) for latency in latencies)),
    )


def _file_rows(report: Report) -> Sequence[_FileRow]:
    """The files with the original and the converted one of a kind next to each other, as they were reported."""
    longest_ms = max((result.latency.p90_ms for result in report.artifacts if result.latency), default=0.0)
    targets = [target_result(report, result.artifact.role) for result in report.artifacts]
    return [
        _FileRow(result, _bar(result.latency, longest_ms), is_target=result == target)
        for result, target in zip(report.artifacts, targets, strict=True)
    ]


def _bar(latency: Latency | None, longest_ms: float) -> _Bar | None:
    if latency is None or longest_ms <= 0:
        return None
    median, low, high = (100 * ms / longest_ms for ms in (latency.median_ms, latency.p10_ms, latency.p90_ms))
    return _Bar(median=median, low=low, high=high)


def _layer_rows(report: Report) -> Sequence[_LayerRow]:
    transfers = {transfer.name: transfer for transfer in report.transfer}
    most = max((decision.macs for decision in report.plan.decisions), default=0) or 1
    rows = []
    for decision in report.plan.decisions:
        after = cost_after(decision).macs
        rows.append(
            _LayerRow(
                decision=decision,
                is_replaced=isinstance(decision.outcome, Replaced),
                outcome=outcome_text(decision),
                macs_after=after,
                share_before=100 * decision.macs / most,
                share_after=min(100.0, 100 * after / most),
                transfer=transfers.get(decision.name),
            )
        )
    return rows


def _environment() -> Environment:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def finalize(value: object) -> object:
        """Escape what is unprintable in texts; Markup is our own template's output."""
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        count=count_text,
        error=error_text,
        float_layer=float_layer_text,
        numerics=numerics_text,
        percent=percent_text,
        plural=plural,
        quality_ratio=quality_ratio,
        share=share_text,
        size=size_text,
        sqnr=sqnr_text,
        three_digits=three_digits,
        times=times_text,
    )
    return environment
