from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from sepdeploy.bench.accuracy import QualityMeter
from sepdeploy.core.measurement import Quality
from sepdeploy.errors import UsageError

# Top-1 classes 0, 1, 2, 0
REFERENCE = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 2], [1, 0, 0]], np.float32)
# Top-1 classes 0, 1, 1, 0; differs by 1, 0, (3, 2), 0
OUTPUT = np.array([[4, 1, 0], [0, 4, 0], [0, 3, 0], [1, 0, 0]], np.float32)
LABELS = np.array([0, 1, 2, 1])


def quality(
    reference: np.ndarray, output: np.ndarray, labels: np.ndarray | None = None, baseline: float | None = None
) -> Quality:
    meter = QualityMeter()
    meter.update([reference], [output], labels)
    return meter.result(baseline)


def test_with_labels() -> None:
    result = quality(REFERENCE, OUTPUT, LABELS, 0.75)
    signal, noise = 9 + 1 + 16 + 4 + 1, 1 + 9 + 4
    assert result == Quality(
        images=4,
        accuracy_ratio=0.5,
        agreement_ratio=0.75,
        sqnr_db=pytest.approx(10 * math.log10(signal / noise)),
        relative_error=pytest.approx(math.sqrt(noise / signal)),
        drop_points=pytest.approx(25.0),
        drop_basis="accuracy",
    )


def test_baseline_is_taken_from_the_reference_outputs() -> None:
    assert quality(REFERENCE, OUTPUT, LABELS).drop_points == pytest.approx(25.0)


def test_gain_is_a_negative_drop() -> None:
    assert quality(OUTPUT, REFERENCE, LABELS).drop_points == pytest.approx(-25.0)


def test_without_labels_agreement_counts() -> None:
    result = quality(REFERENCE, OUTPUT)
    assert (result.accuracy_ratio, result.drop_points, result.drop_basis) == (None, 25.0, "agreement")


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 2, 2), (4,)])
def test_outputs_that_are_no_class_scores(shape: tuple[int, ...]) -> None:
    reference = np.full(shape, 2, np.float32)
    result = quality(reference, reference * 1.5)
    assert (result.accuracy_ratio, result.agreement_ratio) == (None, None)
    assert result.relative_error == pytest.approx(0.5)
    assert (result.drop_points, result.drop_basis) == (pytest.approx(50.0), "relative error")


def test_original_itself() -> None:
    result = quality(REFERENCE, REFERENCE, LABELS)
    assert (result.sqnr_db, result.relative_error, result.drop_points) == (None, 0.0, 0.0)
    assert result.accuracy_ratio == 0.75


def test_batches_add_up_and_all_outputs_count() -> None:
    extra = np.full((4, 2, 2), 5, np.float32)
    whole, parts = QualityMeter(), QualityMeter()
    whole.update([REFERENCE, extra], [OUTPUT, extra + 1], LABELS)
    for part in (slice(0, 1), slice(1, 4)):
        parts.update([REFERENCE[part], extra[part]], [OUTPUT[part], extra[part] + 1], LABELS[part])
    result = parts.result(0.75)
    assert result == whole.result(0.75)
    assert result.relative_error == pytest.approx(math.sqrt((14 + 16) / (31 + 16 * 25)))


def test_sums_are_float64() -> None:
    reference = np.full((1, 1, 2**20), 1e3, np.float32)
    output = reference + np.float32(2**-10)
    assert quality(reference, output).relative_error == pytest.approx(2**-10 / 1e3, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_outputs_look_broken_and_stay_finite(bad: float) -> None:
    output = REFERENCE.copy()
    output[0, 1] = bad
    result = quality(REFERENCE, output, LABELS)
    json.dumps(dataclasses.asdict(result), allow_nan=False)
    assert result.relative_error > 1e30
    assert result.sqnr_db is not None
    assert result.sqnr_db < -600


def test_rows_with_nan_are_wrong_even_where_argmax_says_otherwise() -> None:
    output = REFERENCE.copy()
    output[0, 0] = np.nan  # numpy's argmax answers 0, which is the label
    result = quality(REFERENCE, output, LABELS)
    assert (result.accuracy_ratio, result.agreement_ratio) == (0.5, 0.75)
    assert quality(output, output, LABELS).agreement_ratio == 0.75


def test_masked_scores_that_both_networks_return_are_no_error() -> None:
    reference, output = REFERENCE.copy(), REFERENCE.copy()
    reference[:, 2] = output[:, 2] = -np.inf
    result = quality(reference, output)
    assert (result.relative_error, result.sqnr_db, result.agreement_ratio) == (0.0, None, 1.0)


def test_reference_of_zeros_stays_finite() -> None:
    result = quality(np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32))
    assert math.isfinite(result.relative_error)
    assert result.relative_error > 1e6


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes(label: int) -> None:
    with pytest.raises(UsageError, match=f"label {label} is no class of the network, which has 3"):
        quality(REFERENCE, OUTPUT, np.array([0, 1, label, 0]))


def test_wrong_calls() -> None:
    with pytest.raises(UsageError, match="no images"):
        QualityMeter().result(None)
    with pytest.raises(UsageError, match="same outputs"):
        QualityMeter().update([REFERENCE], [OUTPUT[:, :2]], None)
    with pytest.raises(UsageError, match="as many integer labels"):
        quality(REFERENCE, OUTPUT, LABELS[:3])
    with pytest.raises(UsageError, match="class scores have shape"):
        QualityMeter(has_class_scores=True).update([REFERENCE[:, :1]], [OUTPUT[:, :1]], None)
    meter = QualityMeter()
    meter.update([REFERENCE], [OUTPUT], LABELS)
    with pytest.raises(UsageError, match="some have none"):
        meter.update([REFERENCE], [OUTPUT], None)


def test_class_scores_can_be_ruled_out() -> None:
    meter = QualityMeter(has_class_scores=False)
    meter.update([REFERENCE], [OUTPUT], None)
    assert meter.result(None).drop_basis == "relative error"
