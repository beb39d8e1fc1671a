"""The runtimes on this machine's CPU: their blocks are timed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import FusedBlock, Price
from sepdeploy.errors import SepdeployError
from sepdeploy.planning.target import TargetKind

if TYPE_CHECKING:
    from sepdeploy.bench.session import Session
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.measurement import Latency
    from sepdeploy.core.progress import Progress

__all__ = ["LITERT", "ORT", "LocalTarget"]

_UNIT = "ms"
_METHOD = Method.WALL_CLOCK


@dataclass(frozen=True, slots=True)
class LocalTarget:
    """A runtime on this CPU; see `Target`.

    Attributes:
        name: Key in the registry.
        format: What it runs.
        modules: Python modules that have a hand in its files and in running them, the runtime's first.
        precision: Arithmetic of the blocks.
        threads: Threads of the runtime.
    """

    name: str
    format: Format
    modules: tuple[str, ...]
    precision: Precision
    threads: int

    @property
    def unit(self) -> str:
        """Of its prices."""
        return _UNIT

    @property
    def method(self) -> Method:
        """How its prices come about."""
        return _METHOD

    def key(self) -> dict[str, object]:
        """Everything that prices depend on besides the blocks."""
        from sepdeploy.bench.environment import cpu_name, usable_cores
        from sepdeploy.planning.fused_block import BLOCK_VERSION

        runtime, *others = map(_package_version, (*self.modules, "torch"))
        return {
            "target": self.name,
            "precision": self.precision.value,
            "threads": self.threads,
            "runtime": runtime,
            "made_with": others,
            "cpu": cpu_name(),
            "cores": usable_cores(),
            "block_version": BLOCK_VERSION,
        }

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        """Ways to write a form down that make sense here, each with another result; the first is the default."""
        from sepdeploy.planning.lowering_choices import lowering_choices

        return lowering_choices(form, self.format, self.precision)

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | str]:
        """Prices of blocks beside the layer as it is, from runs interleaved with its own.

        In ONNX Runtime the times hold those of a frame around each block, the same for all (`write_block_files`): it
        is their differences that are to be used.
        """
        from sepdeploy.bench.differences import measure_differences
        from sepdeploy.planning.block_files import write_block_files

        progress.stage(f"writing {len(others)} forms of a layer as {self.format.value}")
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            files = write_block_files((dense, *others), Path(folder), self.format, self.precision)
            reference, *candidates = (self._opened(file, dense, seed) for file in files)
            if isinstance(reference, str):
                return [f"the layer as it is cannot be measured: {reference}"] * len(others)
            sessions = [session for session in candidates if not isinstance(session, str)]
            progress.stage(f"timing {len(sessions)} forms of a layer")
            differences = iter(measure_differences(reference, sessions, seconds=seconds, seed=seed))
        prices: list[Price | str] = []
        for candidate in candidates:
            if isinstance(candidate, str):
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
                    unit=_UNIT,
                    repeats=found.repeats,
                    method=_METHOD,
                )
            )
        return prices

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> list[Latency]:
        """Latency of whole files, from interleaved rounds; see `Target`."""
        from sepdeploy.bench.files import time_files

        return time_files(files, threads=self.threads, seconds=seconds, seed=seed)

    def _opened(self, file: Path | str, block: FusedBlock, seed: int) -> Session | str:
        """A session that has run once; why not, as a sentence."""
        from sepdeploy.bench.session import open_session

        if isinstance(file, str):
            return file
        try:
            is_channels_last = self.format is Format.TFLITE and not block.is_linear
            session = open_session(file, threads=self.threads, is_channels_last=is_channels_last)
            session.set_random_input(seed)
        except SepdeployError as error:
            return str(error)
        return session


def _package_version(module: str) -> str:
    package = module.replace("_", "-")
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # built from source or a nightly: importable under another package name
        return f"{package} of unknown version"


def _kind(name: str, summary: str, file_format: Format, modules: tuple[str, ...], install: str) -> TargetKind:
    make = partial(LocalTarget, name, file_format, modules)
    return TargetKind(name, summary, file_format, _METHOD, _UNIT, modules, install, make)


ORT = _kind(
    "ort",
    "ONNX Runtime on this CPU",
    Format.ONNX,
    ("onnxruntime", "onnx", "onnxscript", "onnxsim"),
    "pip install sepdeploy",
)
LITERT = _kind(
    "litert",
    "LiteRT (TFLite) with XNNPACK on this CPU",
    Format.TFLITE,
    ("ai_edge_litert", "litert_torch", "ai_edge_quantizer"),
    "pip install 'sepdeploy[tflite]'",
)
