"""A deployable file and what identifies it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sepdeploy.core.files import sha256_of_file

__all__ = ["Artifact", "Format", "Precision", "Role"]


class Format(Enum):
    """File formats of deployable networks; the value is the name on the command line."""

    ONNX = "onnx"
    TFLITE = "tflite"


class Precision(Enum):
    """Numbers that the convolutions in the file are made of; the value is the name on the command line."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class Role(Enum):
    """Which network the file holds."""

    ORIGINAL = "original"
    CONVERTED = "converted"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A deployable file.

    Attributes:
        path: Where it lies; relative to the bundle once it is part of one.
        format: ONNX or TFLite.
        precision: float32, float16 or int8.
        role: The original network or the converted one.
        is_channels_last: Whether 4-D inputs and outputs were turned from NCHW to NHWC on export.
        size_bytes: Size of the file.
        sha256: Hash of its bytes, in hexadecimal.
    """

    path: str
    format: Format
    precision: Precision
    role: Role
    is_channels_last: bool
    size_bytes: int
    sha256: str

    @classmethod
    def of_file(
        cls, path: Path, *, format: Format, precision: Precision, role: Role, is_channels_last: bool = False
    ) -> Artifact:
        """Describe the file at `path`, reading its size and hash from disk."""
        return cls(
            path=str(path),
            format=format,
            precision=precision,
            role=role,
            is_channels_last=is_channels_last,
            size_bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
        )
