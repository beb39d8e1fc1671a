"""Ranges of activations from one streamed pass: histograms that adapt, and what each method makes of them.

A histogram has bins of equal width, a power of two, with an edge at zero. When a value falls outside, the width doubles
and pairs of bins merge, so that no value is ever needed again and the order of the images does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from sepdeploy.core.int8 import Affine, RangeMethod

__all__ = ["Histogram", "affine_of_range", "range_of"]

_HALF = 4096
"""Bins on each side of zero: 8 to 16 of them per int8 step where the range is one-sided."""

_CHUNK = 2**20  # values that are sorted into bins at a time, which bounds the memory

_LEVELS = 256
_TAIL_RATIO = 1e-5
"""Share of the values that the percentile method clips on each side."""

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * _LEVELS

Floats = npt.NDArray[np.float64]


class Histogram:
    """What is known of the values of one tensor.

    Attributes:
        low: The smallest value.
        high: The largest value.
        counts: Values per bin, (2 * 4096,); bin i spans (i - 4096) * width to (i - 4095) * width.
        width: Of a bin.
    """

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.counts = np.zeros(2 * _HALF, np.int64)
        self.width = 0.0

    def update(self, values: np.ndarray) -> None:
        """Add values of any shape; NaN and infinity are left out."""
        flat = np.asarray(values, np.float32).ravel()
        low, high = float(flat.min(initial=np.inf)), float(flat.max(initial=-np.inf))
        if not (np.isfinite(low) and np.isfinite(high)):
            flat = flat[np.isfinite(flat)]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            places = np.zeros(part.shape, np.int64)
            if self.width:
                places = np.clip(np.floor(part / np.float32(self.width)), -_HALF, _HALF - 1).astype(np.int64)
            self.counts += np.bincount(places + _HALF, minlength=2 * _HALF)

    def _widen(self, largest: float) -> None:
        """Make the bins reach `largest`."""
        least = float(np.finfo(np.float32).tiny)
        if largest < least or largest <= self.width * _HALF:  # what is smaller has no scale: as good as 0
            return
        width = max(float(2.0 ** np.ceil(np.log2(largest / _HALF))), least)
        if self.width:
            factor = int(width / self.width)
            folds = min(factor, 2 * _HALF)
            for side in (slice(0, _HALF), slice(_HALF, None)):
                self.counts[side] = _merged(self.counts[side], folds, from_end=side.start == 0)
        self.width = width

    @property
    def centers(self) -> Floats:
        """Middle of each bin, (2 * 4096,)."""
        places: Floats = np.arange(-_HALF, _HALF, dtype=np.float64) + 0.5
        return places * self.width


def _merged(counts: npt.NDArray[np.int64], factor: int, *, from_end: bool) -> npt.NDArray[np.int64]:
    """Every `factor` neighbouring bins as one; the side's bins at zero stay at zero."""
    ordered = counts[::-1] if from_end else counts
    sums = np.add.reduceat(ordered, np.arange(0, len(counts), factor))
    filled = np.zeros_like(counts)
    filled[: len(sums)] = sums
    return filled[::-1] if from_end else filled


def range_of(histogram: Histogram, method: RangeMethod) -> tuple[float, float]:
    """The range that a tensor is quantized over, with 0 inside.

    - minmax: all values.
    - percentile: all but one in 100,000 on each side.
    - mse: the range whose codes come nearest to the values, in the mean square.
    - entropy: the symmetric clipping that changes the distribution least, by Kullback-Leibler divergence (Migacz,
      "8-bit Inference with TensorRT", 2017).
    """
    if histogram.high < histogram.low or histogram.width == 0:
        return 0.0, 0.0
    low, high = _METHODS[method](histogram)
    return float(min(0.0, max(low, histogram.low))), float(max(0.0, min(high, histogram.high)))


def affine_of_range(low: float, high: float) -> Affine:
    """Scale and zero point over a range that holds 0; the range moves so that 0 has a code (Jacob et al., 2018)."""
    scale = float(np.float32(max((high - low) / (_LEVELS - 1), _SMALLEST_SCALE)))
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, _LEVELS - 1)))


def _minmax(histogram: Histogram) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram) -> tuple[float, float]:
    total = np.cumsum(histogram.counts)
    first = int(np.searchsorted(total, _TAIL_RATIO * total[-1], side="right"))
    last = int(np.searchsorted(total, (1 - _TAIL_RATIO) * total[-1], side="left"))
    return (first - _HALF) * histogram.width, (last + 1 - _HALF) * histogram.width


def _mse(histogram: Histogram) -> tuple[float, float]:
    """Both ends shrink together, then each alone, over a grid of shares."""
    used = np.flatnonzero(histogram.counts)
    values, weights = histogram.centers[used], histogram.counts[used].astype(np.float64)
    low, high = min(0.0, histogram.low), max(0.0, histogram.high)

    def error(ends: tuple[float, float]) -> float:
        affine = affine_of_range(*ends)
        codes = np.clip(np.rint(values / affine.scale) + affine.zero_point, 0, _LEVELS - 1)
        difference = values - (codes - affine.zero_point) * affine.scale
        return float(np.dot(weights, difference * difference))

    shares = np.linspace(1, 0.2, 41)
    best = min(((low * share, high * share) for share in shares), key=error)
    if low < 0 < high:
        best = min(((low * share, best[1]) for share in shares), key=error)
        best = min(((best[0], high * share) for share in shares), key=error)
    return best


def _entropy(histogram: Histogram) -> tuple[float, float]:
    negative, positive = histogram.counts[:_HALF][::-1], histogram.counts[_HALF:]
    is_one_sided = histogram.low >= 0 or histogram.high <= 0
    counts = (negative + positive).astype(np.float64)  # of magnitudes
    levels = _LEVELS if is_one_sided else _LEVELS // 2
    used = int(np.flatnonzero(counts)[-1]) + 1
    counts[0] = min(counts[0], counts[1:].max(initial=1.0))  # zeros, of ReLU, have a code of their own
    candidates = np.unique(np.linspace(min(levels, used), used, 64).astype(int))
    best = min(candidates, key=lambda bins: _divergence(counts[:used], int(bins), levels))
    threshold = float(best * histogram.width)
    return -threshold, threshold


def _divergence(counts: Floats, bins: int, levels: int) -> float:
    """KL divergence of the first `bins` bins, what is beyond added to the last, from themselves on `levels` levels."""
    reference = counts[:bins].copy()
    reference[-1] += counts[bins:].sum()
    level = np.minimum(np.arange(bins) * levels // bins, levels - 1)
    is_used = counts[:bins] > 0
    mass = np.bincount(level, weights=counts[:bins], minlength=levels)
    used = np.bincount(level, weights=is_used.astype(np.float64), minlength=levels)
    spread = np.where(is_used, (mass / np.maximum(used, 1))[level], 0)
    p, q = reference / max(reference.sum(), 1), spread / max(spread.sum(), 1)
    where = p > 0
    smoothed = np.maximum(q[where], 1e-12)
    return float(np.sum(p[where] * np.log(p[where] / smoothed)))


_METHODS: Mapping[RangeMethod, Callable[[Histogram], tuple[float, float]]] = MappingProxyType(
    {"minmax": _minmax, "percentile": _percentile, "mse": _mse, "entropy": _entropy}
)
