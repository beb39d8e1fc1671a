"""Emulated Arm cores: what blocks execute is counted, and a model of the core makes cycles of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sepdeploy.bench.arm_cores import ARM_CORES, ArmCore, find_core
from sepdeploy.bench.arm_root import INSTALL_TOOLS, TOOLS, find_root, require_tools, root_packages, tool_versions
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Counts, Method
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import Price, Unpriced
from sepdeploy.errors import UsageError
from sepdeploy.planning.file_target import AS_IT_IS, FileTarget, Pricing
from sepdeploy.planning.local_target import LITERT, ORT
from sepdeploy.planning.target import TargetKind

if TYPE_CHECKING:
    from sepdeploy.core.artifact import Artifact

__all__ = ["ARM_KINDS", "ArmTarget"]


@dataclass(frozen=True, slots=True)
class ArmTarget(FileTarget):
    """A runtime on an emulated Arm core, on one thread.

    Attributes:
        core: The core.
    """

    unit: ClassVar[str] = "kcycles"
    method: ClassVar[Method] = Method.EMULATED_COUNT

    core: ArmCore

    def __post_init__(self) -> None:
        if self.threads != 1:
            raise UsageError(f"{self.name} models one core: --threads must be 1, got {self.threads}")

    def place(self) -> dict[str, object]:
        """The core, and all that emulates and models it."""
        require_tools()
        return {
            "runtime": root_packages()[list(_LOCAL_KINDS).index(self.format)].replace("==", " "),
            "cpu": f"{self.core.title}, emulated",
            "core": asdict(self.core),
            "tools": tool_versions(),
            "root": find_root(Silent()).name,
        }

    def prices(self, reference: Path, others: Sequence[Path], how: Pricing) -> list[Price | Unpriced]:
        """Prices of files that are all counted in one emulated process; no time is measured.

        The ends of a difference are those of the model (`Counts`), not of an interval.
        """
        from sepdeploy.bench.arm_counts import count_files, is_refused

        paths = [reference, *others]
        how.progress.stage(f"counting {len(paths)} forms of a layer on the {self.core.title}")
        # Every run does the same, so two of them tell; blocks are many.
        dense, *found = count_files(self.core, paths, how.progress, seed=how.seed, repeats=2, warmup=1)
        if isinstance(dense, str):
            return [Unpriced(dense, is_refused(dense)).within(AS_IT_IS)] * len(others)
        return [Unpriced(e, is_refused(e)) if isinstance(e, str) else _price(dense, e) for e in found]

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
        unit=ArmTarget.unit,
        repeats=counts.repeats,
        method=ArmTarget.method,
    )


_LOCAL_KINDS = {Format.ONNX: ORT, Format.TFLITE: LITERT}
"""In the order of `root_packages`: what makes their files, and runs them here."""


def _make(name: str, core: str, file_format: Format, precision: Precision, threads: int) -> ArmTarget:
    return ArmTarget(name, file_format, precision, threads, find_core(core))


def _kind(name: str, core: ArmCore, file_format: Format) -> TargetKind:
    local = _LOCAL_KINDS[file_format]
    runtime = "LiteRT" if file_format is Format.TFLITE else "ONNX Runtime"
    return TargetKind(
        name,
        f"{runtime} on one {core.title} ({core.board}), emulated",
        file_format,
        ArmTarget.method,
        ArmTarget.unit,
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
