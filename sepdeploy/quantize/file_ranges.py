"""The ranges of a file's tensors: those of the network's own places where they hold the same values, else their own.

Tensors of an ONNX and a TFLite file have other names, other layouts, and other operators around them than the network
in PyTorch. What a tensor holds is the same everywhere, so it is known by that: by statistics of its values on two
images, which no permutation of its elements changes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sepdeploy.core.int8 import Affine, PlaceRange, RangeMethod
from sepdeploy.quantize.ranges import Histogram, affine_of_range, range_of

__all__ = ["PROBES", "FileTensors", "fingerprint", "match_places", "ranges_of_file"]

PROBES = 2
"""Images that tensors are compared on."""

_TOLERANCE = 1e-3
"""Largest difference of a statistic, relative to the largest magnitude, that rounding may make."""


class FileTensors(Protocol):
    """The activations of a float file, as its runtime computes them."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tensor -> the tensor whose codes it has, or in which it is absorbed: it needs no range of its own."""
        ...

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """All floating-point activations for one image, by name."""
        ...


def fingerprint(values: np.ndarray) -> tuple[float, ...]:
    """How many values there are, and of what distribution: the same for every order of them."""
    flat = np.asarray(values, np.float64).ravel()
    flat = flat[np.isfinite(flat)]
    if not flat.size:
        return (0.0,) * 6
    return (
        float(flat.size),
        float(flat.min()),
        float(flat.max()),
        float(flat.mean()),
        float(np.sqrt(np.mean(flat * flat))),
        float(np.cbrt(np.mean(flat**3))),
    )


def match_places(
    places: Iterable[PlaceRange], tensors: Mapping[str, tuple[tuple[float, ...], ...]]
) -> dict[str, PlaceRange]:
    """The place that holds what a tensor holds, for each tensor that has one; tensors of zeros have none."""
    by_sizes: dict[tuple[float, ...], list[tuple[PlaceRange, npt.NDArray[np.float64]]]] = {}
    for place in places:
        prints = np.array(place.fingerprints)
        if prints.size:
            by_sizes.setdefault(tuple(prints[:, 0]), []).append((place, prints[:, 1:]))
    found = {}
    for name, given in tensors.items():
        prints = np.array(given)
        candidates = by_sizes.get(tuple(prints[:, 0]), [])
        scale = float(np.abs(prints[:, 1:3]).max(initial=0.0))
        if not candidates or not scale:
            continue
        distances = [float(np.abs(each - prints[:, 1:]).max()) for _, each in candidates]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= _TOLERANCE * scale:
            found[name] = candidates[nearest][0]
    return found


def ranges_of_file(
    tensors: FileTensors, images: Iterable[np.ndarray], places: tuple[PlaceRange, ...], method: RangeMethod
) -> dict[str, Affine]:
    """Scale and zero point of every activation of a file.

    Args:
        tensors: The file.
        images: Calibration images as the file takes them, the first ones being those of the fingerprints.
        places: What is known of the network's activations; may be none.
        method: For tensors without a counterpart among them, in a pass of their own.
    """
    stream = iter(images)
    probes = list(itertools.islice(stream, PROBES))
    seen: dict[str, list[tuple[float, ...]]] = {}
    own: dict[str, Histogram] = {}
    for image in probes:
        for name, values in tensors.run(image).items():
            if name not in tensors.aliases:
                seen.setdefault(name, []).append(fingerprint(values))
                own.setdefault(name, Histogram()).update(values)
    matched = match_places(places, {name: tuple(prints) for name, prints in seen.items()})
    affines = {name: place.affine for name, place in matched.items()}
    own = {name: histogram for name, histogram in own.items() if name not in matched}
    del probes
    for image in stream if own else ():
        for name, values in tensors.run(image).items():
            if name in own:
                own[name].update(values)
    affines |= {name: affine_of_range(*range_of(histogram, method)) for name, histogram in own.items()}
    for name in tensors.aliases:
        source = name
        while source in tensors.aliases:
            source = tensors.aliases[source]
        if source in affines:
            affines[name] = affines[source]
    return affines
