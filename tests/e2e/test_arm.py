"""A conversion whose target is an emulated Arm core."""

import pytest

import sepdeploy
from sepdeploy.bench.arm_root import missing_tools
from sepdeploy.core.artifact import Precision, Role
from sepdeploy.core.measurement import Method
from sepdeploy.render.html import render_html
from sepdeploy.render.summary import summarize, verdict

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")


@pytest.fixture(scope="module")
def report(workplace):
    options = workplace.options(
        "Classifier", model=workplace.trained(), target="cortex-a72:ort", precision=Precision.INT8,
        output=workplace.folder / "arm.sepdeploy",
    )  # fmt: skip
    return sepdeploy.convert(options)


def test_files_are_counted_and_not_timed(report):
    assert [result.latency for result in report.artifacts] == [None] * 4
    for result in report.artifacts:
        assert result.counts.method is Method.EMULATED_COUNT
        assert result.counts.artifact_sha256 == result.artifact.sha256
        assert (result.counts.speedup is None) == (result.artifact.role is Role.ORIGINAL)
    (speed,) = (check for check in report.checks if check.name == "speed")
    assert "modelled cycles" in speed.sentence
    assert "no time was measured" in speed.sentence


def test_nothing_calls_modelled_cycles_a_latency(report):
    (row,) = (row for row in summarize(report) if "cycles" in row.quantity)
    assert row.quantity == "Modelled kcycles (Cortex-A72 (emulated) ONNX Runtime int8, 1 thread), low to high"
    assert " ms" not in row.original + row.converted
    page = render_html(report)
    assert "Modelled cycles" in page
    assert "Latency was not measured: the target is emulated" in page
    assert "modelled cycles" in verdict(report)
