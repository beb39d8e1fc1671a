"""Networks of all kinds through the whole pipeline, from Python, each to ONNX."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

import sepdeploy
from sepdeploy import pipeline
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.plan import Reason
from sepdeploy.core.report import Drops, Report
from sepdeploy.data.images import open_images
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.stages import attempts


def check_file(report: Report, options, images: str, preprocess=None) -> list[np.ndarray]:
    """The bundle's ONNX file computes what the bundle's network computes; returns its outputs."""
    batch, _ = next(open_images(images, role="validation", preprocess=preprocess).batches(8))
    network = sepdeploy.load(options.output_folder)
    with torch.no_grad():
        outputs = network(torch.from_numpy(batch.copy()))
    expected = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    session = onnxruntime.InferenceSession(options.output_folder / "model.onnx", providers=["CPUExecutionProvider"])
    per_image = [session.run(None, {"input": image[None]}) for image in batch]
    found = [np.concatenate(values) for values in zip(*per_image, strict=True)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)
    assert report.original.convs == len(report.plan.replaced) + len(report.plan.kept)
    return found


@pytest.mark.parametrize(
    ("name", "basis", "replaced"),
    [
        ("Flattened", "agreement", 1),  # flattens with view(x.size(0), -1)
        ("TwoOutputs", "agreement", 3),
        ("Segmenter", "relative error", 2),  # 4-D output, behind a 1x1 stem
    ],
)
def test_convert(workplace, name, basis, replaced):
    options = workplace.options(name)
    report = sepdeploy.convert(options)
    assert report.converted_quality.drop_basis == basis
    assert report.converted_quality.accuracy_ratio is None
    assert 0 < report.converted_quality.relative_error < 1
    assert len(report.plan.replaced) == replaced
    assert any("were held out" in note for note in report.notes)
    check_file(report, options, workplace.images())


def test_channels_last_network(workplace):
    from sepdeploy.data.preprocess import read_preprocess

    path = workplace.folder / "nhwc.toml"
    path.write_text('layout = "NHWC"\n')
    options = workplace.options("ChannelsLast", preprocess=path)
    report = sepdeploy.convert(options)
    assert report.input_shape == (1, 16, 16, 3)
    check_file(report, options, workplace.images(), read_preprocess(path))


def test_in_place_network_on_grey_images(workplace):
    # A grey batch is contiguous in every layout, so nothing but a copy keeps such a network off the shared images.
    images = workplace.images(channels=1)
    precisions = (Precision.FLOAT32, Precision.FLOAT16)
    options = workplace.options("grey", calibration=images, validation=images, precisions=precisions)
    report = sepdeploy.convert(options)
    check_file(report, options, images)
    assert Counter(result.artifact.precision for result in report.artifacts) == dict.fromkeys(precisions, 2)
    assert all(result.latency.median_ms > 0 and result.quality.images for result in report.artifacts)
    size, half_size = (report.result(Format.ONNX, each, Role.CONVERTED).artifact.size_bytes for each in precisions)
    assert half_size < size
    assert not (options.output_folder / "model.int8.onnx").exists()
    assert any("the weights are float16" in note for note in report.notes)
    for result in report.artifacts:
        if result.artifact.precision.value == "float32" and result.artifact.role.value == "original":
            assert result.quality.agreement_ratio == 1
            assert result.quality.relative_error < 1e-5


def test_half_precision_checkpoint_of_a_regression_network_and_dense_scheme(workplace):
    model = workplace.checkpoint("regressor", torch.float16)
    options = workplace.options("regressor", model=model, scheme="dense")
    report = sepdeploy.convert(options)
    assert report.is_success
    assert report.plan.replaced == {}
    assert {kept.reason for kept in report.plan.kept.values()} == {Reason.SCHEME_IS_DENSE}
    assert any("float16 weights were converted" in note for note in report.notes)
    assert report.original_quality.drop_basis == "relative error"
    assert report.original_quality.agreement_ratio is None
    check_file(report, options, workplace.images())


def test_nothing_to_replace_is_no_success_and_says_why(workplace):
    options = workplace.options("AllPointwise", max_drop_points=1.0)
    report = sepdeploy.convert(options)
    assert not report.is_success
    (failed,) = (check for check in report.checks if not check.is_met)
    assert failed.name == "speed"
    assert "no convolution could be replaced" in failed.sentence
    plan = json.loads((options.output_folder / "plan.json").read_bytes())
    assert plan["decisions"][0]["outcome"]["reason"] == Reason.POINTWISE.value
    check_file(report, options, workplace.images())


def test_spatial_scheme_and_a_class_order_that_does_not_fit(workplace):
    images = workplace.images(labels="Classifier")
    wrong = workplace.folder / "rotated.npz"
    with np.load(images) as arrays:
        np.savez(wrong, images=arrays["images"], labels=(arrays["labels"] + 1) % 4)
    options = workplace.options(
        "Classifier", calibration=images, validation=str(wrong), scheme="spatial_separable",
        output=workplace.folder / "spatial",
    )  # fmt: skip
    report = sepdeploy.convert(options)
    assert {candidate.scheme for candidate in report.plan.replaced.values()} == {"spatial_separable"}
    assert report.original_quality.accuracy_ratio == 0
    assert any("about chance for 4 classes" in note for note in report.notes)


def test_an_int8_file_that_breaks_the_limit_is_blamed_for_it(workplace):
    model = workplace.trained("Outlier")
    images = workplace.images(count=128, labels="Outlier", weights=model)
    options = workplace.options(
        "Outlier", model=model, calibration=images, validation=images, precision=Precision.INT8, max_drop_points=30.0
    )
    report = sepdeploy.convert(options)
    assert not report.is_success
    accuracy = report.checks[0]
    assert accuracy.name == "accuracy"
    assert not accuracy.is_met
    assert "the limit is 30" in accuracy.sentence
    (fault,) = accuracy.faults
    assert fault.stage == "quantization"
    assert "--precision float32" in fault.advice
    assert f"quantization (the int8 file against its float network) loses {fault.points:.2f}" in accuracy.sentence
    target = report.result(Format.ONNX, Precision.INT8, Role.CONVERTED)
    assert target.quality.drop_points > 30
    # The guard was told to leave room for the quantization before the report gave up.
    assert report.converted_quality.drop_points < 30
    assert report.max_drop_points == 30
    # A finished run that is repeated starts at the limit that it ended with, and makes nothing anew.
    files = [options.output_folder / name for name in ("plan.json", "model.pt", "model.onnx", "model.int8.onnx")]
    before = [file.stat().st_mtime_ns for file in files]
    sepdeploy.convert(options)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_repeated_run_starts_at_the_limit_that_the_first_ended_with(workplace, tmp_path, monkeypatch):
    images = workplace.images(count=128, labels="Classifier")
    options = workplace.options(
        "Classifier", calibration=images, validation=images, max_drop_points=60.0, output=tmp_path / "out"
    )
    limits = iter([59.0, 58.0])
    monkeypatch.setattr(pipeline, "measure_drops", lambda *_: Drops(file=61.0, network=61.0, original_file=0.0))
    monkeypatch.setattr(
        attempts,
        "next_attempt",
        lambda attempt, *_: replace(attempt, limit_points=limit) if (limit := next(limits, None)) else None,
    )
    sepdeploy.convert(options)
    attempt = json.loads((tmp_path / "out" / "work" / "limit.json").read_text())["attempt"]
    assert (attempt["limit_points"], attempt["is_last"]) == (58, True)
    before = (tmp_path / "out" / "model.pt").stat().st_mtime_ns
    report = sepdeploy.convert(options)
    assert report.plan.replaced
    assert (tmp_path / "out" / "model.pt").stat().st_mtime_ns == before


def test_another_factory_in_the_same_file_makes_the_files_anew(workplace, tmp_path):
    images = workplace.images(count=64)
    first = workplace.options("Classifier", calibration=images, output=tmp_path / "out")
    second = replace(first, arch=workplace.arch("InPlace"))  # the same weights, another forward
    original = tmp_path / "out" / "original" / "model.onnx"
    sepdeploy.convert(first)
    before = original.read_bytes()
    report = sepdeploy.convert(second)
    assert original.read_bytes() != before
    assert report.result(Format.ONNX, Precision.FLOAT32, Role.ORIGINAL).max_abs_error < 1e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ReturnsNan", "returns NaN"),
        ("Dynamic", "cannot be exported to ONNX"),
        ("SingleImages", "not on 32 at once"),
        ("MixesImages", r"shape \(1, 4\) for 32 images"),
    ],
)
def test_refused_networks_leave_nothing_that_looks_finished(workplace, name, message):
    options = workplace.options(name)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        sepdeploy.convert(options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in options.output_folder.rglob("*") if path.name[:1] == "." or ".tmp" in path.name] == []
    assert not {path.name for path in options.output_folder.iterdir()} - {"work", "original"}
