"""Boards that ssh reaches: blocks and whole files are sent there and timed, as on this CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sepdeploy.bench.board_files import time_files_on_board
from sepdeploy.bench.board_run import BoardOptions, BoardReply, Model, Work, run_on_board, understood
from sepdeploy.bench.board_ssh import PYTHON_VARIABLE, SshBoard
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Method
from sepdeploy.core.options import target_format, target_title
from sepdeploy.core.selection import Price, Unpriced
from sepdeploy.errors import ToolError
from sepdeploy.planning.file_target import AS_IT_IS, FileTarget, Pricing
from sepdeploy.planning.local_target import LITERT, ORT
from sepdeploy.planning.target import TargetKind

if TYPE_CHECKING:
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.measurement import Latency

__all__ = ["BoardTarget", "board_kind"]

_START_SECONDS = 120.0
_SUFFIXES = {Format.ONNX: ".onnx", Format.TFLITE: ".tflite"}


@dataclass(frozen=True, slots=True)
class BoardTarget(FileTarget):
    """A runtime on a board.

    Attributes:
        board: The board.
        python: Python there; None is python3.
    """

    unit: ClassVar[str] = "ms"
    method: ClassVar[Method] = Method.WALL_CLOCK

    board: SshBoard
    python: str | None

    def place(self) -> dict[str, object]:
        """The board, which is asked once, and its runtime."""
        found = _described(self.board, self.python)
        runtime = found.outcome.get(_SUFFIXES[self.format])
        if runtime is None:
            package = "onnxruntime" if self.format is Format.ONNX else "ai-edge-litert"
            raise ToolError(f"{self.board.name} has no {package}; run there: python3 -m pip install {package}")
        cpu = f"{found.environment['cpu']} at {self.board.name}"
        return {"runtime": runtime, "cpu": cpu, "cores": found.environment["cores"]}

    def prices(self, reference: Path, others: Sequence[Path], how: Pricing) -> list[Price | Unpriced]:
        """Prices from runs that are interleaved with those of the reference, all sent in one go."""
        models = tuple(Model(file, how.is_channels_last) for file in (reference, *others))
        how.progress.stage(f"timing {len(others)} forms of a layer on {self.board.name}")
        work = Work("differences", models, self.threads, how.seconds, how.seed)
        outcome = run_on_board(self.board, work, self._options(how.seconds, len(models))).outcome
        with understood(self.board.name):
            return [_price(found) for _, found in zip(others, outcome, strict=True)]

    def compare(self, files: Sequence[Artifact], *, seconds: float, seed: int) -> list[Latency]:
        """Latency of whole files, from interleaved rounds; see `Target`."""
        models = [Model(Path(file.path), file.is_channels_last) for file in files]
        options = self._options(seconds, len(models))
        return time_files_on_board(
            self.board, models, threads=self.threads, seconds=seconds, seed=seed, options=options
        )

    def _options(self, seconds: float, files: int) -> BoardOptions:
        """Measuring takes about `seconds` a file; slow networks take at least 24 rounds and 10 runs to warm up."""
        return BoardOptions(limit_seconds=_START_SECONDS + 10 * seconds * files + 60 * files, python=self.python)


@cache
def _described(board: SshBoard, python: str | None) -> BoardReply:
    return run_on_board(board, Work("describe"), BoardOptions(limit_seconds=_START_SECONDS, python=python))


def _price(found: dict[str, Any]) -> Price | Unpriced:
    if "reason" in found:
        unpriced = Unpriced(str(found["reason"]), found["is_lasting"] is True)
        return unpriced.within(AS_IT_IS) if found["is_of_reference"] else unpriced
    return Price(
        value=found["median_ms"],
        dense_value=found["reference_ms"],
        difference=found["difference_ms"],
        difference_low=found["low_ms"],
        difference_high=found["high_ms"],
        unit=BoardTarget.unit,
        repeats=found["repeats"],
        method=BoardTarget.method,
    )


def _make(name: str, precision: Precision, threads: int) -> BoardTarget:
    python = os.environ.get(PYTHON_VARIABLE) or None
    return BoardTarget(name, target_format(name), precision, threads, SshBoard.of_target(name), python)


def board_kind(name: str) -> TargetKind:
    """The board with an address as its name.

    >>> board_kind("ssh://pi@board").format.value
    'tflite'
    """
    local = ORT if target_format(name) is Format.ONNX else LITERT
    return TargetKind(
        name, target_title(name), local.format, BoardTarget.method, BoardTarget.unit, local.modules, local.install,
        partial(_make, name), ("ssh",), "apt-get install openssh-client",
    )  # fmt: skip
