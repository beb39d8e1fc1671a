"""A set of images as batches for the network."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sepdeploy.data.decode import Pixels, decode
from sepdeploy.data.manifest import Manifest, SplitRole, read_manifest
from sepdeploy.data.order import Indices, even_order, proportional_order
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.data.sources import ImageSource, open_source
from sepdeploy.data.toml_files import find_file
from sepdeploy.errors import UsageError

__all__ = ["ImageSet", "open_images"]

Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64] | None]

_CACHE_BYTES = 256 * 2**20
_CHUNK = 64  # images that are decoded at a time, which bounds the memory while reading


class _PixelReader:
    """Decodes images in threads and remembers the pixels while they fit into `_CACHE_BYTES`.

    Attributes:
        source: The images.
        digests: Index -> hash of the pixels, of all images that have been decoded: large sets are decoded once to find
            what is unreadable, and not again to tell them apart.
    """

    def __init__(self, source: ImageSource, preprocess: Preprocess, size: tuple[int, int] | None) -> None:
        self.source = source
        self.digests: dict[int, bytes] = {}
        self._preprocess = preprocess
        self._size = size
        self._cache: dict[int, Pixels] = {}
        self._free_bytes = _CACHE_BYTES

    def read(self, indices: Sequence[int]) -> list[Pixels | None]:
        """Pixels of the images at `indices`, None where one cannot be decoded."""
        missing = [index for index in indices if index not in self._cache]
        fresh: dict[int, Pixels | None] = {}
        if missing:
            with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                # Pillow warns of what it can live with (odd EXIF data); a decompression bomb it must not live with.
                from PIL import Image

                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                fresh = dict(zip(missing, pool.map(self._decode, missing), strict=True))
        for index, pixels in fresh.items():
            if pixels is not None and pixels.nbytes <= self._free_bytes:
                self._cache[index] = pixels
                self._free_bytes -= pixels.nbytes
        return [self._cache[index] if index in self._cache else fresh[index] for index in indices]

    def _decode(self, index: int) -> Pixels | None:
        try:
            with self.source.open(index) as image:
                pixels = decode(image, self._preprocess, self._size)
        except Exception:  # a hostile file can make a decoder raise anything; the caller counts and names it
            return None
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        return pixels if self.digests.setdefault(index, digest) == digest else None  # None: another image by now


class ImageSet:
    """Readable images in a fixed order, decoded as they are asked for.

    Attributes:
        path: As the user gave it.
        preprocess: What is done to the images; its size and colour are settled.
        input_shape: (C, H, W) of one image, whatever the layout.
        labels: (N,), int64, or None.
        class_names: Name of each label, or nothing.
        skipped: Files that cannot be read as images.
    """

    def __init__(
        self, path: str, reader: _PixelReader, indices: Indices, preprocess: Preprocess, skipped: tuple[str, ...]
    ) -> None:
        if preprocess.size is None:
            raise UsageError(f"the size of the images in {path} is not settled")
        self.path = path
        self.preprocess = preprocess
        self.input_shape = (preprocess.channels, *preprocess.size)
        self.labels = None if reader.source.labels is None else reader.source.labels[indices]
        self.class_names = reader.source.class_names
        self.skipped = skipped
        self._reader = reader
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def batches(self, batch_size: int, *, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Yield (images, labels): float32 in the layout of `preprocess`, and (N,) int64 or None.

        The last batch may be smaller. Only one batch is held at a time.

        Args:
            batch_size: Images per batch, over all processes together.
            shard: (rank, count): only the contiguous part of every batch that falls to process `rank` of `count` is
                decoded. The parts differ by one image at most; those of a batch smaller than `count` may be empty.

        Raises:
            UsageError: if `batch_size` is below 1, there is no such shard, or a file has changed since the set was
                opened.
        """
        rank, count = shard
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= rank < count:
            raise UsageError(f"there is no process {rank} of {count}: ranks go from 0 to {count - 1}")
        for start in range(0, len(self), batch_size):
            size = min(batch_size, len(self) - start)
            first, stop = (start + size * part // count for part in (rank, rank + 1))
            labels = None if self.labels is None else self.labels[first:stop]
            yield self.preprocess.to_input(self._pixels(first, stop)), labels

    def head(self, count: int) -> ImageSet:
        """The first `count` images, or all if there are fewer.

        Raises:
            UsageError: if `count` is below 1.
        """
        if count < 1:
            raise UsageError(f"at least 1 image is needed, got {count}")
        return self._subset(np.arange(min(count, len(self))))

    def split(self, ratio: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Split at random into a share of `ratio` and the rest, each with the classes in proportion.

        Raises:
            UsageError: if one of the two would be empty.
        """
        first = round(ratio * len(self))
        if not 0 < first < len(self):
            raise UsageError(f"{len(self)} images cannot be split at {ratio:g}: one part would be empty")
        order = proportional_order(self.labels, len(self), seed)
        return self._subset(np.sort(order[:first])), self._subset(np.sort(order[first:]))

    def shuffled(self, seed: int) -> ImageSet:
        """The same images in an order that depends on `seed`, at least 0, alone."""
        return self._subset(even_order(None, len(self), seed))

    def without(self, other: ImageSet) -> ImageSet:
        """The images, possibly none, whose decoded pixels are not those of an image of `other`, in the same order."""
        unwanted = set(other._digests)
        return self._subset(np.array([i for i, digest in enumerate(self._digests) if digest not in unwanted], int))

    @cached_property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the preprocessing, the decoded pixels and the labels."""
        digest = hashlib.sha256(repr((astuple(self.preprocess), len(self))).encode())
        for each in self._digests:
            digest.update(each)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def _digests(self) -> list[bytes]:
        """A hash of each image's pixels, as they were when the set was opened."""
        return [self._reader.digests[index] for index in self._indices.tolist()]

    def _subset(self, positions: Indices) -> ImageSet:
        return ImageSet(self.path, self._reader, self._indices[positions], self.preprocess, self.skipped)

    def _pixels(self, start: int, stop: int) -> Pixels:
        indices = self._indices[start:stop].tolist()
        images: list[Pixels] = []
        for index, pixels in zip(indices, self._reader.read(indices), strict=True):
            if pixels is None or pixels.shape[:2] != self.input_shape[1:]:
                name = self._reader.source.name(index)
                raise UsageError(f"{name} in {self.path} changed while it was in use; run again with it unchanged")
            images.append(pixels)
        channels, height, width = self.input_shape
        return np.stack(images) if images else np.empty((0, height, width, channels), np.uint8)


def open_images(
    path: str,
    *,
    role: SplitRole,
    preprocess: Preprocess | None = None,
    input_shape: tuple[int, int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Open a folder of images, a folder of class folders, an `.npz` file or a manifest `.toml`.

    Every chosen image is decoded once, so that what is unreadable is known; with a limit, further images take the
    place of unreadable ones. The order is shuffled, mixed by class, for calibration or with a limit, and that of the
    files otherwise; it depends on names and seed only.

    Args:
        path: The images; `calibration/NAME.toml` is found in the installed package too.
        role: Which split of a manifest is taken.
        preprocess: How images become inputs; None takes that of the manifest, or the defaults.
        input_shape: (C, H, W) that the network takes; None takes the preprocessing's size, or the images' own.
        limit: Most images to take, as many of each class as possible; None takes all.
        seed: Seed of the choice and of the order, at least 0.
        progress: Called with the images read and the images wanted.

    Raises:
        UsageError: if there is no usable image, or the sizes, colours or labels do not fit together.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit of images must be at least 1, got {limit}")
    manifest = _open(Path(path), role)
    source = manifest.source
    preprocess = _settle(preprocess or manifest.preprocess or Preprocess(), input_shape, source.is_grayscale)
    candidates = np.arange(len(source))[manifest.split]
    if len(candidates) == 0:
        raise UsageError(f"splits.{role} of {path} selects none of its {len(source)} images")
    if limit is not None or role == "calibration":
        labels = None if source.labels is None else source.labels[candidates]
        candidates = candidates[even_order(labels, len(candidates), seed)]
    reader = _PixelReader(source, preprocess, preprocess.size)
    kept, skipped, size = _read_once(path, reader, candidates, limit, progress)
    return ImageSet(path, reader, kept, replace(preprocess, size=size), skipped)


def _open(path: Path, role: SplitRole) -> Manifest:
    if path.suffix.lower() == ".toml":
        return read_manifest(path, role)
    return Manifest(open_source(find_file(path)), slice(None), None)


def _settle(preprocess: Preprocess, input_shape: tuple[int, int, int] | None, is_grayscale: bool) -> Preprocess:
    """Fix the colour, and the size if it is known, from what the network takes and what the images are."""
    if input_shape is None:
        has_three_values = 3 in (len(preprocess.mean), len(preprocess.std))
        is_grey_by_default = is_grayscale and preprocess.color == "RGB" and not has_three_values
        return replace(preprocess, color="L") if is_grey_by_default else preprocess
    channels, height, width = input_shape
    size = preprocess.size or (height, width)
    if size != (height, width):
        raise UsageError(
            f"the input shape {','.join(map(str, input_shape))} (C,H,W) and the size {size[0]},{size[1]} "
            "(height, width) of the preprocessing differ: drop one of them"
        )
    if channels == 1 and preprocess.color == "RGB":
        preprocess = replace(preprocess, color="L")
    if channels != preprocess.channels:
        raise UsageError(
            f"color {preprocess.color} has {preprocess.channels} channels, but the network takes {channels}; 1 (L) "
            "and 3 (RGB, BGR) are possible: put the right color into the preprocessing file"
        )
    return replace(preprocess, size=size)


def _read_once(
    path: str,
    reader: _PixelReader,
    candidates: Indices,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Indices, tuple[str, ...], tuple[int, int]]:
    """Decode candidates until `limit` are readable; return those, the names of the unreadable ones, and (H, W)."""
    wanted = len(candidates) if limit is None else min(limit, len(candidates))
    kept: list[int] = []
    skipped: list[str] = []
    size: tuple[int, int] | None = None
    position = 0
    while len(kept) < wanted and position < len(candidates):
        chunk = candidates[position : position + min(_CHUNK, wanted - len(kept))].tolist()
        position += len(chunk)
        for index, pixels in zip(chunk, reader.read(chunk), strict=True):
            if pixels is None:
                skipped.append(reader.source.name(index))
                continue
            size = size or (pixels.shape[0], pixels.shape[1])
            if pixels.shape[:2] != size:
                raise UsageError(
                    f"the images in {path} differ in size: {reader.source.name(kept[0])} is {size[0]}x{size[1]} and "
                    f"{reader.source.name(index)} is {pixels.shape[0]}x{pixels.shape[1]} (height x width); give "
                    "--input-shape C,H,W or a size in the preprocessing file"
                )
            kept.append(index)
        if progress is not None:
            progress(len(kept), wanted)
    if size is None:
        raise UsageError(f"none of the {len(skipped)} images in {path} can be read, for example {skipped[0]}")
    return np.array(kept, np.int64), tuple(skipped), size
