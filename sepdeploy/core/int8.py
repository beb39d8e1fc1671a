"""How networks are quantized to int8, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sepdeploy.errors import UsageError

__all__ = [
    "CALIBRATION_METHODS",
    "INT8_RULES",
    "PLAIN",
    "Affine",
    "CalibrationMethod",
    "Int8Options",
    "Int8Step",
    "IoType",
    "PlaceRange",
    "RangeMethod",
]

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]
"""How the range of an activation follows from its values; see `quantize/ranges.py`."""

CalibrationMethod = Literal["auto", "minmax", "percentile", "mse", "entropy"]
"""The same, or whichever gives the highest SQNR on held-out images."""

CALIBRATION_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

IoType = Literal["auto", "float32", "int8", "uint8"]
"""What int8 files take and return; auto is int8 in TFLite and float32 in ONNX."""


@dataclass(frozen=True, slots=True)
class Int8Options:
    """How networks are quantized to int8.

    Attributes:
        calibration_method: How ranges of activations are found.
        io: Type of the files' input and outputs.
        equalizes: Whether channels may be rescaled before, which changes nothing in float.
        corrects_bias: Whether biases may take back the mean error that rounding the weights makes.
        rounds_adaptively: Whether weights may be rounded so that outputs, not weights, come nearest.

    Raises:
        UsageError: if there is no such method or type.
    """

    calibration_method: CalibrationMethod = "auto"
    io: IoType = "auto"
    equalizes: bool = True
    corrects_bias: bool = True
    rounds_adaptively: bool = False

    def __post_init__(self) -> None:
        for value, choices in ((self.calibration_method, CalibrationMethod), (self.io, IoType)):
            if value not in get_args(choices):
                raise UsageError(f"'{value}' is not one of {', '.join(get_args(choices))}")


INT8_RULES = 3
"""Of what has a range, and of what is rounded: results by earlier rules are not taken over."""

PLAIN = Int8Options("minmax", equalizes=False, corrects_bias=False)
"""The quickest way, for files whose weights do not matter."""


@dataclass(frozen=True, slots=True)
class Affine:
    """How real numbers become 8-bit ones: value = scale * (code - zero_point), code in 0 to 255.

    Signed codes are the same minus 128.

    Attributes:
        scale: Above 0, a float32 number.
        zero_point: The code of 0.0, in 0 to 255.
    """

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """The smallest value that has a code."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest value that has a code."""
        return (255 - self.zero_point) * self.scale


@dataclass(frozen=True, slots=True)
class PlaceRange:
    """How one activation of a network is quantized, and how to find it again in a file.

    Attributes:
        name: Its node in the network's graph.
        affine: Scale and zero point.
        fingerprints: What identifies its values on each of the first calibration images, whatever their layout
            (`quantize/file_ranges.py`).
    """

    name: str
    affine: Affine
    fingerprints: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Int8Step:
    """One step of the preparation for int8, decided on held-out images.

    Attributes:
        name: 'calibration', 'equalisation', 'bias correction' or 'adaptive rounding'.
        sqnr_before_db: SQNR of the simulated int8 network without it, against the float one.
        sqnr_after_db: With it.
        images: Held-out images.
        is_kept: Whether it was kept.
        detail: What it did, for the user.
    """

    name: str
    sqnr_before_db: float
    sqnr_after_db: float
    images: int
    is_kept: bool
    detail: str = ""
