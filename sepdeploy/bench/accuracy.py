"""Accumulates how close a network's outputs are to the original's, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sepdeploy.core.measurement import Quality
from sepdeploy.errors import UsageError

__all__ = ["QualityMeter"]

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_ENERGY = float(np.finfo(np.float32).tiny)


class QualityMeter:
    """Accuracy, agreement and output error of a network over batches of images.

    The first output decides the top-1 class if it holds class scores, (N, classes) with at least two classes. All
    outputs count for the output error, in float64.

    A network that returns NaN or infinity is not spared: a row of scores with a NaN is wrong and agrees with nothing,
    and in the output error NaN and infinity count as the largest float32, 3.4e38, unless the original returned
    the same. All results are finite.

    Args:
        has_class_scores: Whether the first output holds class scores; None to see from its shape.
    """

    def __init__(self, has_class_scores: bool | None = None) -> None:
        self._has_class_scores = has_class_scores
        self._is_labelled: bool | None = None
        self._images = 0
        self._correct = 0
        self._reference_correct = 0
        self._agreeing = 0
        self._signal = 0.0
        self._noise = 0.0

    def update(self, reference: Sequence[np.ndarray], outputs: Sequence[np.ndarray], labels: np.ndarray | None) -> None:
        """Add a batch.

        Args:
            reference: Outputs of the original network, each (N, ...).
            outputs: Outputs of the network in question, of the same shapes.
            labels: Class of each image, (N,) integers in [0, classes); None if unknown. Ignored if the first output
                holds no class scores.

        Raises:
            UsageError: if the shapes differ, labels come with some batches only, or a label is no class of the network.
        """
        shapes = [output.shape for output in outputs]
        if not shapes or shapes != [output.shape for output in reference]:
            raise UsageError(
                f"the outputs have shapes {shapes}, those of the original network "
                f"{[output.shape for output in reference]}; compare networks with the same outputs"
            )
        if self._is_labelled is not None and self._is_labelled != (labels is not None):
            raise UsageError("some batches of images have labels and some have none; label all of them or none")
        if self._has_class_scores is None:
            self._has_class_scores = _is_class_scores(outputs[0])
        if self._has_class_scores:
            if not _is_class_scores(outputs[0]):
                raise UsageError(f"class scores have shape (images, classes), got {outputs[0].shape}")
            self._count_classes(reference[0], outputs[0], labels)
        for before, after in zip(reference, outputs, strict=True):
            self._add_error(before, after)
        self._is_labelled = labels is not None
        self._images += len(outputs[0])

    def result(self, baseline_accuracy: float | None) -> Quality:
        """The quality over all batches so far.

        Args:
            baseline_accuracy: Accuracy of the original network, in [0, 1], that `drop_points` is relative to; None to
                take it from the reference outputs. Used with labels only.

        Raises:
            UsageError: if there was no image.
        """
        if self._images == 0:
            raise UsageError("there are no images to evaluate on")
        relative_error = math.sqrt(self._noise / max(self._signal, _SMALLEST_ENERGY))
        sqnr_db = None if self._noise == 0 else -20 * math.log10(relative_error)
        accuracy = agreement = None
        drop_points, drop_basis = 100 * relative_error, "relative error"
        if self._has_class_scores:
            agreement = self._agreeing / self._images
            drop_points, drop_basis = 100 * (1 - agreement), "agreement"
            if self._is_labelled:
                accuracy = self._correct / self._images
                if baseline_accuracy is None:
                    baseline_accuracy = self._reference_correct / self._images
                drop_points, drop_basis = 100 * (baseline_accuracy - accuracy), "accuracy"
        return Quality(
            images=self._images,
            accuracy_ratio=accuracy,
            agreement_ratio=agreement,
            sqnr_db=sqnr_db,
            relative_error=relative_error,
            drop_points=drop_points,
            drop_basis=drop_basis,
        )

    def _count_classes(self, reference: np.ndarray, outputs: np.ndarray, labels: np.ndarray | None) -> None:
        expected, predicted = _top1(reference), _top1(outputs)
        self._agreeing += int(np.sum((expected == predicted) & (predicted >= 0)))
        if labels is None:
            return
        classes = outputs.shape[1]
        if labels.shape != (len(outputs),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"{len(outputs)} images need as many integer labels, got {labels.dtype} {labels.shape}")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise UsageError(
                f"label {int(wrong[0])} is no class of the network, which has {classes} (0 to {classes - 1}); "
                "the images' classes or their order do not fit this network"
            )
        self._correct += int(np.sum(predicted == labels))
        self._reference_correct += int(np.sum(expected == labels))

    def _add_error(self, reference: np.ndarray, outputs: np.ndarray) -> None:
        before, after = reference.astype(np.float64), outputs.astype(np.float64)
        error = _finite(before) - _finite(after)
        self._noise += float(np.sum(error * error))
        signal = before[np.isfinite(before)]
        self._signal += float(np.sum(signal * signal))


def _is_class_scores(output: np.ndarray) -> bool:
    return output.ndim == 2 and output.shape[1] >= 2


def _top1(scores: np.ndarray) -> np.ndarray:
    """Class with the largest score, (N,); -1, which is no class, where a score is NaN."""
    classes: np.ndarray = np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1))
    return classes


def _finite(values: np.ndarray) -> np.ndarray:
    finite: np.ndarray = np.nan_to_num(values, nan=_LARGEST, posinf=_LARGEST, neginf=-_LARGEST)
    return finite
