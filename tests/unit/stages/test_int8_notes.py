"""What the report says of how a network was prepared for int8."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.int8 import Int8Options, Int8Step
from sepdeploy.core.mixed import MixReason
from sepdeploy.data.images import open_images
from sepdeploy.stages.int8 import prepare_for_int8
from sepdeploy.stages.report import _int8_notes

STEPS = (
    Int8Step("calibration", 30.0, 31.0, 64, True, "mse: minmax 30.0 dB, mse 31.0 dB"),
    Int8Step("equalisation", 31.0, 30.5, 64, False, "8 channels"),
)


def notes(calibration=512, mixed=None, **parts):
    def result(role, file_format):
        agreement = 0.998 if file_format is Format.TFLITE else None
        given = {"int8_steps": (), "int8_note": "", "int8_agreement_ratio": agreement} | parts
        artifact = SimpleNamespace(role=role, format=file_format, precision=Precision.INT8)
        return SimpleNamespace(artifact=artifact, **given)

    results = [result(role, each) for role in Role for each in Format]
    return _int8_notes(SimpleNamespace(calibration=range(calibration)), results, mixed)


def test_steps_and_what_they_won():
    steps, agreement = notes(int8_steps=STEPS)
    assert "on 64 held-out calibration images: calibration 31.0 dB (mse: " in steps
    assert steps.endswith("; equalisation -0.5 dB, undone (8 channels)")
    assert agreement == "the int8 files of both formats agree within one step on 99.8% of the output values"


@pytest.mark.parametrize(("reason", "is_said"), [(MixReason.FASTER, True), (None, False)])
def test_a_file_with_layers_in_float_is_not_expected_to_agree(reason, is_said):
    (agreement,) = notes(mixed=SimpleNamespace(layers=[SimpleNamespace(reason=reason)]))
    assert ("computes some layers in float" in agreement) is is_said


def test_images_that_served_for_both_are_not_called_held_out():
    few, _ = notes(calibration=3, int8_steps=(Int8Step("calibration", 30.0, 30.0, 3, True, "minmax"),))
    assert few.startswith("int8: 3 calibration images, too few to hold some out")
    assert "dB" not in few


@pytest.mark.parametrize(("count", "method", "found"), [(3, "auto", "minmax"), (3, "mse", "mse"), (8, "auto", None)])
def test_nothing_is_chosen_by_the_images_that_it_was_computed_on(tmp_path, count, method, found):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    images = open_images(str(tmp_path / "images.npz"), role="calibration")
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval().requires_grad_(False)
    example = torch.from_numpy(next(images.batches(1))[0])
    inputs = SimpleNamespace(calibration=images, example=lambda: example)
    prepared = prepare_for_int8(Int8Options(method), inputs, trace_network(network, example), network, 0)
    if found is None:
        assert len(prepared.steps) > 1
        assert "entropy" in prepared.steps[0].detail
    else:
        assert [step.name for step in prepared.steps] == ["calibration"]
        assert prepared.method == found
        assert not prepared.is_changed


def test_agreement_is_said_without_steps_too():
    (agreement,) = notes()  # the ranges are those of a training
    assert "agree within one step on 99.8%" in agreement
    reason, agreement = notes(int8_note="int8 could not be simulated")
    assert reason == "int8 could not be simulated"
    assert "agree within one step on 99.8%" in agreement
    assert notes(int8_agreement_ratio=None) == ()
