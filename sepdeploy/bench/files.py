"""Whole files: what they are, and how long they take on the runtimes of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepdeploy.bench.session import open_session
from sepdeploy.bench.timing import measure
from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.measurement import Latency
from sepdeploy.errors import UsageError

__all__ = ["describe_file", "time_files"]


def describe_file(path: Path) -> Artifact:
    """The file at `path` as far as its name tells: a '.int8' in it is the precision.

    Raises:
        UsageError: if it is not there, or neither ONNX nor TFLite.
    """
    file_format = format_of(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file")
    precision = Precision.INT8 if ".int8" in path.suffixes else Precision.FLOAT32
    return Artifact.of_file(path, format=file_format, precision=precision, role=Role.CONVERTED)


def format_of(path: Path) -> Format:
    """What the name at `path` ends with.

    Raises:
        UsageError: if that is neither ONNX nor TFLite.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in {each.value for each in Format}:
        raise UsageError(f"{path} is neither an .onnx nor a .tflite file; convert it first with sepdeploy convert")
    return Format(suffix)


def time_files(files: Sequence[Artifact], *, threads: int, seconds: float, seed: int) -> list[Latency]:
    """Latency of each file, from the same interleaved rounds (`measure`).

    Args:
        files: At least one; speed-ups are relative to the first.
        threads: Threads of the runtime.
        seconds: Time to spend on each.
        seed: Seed of the random inputs.

    Raises:
        UsageError: if there is no file, or one cannot be loaded.
        ToolError: if one fails to run.
    """
    sessions = {
        str(place): open_session(Path(file.path), threads=threads, is_channels_last=file.is_channels_last)
        for place, file in enumerate(files)
    }
    reference = "0" if len(files) > 1 else None
    return list(measure(sessions, reference=reference, threads=threads, seconds=seconds, seed=seed).values())
