"""Run PyTorch networks over sets of images and compare them with the original network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import output_tensors
from sepdeploy.bench.accuracy import QualityMeter
from sepdeploy.core.conv import Trace
from sepdeploy.core.measurement import Quality
from sepdeploy.core.quiet import first_line
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import UnsupportedModelError

__all__ = ["Evaluator", "batch_size_for", "first_images", "prefer_channels_last", "run_network", "tensor_batches"]

_BATCH_BYTES = 256 * 2**20
_MAX_BATCH = 64
_KEPT_OUTPUT_BYTES = 256 * 2**20
_MIN_IMAGES = 512
"""Fewer images never decide early."""

_SIGMAS = 3.0
"""An evaluation ends early only when the limit is this many standard errors away."""


def batch_size_for(trace: Trace) -> int:
    """Images per batch such that the largest unfolded convolution input stays below 256 MiB."""
    largest = 1
    for site in trace.sites:
        for call in site.calls:
            taps = math.prod(site.spec.kernel_size) if site.spec else 1
            largest = max(largest, math.prod(call.input_shape) * taps, math.prod(call.output_shape))
    return max(1, min(_MAX_BATCH, _BATCH_BYTES // (4 * largest)))


def tensor_batches(images: ImageSet, batch_size: int) -> Callable[[], Iterable[Tensor]]:
    """A function that starts a new pass over the images as tensors."""

    def start() -> Iterator[Tensor]:
        for batch, _ in images.batches(batch_size):
            yield torch.from_numpy(batch)

    return start


def first_images(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The batches of the first `count` images."""
    for batch in batches:
        yield batch[:count]
        count -= len(batch)
        if count <= 0:
            return


def prefer_channels_last(model: nn.Module, example: Tensor) -> nn.Module:
    """Give the weights a channels-last layout, which runs about twice as fast here, if the network takes it.

    The outputs of the convolutions follow the weights, whatever the layout of the images. Networks that flatten with
    `view` cannot take that; they are left as they are. Values never change.
    """
    if example.dim() != 4:
        return model
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        run_network(model, torch.cat([example, example]))  # of a single image, any layout may pass as contiguous
    except Exception:  # whatever else is wrong with the network, the evaluation says
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return model


@torch.no_grad()
def run_network(model: nn.Module, batch: Tensor) -> tuple[np.ndarray, ...]:
    """All output tensors of `model` for one batch, as float32 arrays in pytree order; `batch` stays as it is."""
    # A network that normalizes in place would change the images, and everybody who still needs them.
    return tuple(output.float().numpy(force=True) for output in output_tensors(model(batch.clone())))


class Evaluator:
    """Compares networks with the original one on the same images.

    The original's outputs are computed once and kept while they are small (256 MiB); then images alone are read again.

    Args:
        original: The trained network in eval mode.
        images: Validation images, in an order mixed by class.
        batch_size: Images per batch.
        progress: Called with (images done, images in all) during each evaluation.
    """

    def __init__(
        self,
        original: nn.Module,
        images: ImageSet,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._original = original
        self._images = images
        self._batch_size = batch_size
        self._progress = progress
        self._kept: list[tuple[np.ndarray, ...]] = []
        self._kept_bytes = 0

    def reference_batches(self) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...], np.ndarray | None]]:
        """Yield (images as the network takes them, outputs of the original network, labels or None) batch by batch."""
        for index, (batch, labels) in enumerate(self._images.batches(self._batch_size)):
            if index < len(self._kept):
                outputs = self._kept[index]
            else:
                outputs = self._run_original(torch.from_numpy(batch))
                size = sum(output.nbytes for output in outputs)
                if index == len(self._kept) and self._kept_bytes + size <= _KEPT_OUTPUT_BYTES:
                    self._kept.append(outputs)
                    self._kept_bytes += size
            yield batch, outputs, labels

    def original_quality(self) -> Quality:
        """The original network on all images.

        Raises:
            UnsupportedModelError: if it returns NaN, fails on several images at once, or mixes them.
        """
        meter = QualityMeter()
        for _, outputs, labels in self.reference_batches():
            if any(np.isnan(output).any() for output in outputs):
                raise UnsupportedModelError(
                    "the original network returns NaN on validation images: check its weights and the preprocessing"
                )
            meter.update(outputs, outputs, labels)
        return meter.result(None)

    def _run_original(self, batch: Tensor) -> tuple[np.ndarray, ...]:
        """Outputs of the original network, which so far has only been seen to run on single images."""
        try:
            outputs = run_network(self._original, batch)
        except Exception as error:  # user code: whatever it raises
            raise UnsupportedModelError(
                f"the network runs on one image but not on {len(batch)} at once: {first_line(error)}; its forward "
                "method must take any number of images"
            ) from error
        for output in outputs:
            if output.ndim == 0 or len(output) != len(batch):
                others = [axis for axis, size in enumerate(output.shape) if size == len(batch)]
                hint = f": return that one with .transpose(0, {others[0]})" if len(others) == 1 else ""
                raise UnsupportedModelError(
                    f"the network returns a tensor of shape {output.shape} for {len(batch)} images; the first "
                    f"dimension of every output must count the images{hint}"
                )
        return outputs

    def quality(
        self, network: nn.Module, limit_points: float | None = None, *, most: int | None = None
    ) -> tuple[Quality, bool]:
        """The quality of `network`, and whether the evaluation ended early.

        Args:
            network: With the same outputs as the original.
            limit_points: If given, stop as soon as the drop is clearly above or clearly below it.
            most: If given, stop after so many images, rounded up to batches.
        """
        meter = QualityMeter()
        drops = _PairedDrops()
        done = 0
        for batch, reference, labels in self.reference_batches():
            outputs = run_network(network, torch.from_numpy(batch))
            meter.update(reference, outputs, labels)
            drops.update(reference[0], outputs[0], labels)
            done += len(batch)
            if self._progress:
                self._progress(done, len(self._images))
            if most is not None and done >= most:
                return meter.result(None), done < len(self._images)
            if limit_points is not None and done < len(self._images) and drops.is_clear(limit_points):
                return meter.result(None), True
        return meter.result(None), False


class _PairedDrops:
    """Mean and variance of the per-image loss against the original: paired, so far tighter than two accuracies."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.squares = 0.0
        self.is_countable = True

    def update(self, reference: np.ndarray, outputs: np.ndarray, labels: np.ndarray | None) -> None:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            self.is_countable = False
            return
        before, after = reference.argmax(1), outputs.argmax(1)
        if labels is None:
            drop = (before != after).astype(np.float64)
        else:
            drop = (before == labels).astype(np.float64) - (after == labels)
        self.count += len(drop)
        self.total += float(drop.sum())
        self.squares += float((drop * drop).sum())

    def is_clear(self, limit_points: float) -> bool:
        if not self.is_countable or self.count < _MIN_IMAGES:
            return False
        mean = self.total / self.count
        # One more differing image than seen: a run without any difference is no proof that there is none.
        variance = (self.squares + 1) / self.count - mean * mean
        error = math.sqrt(max(variance, 0.0) / self.count)
        return abs(100 * mean - limit_points) > 100 * _SIGMAS * error
