"""What all targets that run files share: what these are made with, and blocks that are priced one layer at a time."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import FusedBlock, Price, Unpriced

if TYPE_CHECKING:
    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.progress import Progress

__all__ = ["AS_IT_IS", "MODULES", "FileTarget", "Pricing", "package_version"]

MODULES = {
    Format.ONNX: ("onnxruntime", "onnx", "onnxscript", "onnxsim"),
    Format.TFLITE: ("ai_edge_litert", "litert_torch", "ai_edge_quantizer"),
}
"""Python modules that have a hand in files of a format and in running them, the runtime's first."""

AS_IT_IS = "the layer as it is cannot be measured"


@dataclass(frozen=True, slots=True)
class Pricing:
    """How files of one layer's forms are run.

    Attributes:
        seconds: Most time to spend on each, where time is what is measured.
        seed: Seed of the random inputs.
        is_channels_last: Whether they take NHWC.
        progress: Told what is going on.
    """

    seconds: float
    seed: int
    is_channels_last: bool
    progress: Progress


@dataclass(frozen=True, slots=True)
class FileTarget(ABC):
    """A runtime at one precision and number of threads; see `Target`.

    Attributes:
        name: Key in the registry and on the command line.
        format: What the runtime reads.
        precision: Arithmetic of the blocks.
        threads: Threads of the runtime.
    """

    unit: ClassVar[str]
    method: ClassVar[Method]

    name: str
    format: Format
    precision: Precision
    threads: int

    def key(self) -> dict[str, object]:
        """Everything that prices depend on besides the blocks."""
        from sepdeploy.planning.fused_block import BLOCK_VERSION

        _, *makers = MODULES[self.format]
        return {
            "target": self.name,
            "precision": self.precision.value,
            "threads": self.threads,
            "made_with": [package_version(module) for module in (*makers, "torch")],
            "block_version": BLOCK_VERSION,
            **self.place(),
        }

    @abstractmethod
    def place(self) -> dict[str, object]:
        """What of `key` is about where the files run: at least 'runtime' (name and version) and 'cpu'."""

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        """Ways to write a form down that make sense here, each with another result; the first is the default."""
        from sepdeploy.planning.lowering_choices import lowering_choices

        return lowering_choices(form, self.format, self.precision)

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | Unpriced]:
        """Prices of blocks beside the layer as it is; see `Target`.

        In ONNX Runtime they hold those of a frame around each block, the same for all (`write_block_files`): it is
        their differences that are to be used.
        """
        from sepdeploy.planning.block_files import write_block_files

        progress.stage(f"writing {len(others)} forms of a layer as {self.format.value}")
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            reference, *files = write_block_files((dense, *others), Path(folder), self.format, self.precision)
            if isinstance(reference, Unpriced):
                return [_without_folder(reference.within(AS_IT_IS), folder)] * len(others)
            written = [file for file in files if isinstance(file, Path)]
            found: Iterable[Price | Unpriced] = ()
            if written:
                is_channels_last = self.format is Format.TFLITE and not dense.is_linear
                found = self.prices(reference, written, Pricing(seconds, seed, is_channels_last, progress))
            prices = iter(found)
            results = [file if isinstance(file, Unpriced) else next(prices) for file in files]
            return [_without_folder(each, folder) for each in results]

    @abstractmethod
    def prices(self, reference: Path, others: Sequence[Path], how: Pricing) -> list[Price | Unpriced]:
        """Prices of files of one layer's forms beside that of the layer as it is.

        Args:
            reference: The layer as it is.
            others: At least one form of it.
            how: How to run them.

        Returns:
            One price for each of `others`, in order, or why it could not be run.
        """


def _without_folder(found: Price | Unpriced, folder: str) -> Price | Unpriced:
    """The same, but files are called by their names: reasons are read long after the folder is gone."""
    return replace(found, reason=found.reason.replace(f"{folder}/", "")) if isinstance(found, Unpriced) else found


def package_version(module: str) -> str:
    """Name and version of the package that a module comes from.

    >>> package_version("no_such_module")
    'no-such-module of unknown version'
    """
    package = module.replace("_", "-")
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # built from source or a nightly: importable under another package name
        return f"{package} of unknown version"
