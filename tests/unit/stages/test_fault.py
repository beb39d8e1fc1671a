"""The verdict names the stage at fault, and advises only what there is and is not done already."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sepdeploy.cli.convert import command
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.measurement import Quality
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.report import Drops
from sepdeploy.core.training import TrainOptions
from sepdeploy.stages.fault import QUANTIZATION_ADVICE, find_faults, is_beyond_transfer
from sepdeploy.stages.report import _accuracy_check

INT8 = ConvertOptions(Path("m.pt"), "a:b", "c", precision=Precision.INT8, max_drop_points=1.0)
FLOAT = replace(INT8, precision=Precision.FLOAT32)


@pytest.mark.parametrize(
    ("options", "file", "network", "stages"),
    [
        (INT8, 1.0, 0.9, []),
        (INT8, 1.5, 1.4, ["transfer"]),
        (INT8, 1.5, 0.5, ["quantization"]),
        (INT8, 1.5, 0.9, ["quantization"]),  # the float network holds the limit: the rest is the file's
        (INT8, 5.0, 1.5, ["quantization", "transfer"]),
        (INT8, 5.0, 3.5, ["transfer", "quantization"]),
        (INT8, 1.5, 2.0, ["transfer"]),  # quantization even won some back
        (FLOAT, 1.5, 1.5, ["transfer"]),
        (FLOAT, 1.0, 1.0, []),
    ],
)
def test_stage_at_fault(options, file, network, stages):
    faults = find_faults(options, Drops(file, network, 0.1), 512)
    assert [fault.stage for fault in faults] == stages
    points = {"transfer": network, "quantization": file - network}
    assert all(fault.points == points[fault.stage] for fault in faults)


def test_without_a_limit_nothing_is_at_fault():
    options = ConvertOptions(Path("m.pt"), "a:b", "c", scheme="dense", precision=Precision.INT8)
    assert find_faults(options, Drops(50.0, 40.0, 0.0), 512) == ()


@pytest.mark.parametrize(
    ("drops", "is_beyond"),
    [
        (Drops(5.0, 0.5, 4.0), True),
        (Drops(5.0, 0.5, 0.9), False),  # the original's file holds the limit: replacing less may help
        (Drops(5.0, 4.5, 4.0), False),  # the float network does not
        (Drops(1.4, 0.9, 4.0), False),
        (Drops(1.0, 0.0, 4.0), False),
        (Drops(5.0, 0.5, None), False),
    ],
)
def test_replacing_less_does_not_mend_what_int8_breaks(drops, is_beyond):
    assert is_beyond_transfer(1.0, drops) == is_beyond


def advice(options, stage, images=512):
    (fault,) = find_faults(options, Drops(9.0, 9.0 if stage == "transfer" else 0.0, None), images)
    assert fault.stage == stage
    return fault.advice


def test_what_is_done_already_is_not_advised():
    assert "--train with training images" in advice(INT8, "transfer")
    assert "more --epochs" in advice(replace(INT8, train="images"), "transfer")
    assert "--reconstruct" in advice(replace(INT8, reconstruct=None), "transfer")
    assert "--reconstruct" not in advice(INT8, "transfer")
    assert "--scheme auto" in advice(replace(INT8, scheme="low_rank"), "transfer")
    assert "--scheme auto" not in advice(INT8, "transfer")
    for stage in ("transfer", "quantization"):
        assert "more calibration images (there were 30)" in advice(INT8, stage, images=30)
        assert not any("calibration images" in each for each in advice(INT8, stage))
    done = {
        "--qat": replace(INT8, train="images", training=TrainOptions(is_quantization_aware=True)),
        "--mixed auto": replace(INT8, mixed="auto"),
        "--calibration-method auto": INT8,
        "--adaptive-rounding": replace(INT8, int8=Int8Options(rounds_adaptively=True)),
    }
    assert done.keys() == QUANTIZATION_ADVICE.keys()
    open_to_all = replace(INT8, train="images", int8=Int8Options(calibration_method="minmax"))
    for text, options in done.items():
        assert text in advice(open_to_all, "quantization")
        assert text not in advice(options, "quantization")
    assert "--qat with --train" in advice(INT8, "quantization")


def test_beside_a_hook_no_training_is_advised_that_it_takes_the_place_of():
    for points, stage in ((9.0, "transfer"), (0.0, "quantization")):
        (fault,) = find_faults(INT8, Drops(9.0, points, None), 512, is_hooked=True)
        assert fault.stage == stage
        assert not any("--qat" in text or "--train" in text or "--epochs" in text for text in fault.advice)
        assert len(fault.advice) > 0


def test_every_option_that_is_advised_exists():
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    tried = [INT8, replace(INT8, reconstruct=None, scheme="low_rank"), replace(INT8, train="images")]
    texts = [text for each in tried for stage in ("transfer", "quantization") for text in advice(each, stage, images=9)]
    assert {flag for text in texts for flag in re.findall(r"--[a-z-]+", text)} <= options


def test_the_sentence_says_which_stage_lost_how_much():
    def result(role, points):
        artifact = SimpleNamespace(role=role, format=Format.ONNX, precision=Precision.INT8)
        return SimpleNamespace(artifact=artifact, quality=quality(points))

    def quality(points):
        return Quality(500, 0.9, 0.9, 20.0, 0.1, points, "accuracy")

    results = [result(Role.ORIGINAL, 0.3), result(Role.CONVERTED, 4.0)]
    check = _accuracy_check(INT8, results, quality(4.0), quality(0.25), 512)
    assert not check.is_met
    assert [fault.stage for fault in check.faults] == ["quantization"]
    assert check.sentence.startswith(
        "4.00 points of accuracy lost by the ort int8 file on 500 images, the limit is 1; "
    )
    assert "quantization (the int8 file against its float network) loses 3.75: try" in check.sentence
    assert "transfer" not in check.sentence
    assert "(the original network loses 0.30 in int8)" in check.sentence
    held = _accuracy_check(INT8, results, quality(0.5), quality(0.25), 512)
    assert held.is_met
    assert held.faults == ()
    assert held.sentence.endswith("the limit is 1")


def test_a_float_file_that_loses_more_than_its_network_breaks_the_limit():
    def result(role, points):
        quality = Quality(500, 0.9, 0.9, 20.0, 0.1, points, "accuracy")
        return SimpleNamespace(
            artifact=SimpleNamespace(role=role, format=Format.ONNX, precision=Precision.FLOAT32), quality=quality
        )

    results = [result(Role.ORIGINAL, 0.0), result(Role.CONVERTED, 1.5)]
    network = Quality(500, 0.9, 0.9, 20.0, 0.1, 0.9, "accuracy")
    check = _accuracy_check(FLOAT, results, results[1].quality, network, 512)
    assert not check.is_met
    assert [fault.stage for fault in check.faults] == ["transfer"]
