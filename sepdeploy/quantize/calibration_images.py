"""Checks calibration images while they stream past."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from sepdeploy.errors import UsageError

__all__ = ["checked_images"]


def checked_images(images: Iterable[np.ndarray], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield each image as float32 of `shape`, as the file's input takes it; never more than one is held.

    Raises:
        UsageError: if there is no image, or one has another shape or holds NaN or infinity.
    """
    count = 0
    for image in images:
        if image.shape != shape:
            raise UsageError(f"calibration image {count} has shape {image.shape}, the network takes {shape}")
        if not np.isfinite(image).all():
            raise UsageError(f"calibration image {count} holds NaN or infinity; check its preprocessing")
        yield np.ascontiguousarray(image, dtype=np.float32)
        count += 1
    if count == 0:
        raise UsageError("int8 needs calibration images and there are none; give a folder of images with --calibration")
