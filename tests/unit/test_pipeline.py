"""What the pipeline asks of its stages."""

from dataclasses import replace
from pathlib import Path

from sepdeploy import pipeline
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.training import TrainOptions


def test_what_is_only_timed_is_quantized_the_quickest_way():
    given = ConvertOptions(
        Path("m.pt"), "a:b", "c", target="litert", precision=Precision.INT8, int8=Int8Options("auto", io="uint8"),
        train="t", training=TrainOptions(is_quantization_aware=True),
    )  # fmt: skip
    found = pipeline._for_timing(given)
    assert found.int8 == Int8Options("minmax", io="uint8", equalizes=False, corrects_bias=False)
    assert (found.formats, found.precisions) == ((Format.TFLITE,), (Precision.FLOAT32, Precision.INT8))
    assert pipeline._for_timing(replace(given, precision=Precision.FLOAT32)).precisions == (Precision.FLOAT32,)
