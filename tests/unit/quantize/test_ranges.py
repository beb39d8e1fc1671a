import numpy as np
import pytest

from sepdeploy.core.int8 import CALIBRATION_METHODS
from sepdeploy.quantize.ranges import Histogram, affine_of_range, range_of


def histogram(*batches):
    result = Histogram()
    for batch in batches:
        result.update(batch)
    return result


def mean_square_error(values, ends):
    affine = affine_of_range(*ends)
    codes = np.clip(np.rint(values / affine.scale) + affine.zero_point, 0, 255)
    return float(np.mean((values - (codes - affine.zero_point) * affine.scale) ** 2))


def test_the_order_of_images_does_not_matter():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal(1000) * factor for factor in (1e-3, 1, 300, 0.1)]
    one, other = histogram(*batches), histogram(*reversed(batches))
    assert (one.low, one.high, one.width) == (other.low, other.high, other.width)
    assert np.array_equal(one.counts, other.counts)
    assert one.counts.sum() == 4000


def test_values_stay_in_their_bins_when_the_range_grows():
    rng = np.random.default_rng(1)
    small, large = rng.standard_normal(5000), rng.standard_normal(5000) * 70
    grown = histogram(small, large)
    places = np.floor(np.float32(np.concatenate([small, large])) / np.float32(grown.width)).astype(int) + 4096
    assert np.array_equal(grown.counts, np.bincount(places, minlength=8192))


def test_minmax_and_percentile_are_exact_up_to_a_bin():
    values = np.random.default_rng(2).standard_normal(1_000_000)
    seen = histogram(*np.split(values, 10))
    assert range_of(seen, "minmax") == pytest.approx((values.min(), values.max()))
    low, high = range_of(seen, "percentile")
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [1e-5, 1 - 1e-5])), abs=2 * seen.width)


@pytest.mark.parametrize("method", ["mse", "entropy"])
def test_a_lone_outlier_is_clipped(method):
    values = np.append(np.random.default_rng(3).standard_normal(1_000_000), 60.0)
    low, high = range_of(histogram(values), method)
    assert high < 30
    assert low < -2.5


def test_mse_comes_near_the_best_range():
    values = np.random.default_rng(4).laplace(size=200_000)
    seen = histogram(values)
    found = mean_square_error(values, range_of(seen, "mse"))
    best = min(mean_square_error(values, (-end, end)) for end in np.linspace(2, 14, 60))
    assert found <= 1.03 * best
    assert found < 0.8 * mean_square_error(values, range_of(seen, "minmax"))


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_ranges_hold_zero_and_nothing_that_was_not_seen(method):
    for values in (np.full(10, 3.0), np.full(10, -3.0), np.zeros(10), np.array([np.nan, np.inf, 2.0]), np.array([])):
        seen = histogram(values)
        low, high = range_of(seen, method)
        assert low <= 0 <= high
        assert low >= min(0, np.nanmin(values[np.isfinite(values)], initial=0))
        assert high <= max(0, np.nanmax(values[np.isfinite(values)], initial=0))
        assert affine_of_range(low, high).scale > 0


def test_zero_has_a_code_and_the_ends_stay_within_half_a_step():
    for low, high in ((-1.0, 2.0), (0.0, 6.0), (-0.3, 0.0), (-1e-3, 900.0)):
        affine = affine_of_range(low, high)
        assert 0 <= affine.zero_point <= 255
        assert abs(affine.low - low) <= 0.51 * affine.scale
        assert abs(affine.high - high) <= 0.51 * affine.scale
        assert affine_of_range(affine.low, affine.high) == affine


@pytest.mark.parametrize("method", CALIBRATION_METHODS)
def test_values_too_small_for_a_scale_count_as_zero(method):
    values = histogram(np.array([1e-42, -3e-41, 0.0], np.float32))
    assert affine_of_range(*range_of(values, method)).scale > 0
