"""What prices are measured on: the interface of a target, and the registry of all of them.

A new target (an emulated core, a board, an NPU) is one file with a `TargetKind` and one line in `TARGETS_BY_NAME`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from sepdeploy.core.artifact import Artifact, Format, Precision
from sepdeploy.core.measurement import Measured, Method
from sepdeploy.core.options import target_for, target_format
from sepdeploy.errors import ToolError, UsageError

if TYPE_CHECKING:
    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.progress import Progress
    from sepdeploy.core.selection import FusedBlock, Price, Unpriced

__all__ = ["TARGETS_BY_NAME", "Target", "TargetKind", "bench_target", "find_kind", "find_target"]


class Target(Protocol):
    """A runtime on a machine, at one precision and number of threads."""

    @property
    def name(self) -> str:
        """Key in the registry and on the command line."""

    @property
    def format(self) -> Format:
        """What it runs."""

    @property
    def precision(self) -> Precision:
        """Arithmetic of the blocks."""

    @property
    def threads(self) -> int:
        """Threads of the runtime."""

    @property
    def unit(self) -> str:
        """Of its prices: 'ms' or 'kcycles'."""

    @property
    def method(self) -> Method:
        """How its prices come about."""

    def key(self) -> dict[str, object]:
        """Everything that prices depend on besides the blocks, as JSON can hold it.

        At least 'target', 'precision', 'threads', 'runtime' (name and version) and 'cpu'.
        """

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        """Ways to write a form down that make sense here, each with another result; the first is the default."""

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | Unpriced]:
        """Prices of blocks beside the layer as it is.

        Args:
            dense: The layer that is kept.
            others: What it could become: blocks of the same layer, input and activation.
            seconds: Most time to spend on each, where time is what is measured.
            seed: Seed of the random inputs.
            progress: Told what is going on.

        Returns:
            One price for each of `others`, in order, or why it could not be built or run.
        """

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> Sequence[Measured]:
        """What whole files cost, in the same rounds where time is measured.

        Args:
            files: At least one; speed-ups are relative to the first.
            seconds: Time to spend on each, where time is what is measured.
            seed: Seed of the random inputs.
        """


@dataclass(frozen=True, slots=True)
class TargetKind:
    """A target before precision and threads are chosen.

    Attributes:
        name: Key in the registry and on the command line.
        summary: What it is, in one line.
        format: What it runs.
        method: How its prices come about.
        unit: Of its prices: 'ms' or 'kcycles'.
        modules: Python modules that it needs, the runtime's first.
        install: The command that installs them.
        make: From precision and threads to the target.
        programs: Programs that it needs besides.
        install_programs: The command that installs them.
    """

    name: str
    summary: str
    format: Format
    method: Method
    unit: str
    modules: tuple[str, ...]
    install: str
    make: Callable[[Precision, int], Target]
    programs: tuple[str, ...] = ()
    install_programs: str = ""

    @property
    def missing_modules(self) -> tuple[str, ...]:
        """Modules that are not installed; none of them is imported to find out."""
        return tuple(module for module in self.modules if find_spec(module) is None)

    @property
    def missing_programs(self) -> tuple[str, ...]:
        """Programs that are not there."""
        return tuple(program for program in self.programs if shutil.which(program) is None)

    @property
    def missing(self) -> tuple[str, ...]:
        """All that is not there."""
        return (*self.missing_modules, *self.missing_programs)

    @property
    def remedy(self) -> str:
        """The commands that install what is missing."""
        commands = ((self.install, self.missing_modules), (self.install_programs, self.missing_programs))
        return " and ".join(command for command, missing in commands if missing)


def _ort() -> TargetKind:
    from sepdeploy.planning.local_target import ORT

    return ORT


def _litert() -> TargetKind:
    from sepdeploy.planning.local_target import LITERT

    return LITERT


def _arm(name: str) -> TargetKind:
    from sepdeploy.planning.arm_target import ARM_KINDS

    return ARM_KINDS[name]


TARGETS_BY_NAME: Mapping[str, Callable[[], TargetKind]] = MappingProxyType(
    {
        "ort": _ort,
        "litert": _litert,
        "cortex-a53": partial(_arm, "cortex-a53"),
        "cortex-a53:ort": partial(_arm, "cortex-a53:ort"),
        "cortex-a55": partial(_arm, "cortex-a55"),
        "cortex-a55:ort": partial(_arm, "cortex-a55:ort"),
        "cortex-a72": partial(_arm, "cortex-a72"),
        "cortex-a72:ort": partial(_arm, "cortex-a72:ort"),
        "cortex-a76": partial(_arm, "cortex-a76"),
        "cortex-a76:ort": partial(_arm, "cortex-a76:ort"),
    }
)


def find_target(name: str, precision: Precision, threads: int) -> Target:
    """The target called `name`, ready to measure.

    Raises:
        UsageError: if there is none, with a list of all, or `threads` is not positive.
        ToolError: if something that it needs is not installed; the message says how to install it.

    >>> find_target("ort", Precision.INT8, 2).unit
    'ms'
    """
    kind = find_kind(name, threads)
    target = kind.make(precision, threads)
    if kind.missing:
        raise ToolError(f"target {name} needs {', '.join(kind.missing)}: run {kind.remedy}")
    return target


def bench_target(name: str, file_format: Format, threads: int) -> Target:
    """The target on the processor of `name` that runs files of `file_format`, to compare whole files on.

    Raises:
        UsageError: if there is none, or `threads` is not positive.
        ToolError: if a program that it needs is not there; what makes blocks and files may be missing.
    """
    kind = find_kind(target_for(name, file_format), threads)
    target = kind.make(Precision.FLOAT32, threads)
    if kind.missing_programs:
        raise ToolError(f"target {name} needs {', '.join(kind.missing_programs)}: run {kind.install_programs}")
    return target


def find_kind(name: str, threads: int = 1) -> TargetKind:
    """The target called `name` before its precision is chosen: one of `TARGETS_BY_NAME`, or a board by its address.

    Raises:
        UsageError: if there is none, or `threads` is not positive.
    """
    if threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    if name in TARGETS_BY_NAME:
        return TARGETS_BY_NAME[name]()
    target_format(name)  # says what there is
    from sepdeploy.planning.board_target import board_kind

    return board_kind(name)
