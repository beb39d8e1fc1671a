"""Seeded orders of a set of images, mixed by class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sepdeploy.errors import UsageError

__all__ = ["even_order", "proportional_order"]

Indices = npt.NDArray[np.int64]


def even_order(labels: Indices | None, count: int, seed: int) -> Indices:
    """Shuffle `count` images so that every prefix has each class as often as any other, while the class lasts.

    Args:
        labels: (count,), int64; None shuffles without classes.
        count: Number of images.
        seed: Seed of the shuffle, at least 0.

    Returns:
        (count,), a permutation.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 1, 1])
        >>> sorted(labels[even_order(labels, 6, seed=0)[:4]].tolist())
        [0, 0, 1, 1]
    """
    shuffled = _generator(seed).permutation(count)
    if labels is None:
        return shuffled
    rank, _ = _rank_in_class(labels[shuffled])
    return shuffled[np.argsort(rank, kind="stable")]


def proportional_order(labels: Indices | None, count: int, seed: int) -> Indices:
    """Shuffle `count` images so that every prefix has the classes in about the proportion of the whole.

    Args:
        labels: (count,), int64; None shuffles without classes.
        count: Number of images.
        seed: Seed of the shuffle, at least 0.

    Returns:
        (count,), a permutation.
    """
    shuffled = _generator(seed).permutation(count)
    if labels is None:
        return shuffled
    rank, class_size = _rank_in_class(labels[shuffled])
    return shuffled[np.argsort((rank + 0.5) / class_size, kind="stable")]


def _rank_in_class(labels: Indices) -> tuple[Indices, Indices]:
    """For each position: how many equal labels come before it, and how many there are in all."""
    rank = np.empty(len(labels), np.int64)
    size = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        rank[places] = np.arange(len(places))
        size[places] = len(places)
    return rank, size


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise UsageError(f"the seed must be at least 0, got {seed}")
    return np.random.default_rng(seed)
