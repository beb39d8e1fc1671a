"""One image file or array to pixels: orientation, colours and size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sepdeploy.data.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "Pixels", "decode"]

Pixels = npt.NDArray[np.uint8]
"""(H, W, C), uint8."""

FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "SGI",
    "TGA",
    "TIFF",
    "WEBP",
)
"""What Pillow may open. Not everything it knows: EPS would start Ghostscript on the file, whatever its name."""


def decode(image: Image.Image, preprocess: Preprocess, size: tuple[int, int] | None) -> Pixels:
    """Turn an opened image into the pixels that `Preprocess.to_input` takes.

    Args:
        image: As Pillow opened it: any mode, with or without an EXIF orientation.
        preprocess: Colour, kind of resize and filter.
        size: (H, W) to resize to; None keeps the image's own.

    Returns:
        (H, W, 3) in red, green, blue, or (H, W, 1).

    Raises:
        Exception: whatever Pillow raises for a damaged file.
    """
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    converted = _convert(upright, "L" if preprocess.color == "L" else "RGB")
    if size is not None:
        converted = _resize(converted, preprocess, size)
    pixels = np.asarray(converted)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _convert(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit values to 255 instead of scaling them, so a 16-bit image would come out white.
        high_byte = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _resize(image: Image.Image, preprocess: Preprocess, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    height, width = size
    resample = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.resize == "stretch":
        return image.resize((width, height), resample)
    cover_height, cover_width = int(height / preprocess.crop_ratio), int(width / preprocess.crop_ratio)
    # The shorter side lands on the covered size exactly and the longer one is cut to whole pixels, as torchvision does.
    if cover_height * image.width >= cover_width * image.height:
        resized = (image.width * cover_height // image.height, cover_height)
    else:
        resized = (cover_width, image.height * cover_width // image.width)
    if resized[0] * resized[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"a strip of {image.width}x{image.height} pixels would grow to {resized[0]}x{resized[1]}")
    image = image.resize(resized, resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
