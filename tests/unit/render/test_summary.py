from dataclasses import replace
from types import ModuleType

import pytest

from sepdeploy.core.artifact import Role
from sepdeploy.core.measurement import Method
from sepdeploy.core.plan import Reason
from sepdeploy.core.report import Check
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.render import summary


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "success",
            "The converted network is 1.84x faster than the original on LiteRT int8"
            " with 0.50 points less accuracy on 2,000 validation images.",
        ),
        (
            "agreement",
            "The converted network is 1.84x faster than the original on LiteRT int8"
            " and agrees with it on 97.20% of 2,000 validation images.",
        ),
        (
            "regression",
            "The converted network is 1.84x faster than the original on LiteRT int8"
            " with an output error of 3.10% on 2,000 validation images.",
        ),
        (
            "slow",
            "Not a success, the speed promise is broken: 1.09x slower than the original, 95% interval 1.05 to 1.13.",
        ),
        ("nothing_replaced", "Nothing was replaced: all 6 convolutions stay as they were."),
    ],
)
def test_verdict(name: str, sentence: str, samples: ModuleType) -> None:
    assert summary.verdict(samples.REPORTS[name]()) == sentence


def test_verdict_names_every_broken_promise(samples: ModuleType) -> None:
    broken = (Check("accuracy", False, "3 points lost."), Check("speed", False, "1.1x slower"))

    sentence = summary.verdict(replace(samples.success_report(), checks=broken))

    assert sentence == "Not a success, the accuracy and speed promises are broken: 3 points lost; 1.1x slower."


def test_broken_promise_wins_over_nothing_replaced(samples: ModuleType) -> None:
    report = replace(samples.nothing_replaced_report(), checks=(Check("speed", False, "not faster"),))

    assert summary.verdict(report).startswith("Not a success")


def test_verdict_without_latency_speaks_of_macs(samples: ModuleType) -> None:
    report = replace(samples.success_report(), artifacts=())

    assert summary.verdict(report) == (
        "The converted network needs 2.85x fewer multiply-accumulates (its latency was not measured)"
        " with 0.40 points less accuracy on 2,000 validation images."
    )


def test_slower_file_without_a_check_is_called_slower(samples: ModuleType) -> None:
    assert "is 1.09x slower than the original" in summary.verdict(replace(samples.slow_report(), checks=()))


@pytest.mark.parametrize("ratio", [0.997, 1.0, 1.003])
def test_what_is_as_fast_is_not_called_faster_or_slower(samples: ModuleType, monkeypatch, ratio: float) -> None:
    monkeypatch.setattr(summary, "speedup_between", lambda before, after: summary.Speedup(ratio, None, None))
    report = replace(samples.slow_report(), checks=())
    assert "is about as fast as the original" in summary.verdict(report)
    assert summary.summarize(report)[-1].change in ("unchanged", "about the same")


def test_summary_rows(samples: ModuleType) -> None:
    rows = summary.summarize(samples.success_report())

    assert [(row.original, row.converted, row.change) for row in rows] == [
        ("88.55%", "88.05%", "-0.50 points"),
        ("0.305 MB", "0.142 MB", "2.16x smaller"),
        ("40.6 M", "14.2 M", "2.85x fewer"),
        ("270 k", "102 k", "2.66x fewer"),
        ("52.2 kB", "68.6 kB", "1.31x larger"),
        ("0.377 (0.358) ms", "0.205 (0.195) ms", "1.84x faster"),
    ]
    assert rows[0].quantity == "Accuracy (PyTorch to LiteRT int8, 2,000 images)"


def test_summary_without_files_says_so(samples: ModuleType) -> None:
    rows = summary.summarize(samples.nothing_replaced_report())

    assert rows[0].quantity == "Accuracy (PyTorch, 2,000 images)"
    assert (rows[1].original, rows[1].converted, rows[1].change) == ("not made", "not made", "")
    assert rows[2].change == "unchanged"
    assert (rows[5].original, rows[5].converted, rows[5].change) == ("not measured", "not measured", "")


def test_speedup_is_the_interleaved_one_where_the_original_is_the_reference(samples: ModuleType) -> None:
    before, after = samples.latency(1.0, None), samples.latency(0.5, 1.9)

    assert summary.speedup_between(before, after) == summary.Speedup(1.9, 1.9 * 0.97, 1.9 * 1.04)


def test_speedup_is_the_ratio_of_medians_where_another_file_is_the_reference(samples: ModuleType) -> None:
    before, after = samples.latency(1.0, 1.2), samples.latency(0.5, 2.5)

    assert summary.speedup_between(before, after) == summary.Speedup(2.0, None, None)


def test_unknown_target_is_refused(samples: ModuleType) -> None:
    report = replace(samples.success_report(), target="npu")

    with pytest.raises(UsageError, match="there is no target 'npu'; choose one of ort, litert"):
        summary.verdict(report)


def test_target_result_is_the_file_of_that_runtime_and_precision(samples: ModuleType) -> None:
    result = summary.target_result(replace(samples.success_report(), target="ort"), Role.CONVERTED)

    assert result is None  # the run made no int8 ONNX file


def test_methods_do_not_mix(samples: ModuleType) -> None:
    measured = samples.latency(1.0, None)

    with pytest.raises(ContractError, match="must not mix methods"):
        summary.common_method([measured, replace(measured, method=Method.EMULATED_COUNT)])


def test_kept_counts_and_the_sentence_add_up(samples: ModuleType) -> None:
    plan = samples.success_report().plan

    assert summary.kept_counts(plan) == ((Reason.FEW_CHANNELS, 1), (Reason.EXCEEDS_MAX_DROP, 1))
    assert summary.plan_sentence(plan) == "4 of 6 convolutions replaced, 2 kept"
