"""How an image becomes the input of the network: size, colours, normalisation and layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from sepdeploy.data.toml_files import read_toml
from sepdeploy.errors import UsageError

__all__ = ["Preprocess", "preprocess_from_table", "read_preprocess"]

Resize = Literal["stretch", "crop"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
Color = Literal["RGB", "BGR", "L"]
Layout = Literal["NCHW", "NHWC"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(Resize),
    "interpolation": get_args(Interpolation),
    "color": get_args(Color),
    "layout": get_args(Layout),
}


@dataclass(frozen=True, slots=True)
class Preprocess:
    """The preprocessing that the network was trained with.

    Attributes:
        size: (H, W) that images are resized to, in pixels; None keeps the size that they have.
        resize: 'stretch' ignores the aspect ratio; 'crop' resizes until it is just covered and cuts out the centre.
        crop_ratio: For 'crop': the size divided by this is covered before the cut, in (0, 1]; 0.875 is 256 to 224.
        interpolation: Filter of the resize.
        color: Order of the channels that the network takes; 'L' is one grey channel.
        scale: Pixel values, 0 to 255, are divided by this.
        mean: Subtracted after the division: nothing, one value, or one per channel in the order of `color`.
        std: Divided by after that: nothing, one value, or one per channel.
        layout: What the network takes.

    Raises:
        UsageError: if a value is outside its range.

    Example:
        >>> preprocess = Preprocess(mean=(0.5,), std=(0.5,))
        >>> preprocess.to_input(np.full((1, 2, 2, 3), 255, np.uint8)).shape
        (1, 3, 2, 2)
    """

    size: tuple[int, int] | None = None
    resize: Resize = "stretch"
    crop_ratio: float = 1.0
    interpolation: Interpolation = "bilinear"
    color: Color = "RGB"
    scale: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Layout = "NCHW"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.size is not None and (len(self.size) != 2 or not all(_is_positive_int(side) for side in self.size)):
            raise UsageError(f"size must be two positive whole numbers, height and width, got {self.size!r}")
        if not _is_number(self.scale) or self.scale <= 0:
            raise UsageError(f"scale must be a positive number, got {self.scale!r}")
        if not _is_number(self.crop_ratio) or not 0 < self.crop_ratio <= 1:
            raise UsageError(f"crop_ratio must be above 0 and at most 1, got {self.crop_ratio!r}")
        if self.crop_ratio != 1 and self.resize != "crop":
            raise UsageError(f'crop_ratio = {self.crop_ratio} needs resize = "crop"')
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not all(_is_number(value) for value in values):
                raise UsageError(f"{name} must hold finite numbers, got {values!r}")
            if len(values) not in (0, 1, self.channels):
                raise UsageError(
                    f"{name} has {len(values)} values, but color {self.color} has {self.channels}: "
                    f"give none, one, or {self.channels}"
                )
        if any(value <= 0 for value in self.std):
            raise UsageError(f"std must be positive, got {self.std!r}")

    @property
    def channels(self) -> int:
        """Channels that the network takes: 1 or 3."""
        return 1 if self.color == "L" else 3

    def to_input(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Normalise decoded images into a batch for the network.

        Args:
            images: (N, H, W, C), uint8; C is red, green, blue, or one grey channel where `color` is 'L'.

        Returns:
            (N, C, H, W) or (N, H, W, C) as `layout` says, float32, contiguous.

        Raises:
            UsageError: if the shape does not fit `color`.
        """
        if images.ndim != 4 or images.shape[3] != self.channels:
            raise UsageError(f"color {self.color} needs images (N, H, W, {self.channels}), got {images.shape}")
        if self.color == "BGR":
            images = images[..., ::-1]
        batch = images.astype(np.float32)
        batch /= np.float32(self.scale)
        if self.mean:
            batch -= np.asarray(self.mean, np.float32)
        if self.std:
            batch /= np.asarray(self.std, np.float32)
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2) if self.layout == "NCHW" else batch)


def read_preprocess(path: Path) -> Preprocess:
    """Read a TOML file whose keys, at the top or in a `[preprocess]` table, are the fields of `Preprocess`.

    `calibration/NAME.toml` is found in the installed package where the working directory has no such file.

    Raises:
        UsageError: if the file cannot be read, or has an unknown key or a bad value.
    """
    content = read_toml(path)
    table = content.get("preprocess", content)
    if "preprocess" in content:
        # A calibration manifest serves too; its other tables are about images.
        unknown = sorted(set(content) - {"preprocess", "source", "splits"})
        if unknown:
            raise UsageError(f"{path}: put {', '.join(unknown)} into the [preprocess] table")
    return preprocess_from_table(table, path)


def preprocess_from_table(table: object, path: Path) -> Preprocess:
    """Build a `Preprocess` from a parsed TOML table of the file `path`.

    Raises:
        UsageError: if it is no table, or has an unknown key or a bad value.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"{path}: preprocess must be a table, got {table!r}")
    allowed = [field.name for field in fields(Preprocess)]
    unknown = sorted(set(table) - set(allowed))
    if unknown:
        raise UsageError(f"{path}: unknown key {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in ("size", "mean", "std"):
            if not isinstance(value, list):
                raise UsageError(f"{path}: {name} must be a list such as [0.5, 0.5, 0.5] or [224, 224], got {value!r}")
            values[name] = tuple(value)
        else:
            values[name] = value
    try:
        return Preprocess(**values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
