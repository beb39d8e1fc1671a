"""Emulated Arm cores: what blocks execute is counted, and a model of the core makes cycles of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sepdeploy.bench.arm_cores import ARM_CORES, ArmCore, find_core
from sepdeploy.bench.arm_root import INSTALL_TOOLS, TOOLS, find_root, require_tools, root_packages, tool_versions
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Counts, Method
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import FusedBlock, Price
from sepdeploy.errors import UsageError
from sepdeploy.planning.local_target import LITERT, ORT
from sepdeploy.planning.target import TargetKind

if TYPE_CHECKING:
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.progress import Progress

__all__ = ["ARM_KINDS", "ArmTarget"]

_UNIT = "kcycles"
_METHOD = Method.EMULATED_COUNT


@dataclass(frozen=True, slots=True)
class ArmTarget:
    """A runtime on an emulated Arm core; see `Target`.

    Attributes:
        name: Key in the registry.
        core: The core.
        format: What the runtime reads.
        precision: Arithmetic of the blocks.
        threads: Threads of the runtime: 1.
    """

    name: str
    core: ArmCore
    format: Format
    precision: Precision
    threads: int

    def __post_init__(self) -> None:
        if self.threads != 1:
            raise UsageError(f"{self.name} models one core: --threads must be 1, got {self.threads}")

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
        from sepdeploy.planning.fused_block import BLOCK_VERSION

        require_tools()
        local = _LOCAL_KINDS[self.format]
        return {
            "target": self.name,
            "precision": self.precision.value,
            "threads": self.threads,
            "runtime": root_packages()[list(_LOCAL_KINDS).index(self.format)].replace("==", " "),
            "cpu": f"{self.core.title}, emulated",
            "core": asdict(self.core),
            "tools": tool_versions(),
            "root": find_root(Silent()).name,
            "made_with": local.make(self.precision, 1).key()["made_with"],
            "block_version": BLOCK_VERSION,
        }

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        """Ways to write a form down that make sense here, each with another result; the first is the default."""
        from sepdeploy.planning.lowering_choices import lowering_choices

        return lowering_choices(form, self.format, self.precision)

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | str]:
        """Prices of blocks beside the layer as it is, all counted in one emulated process; no time is measured.

        The ends of a difference are those of the model (`Counts`), not of an interval.
        """
        from sepdeploy.bench.arm_counts import count_files
        from sepdeploy.planning.block_files import write_block_files

        del seconds
        progress.stage(f"writing {len(others)} forms of a layer as {self.format.value}")
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            files = write_block_files((dense, *others), Path(folder), self.format, self.precision)
            written = [file for file in files if isinstance(file, Path)]
            progress.stage(f"counting {len(written)} forms of a layer on the {self.core.title}")
            # Every run does the same, so two of them tell; blocks are many.
            found = iter(count_files(self.core, written, progress, seed=seed, repeats=2, warmup=1) if written else ())
            reference, *candidates = (next(found) if isinstance(file, Path) else file for file in files)
        if isinstance(reference, str):
            return [f"the layer as it is cannot be counted: {reference}"] * len(others)
        return [each if isinstance(each, str) else _price(reference, each) for each in candidates]

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> list[Counts]:
        """Counts of whole files; of any format that the core can run."""
        from sepdeploy.bench.arm_counts import compare_counts

        del seconds
        return compare_counts(self.core, [Path(file.path) for file in files], Silent(), seed=seed)


def _price(dense: Counts, counts: Counts) -> Price:
    ends = sorted((counts.kcycles_low - dense.kcycles_low, counts.kcycles_high - dense.kcycles_high))
    return Price(
        value=counts.cost,
        dense_value=dense.cost,
        difference=counts.cost - dense.cost,
        difference_low=ends[0],
        difference_high=ends[1],
        unit=_UNIT,
        repeats=counts.repeats,
        method=_METHOD,
    )


_LOCAL_KINDS = {Format.ONNX: ORT, Format.TFLITE: LITERT}
"""In the order of `root_packages`: what makes their files, and runs them here."""


def _make(name: str, core: str, file_format: Format, precision: Precision, threads: int) -> ArmTarget:
    return ArmTarget(name, find_core(core), file_format, precision, threads)


def _kind(name: str, core: ArmCore, file_format: Format) -> TargetKind:
    local = _LOCAL_KINDS[file_format]
    runtime = "LiteRT" if file_format is Format.TFLITE else "ONNX Runtime"
    return TargetKind(
        name,
        f"{runtime} on one {core.title} ({core.board}), emulated",
        file_format,
        _METHOD,
        _UNIT,
        local.modules,
        local.install,
        partial(_make, name, core.name, file_format),
        tuple(TOOLS),
        INSTALL_TOOLS,
    )


ARM_KINDS = {
    name: _kind(name, core, file_format)
    for core in ARM_CORES.values()
    for name, file_format in ((core.name, Format.TFLITE), (f"{core.name}:ort", Format.ONNX))
}
"""Name -> kind; a core by its name alone runs LiteRT, which is what phones and boards mostly do."""
