from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from rich.console import Console

from sepdeploy.core.training import RecoveryStep
from sepdeploy.render import terminal
from sepdeploy.render.html import render_html
from sepdeploy.render.int8 import int8_results, int8_table
from sepdeploy.render.summary import recovery_sentence

Check = Callable[[str, str], None]


def as_text(*renderables: object) -> str:
    console = Console(width=100, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(*renderables, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@pytest.mark.parametrize("name", ["success", "agreement", "regression", "slow", "nothing_replaced", "hostile"])
def test_report_tables(name: str, samples: ModuleType, check_golden: Check) -> None:
    report = samples.REPORTS[name]()

    recovery = (terminal.recovery_table(report),) if report.recovery else ()
    tables = (terminal.summary_table(report), terminal.artifacts_table(report), terminal.plan_table(report.plan))

    int8 = (int8_table(report),) if int8_results(report) else ()
    check_golden(f"report_{name}.txt", as_text(*recovery, *tables, *int8))


@pytest.mark.parametrize("name", ["success", "slow", "nothing_replaced", "hostile"])
def test_html(name: str, samples: ModuleType, check_golden: Check) -> None:
    check_golden(f"report_{name}.html", render_html(samples.REPORTS[name]()))


def test_inspect_table(samples: ModuleType, check_golden: Check) -> None:
    check_golden("inspect.txt", as_text(terminal.inspect_table(*samples.trace_and_candidates())))


def test_latency_table(samples: ModuleType, check_golden: Check) -> None:
    results = {each.artifact.path: each.latency for each in samples.success_report().artifacts}

    check_golden("latency.txt", as_text(terminal.latency_table(results)))


def test_fine_tuning_has_images_of_its_own_to_be_judged_by(samples: ModuleType) -> None:
    report = samples.success_report()
    tuned = RecoveryStep("fine-tuning", 0.0121, 0.0095, 1000, is_kept=True)
    for recovery, images in (
        (report.recovery, "128 held-out calibration images"),
        ((*report.recovery, tuned), "1,000 held-out images for the training and 128 for the other steps"),
        ((*report.recovery, replace(tuned, images=128)), "128 held-out images"),  # too few: the calibration images
        ((tuned,), "1,000 held-out images"),
        ((tuned, replace(tuned, name="quantization-aware training")), "1,000 held-out images"),
    ):
        sentence = recovery_sentence(replace(report, recovery=recovery))
        assert f"against the original's on {images} (divergence" in sentence
        assert ("as its int8 files round it" in sentence) == (recovery[-1].name == "quantization-aware training")
