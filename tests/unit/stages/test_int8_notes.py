"""What the report says of how a network was prepared for int8."""

from types import SimpleNamespace

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.int8 import Int8Step
from sepdeploy.stages.report import _int8_notes

STEPS = (
    Int8Step("calibration", 30.0, 31.0, 64, True, "mse: minmax 30.0 dB, mse 31.0 dB"),
    Int8Step("equalisation", 31.0, 30.5, 64, False, "8 channels"),
)


def notes(calibration=512, **parts):
    def result(role, file_format):
        agreement = 0.998 if file_format is Format.TFLITE else None
        given = {"int8_steps": (), "int8_note": "", "int8_agreement_ratio": agreement} | parts
        artifact = SimpleNamespace(role=role, format=file_format, precision=Precision.INT8)
        return SimpleNamespace(artifact=artifact, **given)

    results = [result(role, each) for role in Role for each in Format]
    return _int8_notes(SimpleNamespace(calibration=range(calibration)), results)


def test_steps_and_what_they_won():
    steps, agreement = notes(int8_steps=STEPS)
    assert "on 64 held-out calibration images: calibration 31.0 dB (mse: " in steps
    assert steps.endswith("; equalisation -0.5 dB, undone (8 channels)")
    assert agreement == "the int8 files of both formats agree within one step on 99.8% of the output values"


def test_images_that_served_for_both_are_not_called_held_out():
    steps, _ = notes(calibration=64, int8_steps=STEPS)
    assert "on 64 calibration images (too few to hold some out): " in steps


def test_agreement_is_said_without_steps_too():
    (agreement,) = notes()  # the ranges are those of a training
    assert "agree within one step on 99.8%" in agreement
    reason, agreement = notes(int8_note="int8 could not be simulated")
    assert reason == "int8 could not be simulated"
    assert "agree within one step on 99.8%" in agreement
    assert notes(int8_agreement_ratio=None) == ()
