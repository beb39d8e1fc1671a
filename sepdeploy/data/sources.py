"""Where images come from: folders and npz files."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from sepdeploy.data.decode import FORMATS
from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ArraySource", "FolderSource", "ImageSource", "check_arrays", "open_source"]

Labels = npt.NDArray[np.int64]


class ImageSource(Protocol):
    """Images in a fixed order, with a label for each or for none."""

    @property
    def labels(self) -> Labels | None:
        """(N,), int64."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label, or nothing."""

    @property
    def is_grayscale(self) -> bool:
        """Whether the images are known to have a single channel."""

    def __len__(self) -> int:
        """Images, readable or not."""

    def name(self, index: int) -> str:
        """What the user calls the image at `index`."""

    def open(self, index: int) -> Image.Image:
        """Open the image at `index`; the caller closes it."""


@dataclass(frozen=True, slots=True)
class FolderSource:
    """Image files below a folder.

    Attributes:
        root: The folder.
        files: The files, in an order that depends on their names only.
        labels: (N,), int64: index of the class folder; None for loose files.
        class_names: Sorted names of the class folders.
    """

    root: Path
    files: tuple[Path, ...]
    labels: Labels | None
    class_names: tuple[str, ...]

    @property
    def is_grayscale(self) -> bool:
        """Unknown before decoding, so False."""
        return False

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Path below the root; bytes that are not UTF-8 are shown as a replacement character."""
        return os.fsencode(self.files[index].relative_to(self.root)).decode(errors="replace")

    def open(self, index: int) -> Image.Image:
        """Open the file at `index`, whose content decides its format."""
        from PIL import Image

        return Image.open(self.files[index], formats=FORMATS)


@dataclass(frozen=True, slots=True)
class ArraySource:
    """Images in memory.

    Attributes:
        images: (N, H, W, C), uint8, C = 1 or 3.
        labels: (N,), int64, or None.
    """

    images: npt.NDArray[np.uint8]
    labels: Labels | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Arrays have no names for their classes."""
        return ()

    @property
    def is_grayscale(self) -> bool:
        """Whether C is 1."""
        return bool(self.images.shape[3] == 1)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The position."""
        return f"image {index}"

    def open(self, index: int) -> Image.Image:
        """The image at `index`."""
        from PIL import Image

        pixels = self.images[index]
        return Image.fromarray(pixels[..., 0] if self.is_grayscale else pixels)


def open_source(path: Path) -> ImageSource:
    """Open a folder or an `.npz` file.

    Raises:
        UsageError: if there is no such path, it is something else, or it holds no images.
    """
    try:
        if path.is_dir():
            return _scan_folder(path)
        if not path.exists():
            raise UsageError(f"{path} does not exist; give a folder of images, an .npz file or a manifest .toml")
    except OSError as error:
        raise UsageError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    raise UsageError(f"{path} is not a folder of images, an .npz file or a manifest .toml")


def check_arrays(images: Any, labels: Any, name: str) -> ArraySource:
    """Validate arrays that came from outside.

    Args:
        images: Should be (N, H, W, C) or (N, H, W), uint8, C = 1 or 3.
        labels: Should be (N,), integers of at least 0, or None.
        name: Where they came from, for the message.

    Raises:
        UsageError: if they are anything else.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise UsageError(f"{name}: images must be a uint8 array of pixels from 0 to 255, got {kind}")
    shape = images.shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        hint = "; it looks like (N, C, H, W): transpose it" if len(shape) == 4 and shape[1] in (1, 3) else ""
        raise UsageError(f"{name}: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {shape}{hint}")
    if len(images) == 0:
        raise UsageError(f"{name} holds no images")
    if labels is None:
        return ArraySource(images, None)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        found = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise UsageError(f"{name}: labels must be one whole number per image, ({len(images)},), got {found}")
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise UsageError(f"{name}: labels must be at least 0, got {labels.min()}")
    return ArraySource(images, labels)


def _read_npz(path: Path) -> ArraySource:
    try:
        # np.load would leave a damaged file open if it opened it itself.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array (.npy)")
            if "images" not in archive.files:
                raise UsageError(f"{path} has no array 'images'; it has {', '.join(archive.files) or 'nothing'}")
            images = archive["images"]
            labels = archive["labels"] if "labels" in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UsageError(f"{path} is not a readable .npz file of plain arrays: {error}") from error
    except MemoryError:
        # From nothing, for this says better what to do than what is said of any other lack of memory.
        raise UsageError(f"{path} does not fit into memory; give its images as a folder of files") from None
    return check_arrays(images, labels, str(path))


def _scan_folder(root: Path) -> FolderSource:
    suffixes = _image_suffixes()
    entries = sorted(entry for entry in root.iterdir() if not _is_hidden(entry))
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if entry.suffix.lower() in suffixes and entry.is_file()]
    by_class = [sorted(_files_below(folder, suffixes, {root.resolve()})) for folder in folders]
    nested = [file for files in by_class for file in files]
    if loose and nested:
        raise UsageError(
            f"{root} mixes loose images ({loose[0].name}) with class folders ({nested[0].relative_to(root).parts[0]}); "
            "move the loose images into folders of their class, or all images into one folder"
        )
    files = tuple(loose or nested)
    if not files:
        raise UsageError(f"{root} holds no images; known suffixes are {', '.join(sorted(suffixes))}")
    if loose or len(folders) < 2:
        # One folder tells nothing apart: labels that are all 0 would only make the accuracy look measured.
        return FolderSource(root, files, None, ())
    # Empty folders count too: an index must mean the same class in every subset of a data set.
    labels = np.repeat(np.arange(len(folders)), [len(files) for files in by_class])
    names = tuple(os.fsencode(folder.name).decode(errors="replace") for folder in folders)
    return FolderSource(root, files, labels.astype(np.int64), names)


def _files_below(folder: Path, suffixes: frozenset[str], above: set[Path]) -> Iterator[Path]:
    """Image files at any depth; links are followed, but never back into a folder `above`."""
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if _is_hidden(entry):
            continue
        if entry.is_dir():
            yield from _files_below(entry, suffixes, above | {real})
        elif entry.suffix.lower() in suffixes and entry.is_file():
            yield entry


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
