import re
from dataclasses import replace
from html.parser import HTMLParser
from types import ModuleType

import pytest

from sepdeploy.core.measurement import Method
from sepdeploy.errors import ContractError
from sepdeploy.render.html import render_html

VOID = {"meta", "br", "rect", "line"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


REPORTS = [
    "success", "agreement", "regression", "slow", "nothing_replaced", "hostile", "half_measured", "counted",
]  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_well_formed_and_needs_nothing_from_outside(name: str, samples: ModuleType) -> None:
    html = render_html(samples.REPORTS[name]())
    page = Page(html)

    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "form"}
    assert not [value for key, value in page.attributes if key in ("src", "href") or key.startswith("on")]
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_hostile_names_are_text(samples: ModuleType) -> None:
    html = render_html(samples.hostile_report())

    html.encode("utf-8")
    assert "<script" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert Page(html).text.count("<script>alert('x')</script>&[red]\\x1b[2J\\u202e\\udcff") >= 10


def test_page_has_every_file_hash_layer_check_and_note(samples: ModuleType) -> None:
    report = samples.success_report()
    text = Page(render_html(report)).text

    expected = [result.artifact.sha256 for result in report.artifacts]
    expected += [decision.name for decision in report.plan.decisions]
    expected += [check.sentence for check in report.checks]
    expected += [*report.notes, report.command, report.calibration.sha256, report.validation.sha256, "broken.jpg"]
    expected += ["about 3.20", "Softmax x1", "1.78 to 1.91", "400 repeats after 20 warm-up"]
    assert [each for each in expected if each not in text] == []


def test_bars_are_proportional_to_latency(samples: ModuleType) -> None:
    report = samples.success_report()

    widths = [
        float(width)
        for width in re.findall(r'<rect class="bar-\w+" x="0" y="0" width="([\d.]+)%" height="16"', render_html(report))
    ]

    longest_ms = max(result.latency.p90_ms for result in report.artifacts)
    assert widths == [pytest.approx(100 * each.latency.median_ms / longest_ms, abs=0.01) for each in report.artifacts]


def test_verdict_is_marked_as_broken_only_when_a_promise_is(samples: ModuleType) -> None:
    assert '<section class="verdict broken">' in render_html(samples.slow_report())
    assert '<section class="verdict">' in render_html(samples.success_report())


def test_missing_max_drop_and_missing_checks_are_said(samples: ModuleType) -> None:
    assert "No --max-drop was set" in render_html(samples.agreement_report())
    assert "No promise was checked" in render_html(samples.nothing_replaced_report())


def test_two_methods_are_refused(samples: ModuleType) -> None:
    report = samples.success_report()
    first, *others = report.artifacts
    mixed = replace(first, latency=replace(first.latency, method=Method.EMULATED_COUNT))

    with pytest.raises(ContractError, match="must not mix methods"):
        render_html(replace(report, artifacts=(mixed, *others)))


def test_files_that_were_not_measured_have_dashes_and_no_bar(samples: ModuleType) -> None:
    html = render_html(samples.half_measured_report())
    assert html.count('<span class="muted">not measured</span>') == 2
    assert html.count('aria-label="median') == 4
    text = Page(html).text
    assert "Method: measured time on this machine or a board." in text
    assert "onnxruntime" not in text.split("Environment")[1]  # where nothing was measured, there is no environment


def test_files_of_an_emulated_core_say_how_they_compare(samples: ModuleType) -> None:
    html = render_html(samples.counted_report())
    assert html.count('<span class="muted">not measured</span>') == 6  # bars are of times
    assert "On the<br>Cortex-A72" in html
    assert html.count('<td class="n bad">3 steps</td>') == 2
    assert html.count('<td class="n bad">does not run</td>') == 2
    assert html.count('<td class="n">2.5e-07</td>') == 2
    text = Page(html).text
    assert "Latency was not measured: the target is emulated, see below." in text
    assert text.count("7000 to 9800") == 4 + 2  # four files, and before and after of the target
    assert "On the Cortex-A72, emulated, the file was run on random inputs beside this machine" in text
    assert "On the Cortex-A72" not in Page(render_html(samples.success_report())).text
