"""The runtimes on this machine's CPU: their blocks are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sepdeploy.core.artifact import Format
from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import Price, Unpriced
from sepdeploy.errors import SepdeployError
from sepdeploy.planning.file_target import AS_IT_IS, MODULES, FileTarget, Pricing, package_version
from sepdeploy.planning.target import TargetKind

if TYPE_CHECKING:
    from sepdeploy.bench.session import Session
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.measurement import Latency

__all__ = ["LITERT", "ORT", "LocalTarget"]


@dataclass(frozen=True, slots=True)
class LocalTarget(FileTarget):
    """A runtime on this CPU."""

    unit: ClassVar[str] = "ms"
    method: ClassVar[Method] = Method.WALL_CLOCK

    def place(self) -> dict[str, object]:
        """This machine and its runtime."""
        from sepdeploy.bench.environment import cpu_name, usable_cores

        runtime, *_ = MODULES[self.format]
        return {"runtime": package_version(runtime), "cpu": cpu_name(), "cores": usable_cores()}

    def prices(self, reference: Path, others: Sequence[Path], how: Pricing) -> list[Price | Unpriced]:
        """Prices from runs that are interleaved with those of the reference."""
        from sepdeploy.bench.differences import measure_differences

        dense, *candidates = (self._opened(path, how) for path in (reference, *others))
        if isinstance(dense, Unpriced):
            return [dense.within(AS_IT_IS)] * len(others)
        sessions = [session for session in candidates if not isinstance(session, Unpriced)]
        how.progress.stage(f"timing {len(sessions)} forms of a layer")
        differences = iter(measure_differences(dense, sessions, seconds=how.seconds, seed=how.seed))
        prices: list[Price | Unpriced] = []
        for candidate in candidates:
            if isinstance(candidate, Unpriced):
                prices.append(candidate)
                continue
            found = next(differences)
            prices.append(
                Price(
                    value=found.median_ms,
                    dense_value=found.reference_ms,
                    difference=found.difference_ms,
                    difference_low=found.low_ms,
                    difference_high=found.high_ms,
                    unit=self.unit,
                    repeats=found.repeats,
                    method=self.method,
                )
            )
        return prices

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> list[Latency]:
        """Latency of whole files, from interleaved rounds; see `Target`."""
        from sepdeploy.bench.files import time_files

        return time_files(files, threads=self.threads, seconds=seconds, seed=seed)

    def _opened(self, path: Path, how: Pricing) -> Session | Unpriced:
        """A session that has run once, or why it does not."""
        from sepdeploy.bench.session import open_session

        try:
            session = open_session(path, threads=self.threads, is_channels_last=how.is_channels_last)
            session.set_random_input(how.seed)
        except SepdeployError as error:
            return Unpriced.of(error)
        return session


def _kind(name: str, summary: str, file_format: Format, modules: tuple[str, ...], install: str) -> TargetKind:
    make = partial(LocalTarget, name, file_format)
    return TargetKind(name, summary, file_format, LocalTarget.method, LocalTarget.unit, modules, install, make)


ORT = _kind("ort", "ONNX Runtime on this CPU", Format.ONNX, MODULES[Format.ONNX], "pip install sepdeploy")
LITERT = _kind(
    "litert",
    "LiteRT (TFLite) with XNNPACK on this CPU",
    Format.TFLITE,
    MODULES[Format.TFLITE],
    "pip install 'sepdeploy[tflite]'",
)
