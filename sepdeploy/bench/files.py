"""Times whole files on the runtimes of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sepdeploy.bench.session import open_session
from sepdeploy.bench.timing import measure
from sepdeploy.core.artifact import Artifact
from sepdeploy.core.measurement import Latency

__all__ = ["time_files"]


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
