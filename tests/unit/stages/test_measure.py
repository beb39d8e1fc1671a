"""Costs of files on a target that may not run all of them."""

from types import SimpleNamespace

import pytest

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.errors import ToolError
from sepdeploy.stages import measure


@pytest.mark.parametrize(("target", "fails"), [("cortex-a72", False), ("cortex-a72:ort", True)])
def test_files_of_the_other_format_may_stay_unmeasured(monkeypatch, target, fails):
    def compare(files, **_):
        if files[0].format is Format.ONNX:
            raise ToolError("the board has no onnxruntime")
        return [counts for _ in files]

    counts = SimpleNamespace()
    kind = SimpleNamespace(name="a core", method=None, make=lambda *_: SimpleNamespace(compare=compare))
    monkeypatch.setattr(measure, "find_kind", lambda _: kind)
    monkeypatch.setattr(measure, "_with_measured", lambda result, measured: (result, measured))
    results = [
        SimpleNamespace(artifact=SimpleNamespace(format=each, precision=Precision.INT8, role=Role.ORIGINAL))
        for each in (Format.TFLITE, Format.ONNX)
    ]
    options = SimpleNamespace(
        formats=tuple(Format), precisions=(Precision.INT8,), target=target, threads=1, bench_seconds=1.0, seed=0
    )
    said = []
    progress = SimpleNamespace(stage=said.append)
    if fails:
        with pytest.raises(ToolError, match="no onnxruntime"):
            measure.measure_cost(results, options, progress)
        return
    measured = measure.measure_cost(results, options, progress)
    assert sorted(measured, key=str) == sorted([results[1], (results[0], counts)], key=str)
    assert any("onnx int8 files stay unmeasured: the board has no onnxruntime" in line for line in said)
