"""Boards that ssh reaches: blocks and whole files are sent there and timed, as on this CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sepdeploy.bench.board_files import time_files_on_board
from sepdeploy.bench.board_run import BoardOptions, BoardReply, Model, Work, run_on_board, understood
from sepdeploy.bench.board_ssh import PYTHON_VARIABLE, SshBoard
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.measurement import Method
from sepdeploy.core.options import target_format, target_title
from sepdeploy.core.selection import FusedBlock, Price
from sepdeploy.errors import ToolError
from sepdeploy.planning.local_target import LITERT, ORT
from sepdeploy.planning.target import Target, TargetKind

if TYPE_CHECKING:
    from sepdeploy.core.artifact import Artifact
    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.measurement import Latency
    from sepdeploy.core.progress import Progress

__all__ = ["BoardTarget", "board_kind"]

_UNIT = "ms"
_METHOD = Method.WALL_CLOCK
_START_SECONDS = 120.0
_SUFFIXES = {Format.ONNX: ".onnx", Format.TFLITE: ".tflite"}


@dataclass(frozen=True, slots=True)
class BoardTarget:
    """A runtime on a board; see `Target`.

    Attributes:
        name: On the command line.
        board: The board.
        python: Python there; None is python3.
        format: What the runtime reads.
        precision: Arithmetic of the blocks.
        threads: Threads of the runtime.
    """

    name: str
    board: SshBoard
    python: str | None
    format: Format
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
        """Everything that prices depend on besides the blocks; the board is asked once."""
        found = _described(self.board, self.python)
        runtime = found.outcome.get(_SUFFIXES[self.format])
        if runtime is None:
            package = "onnxruntime" if self.format is Format.ONNX else "ai-edge-litert"
            raise ToolError(f"{self.board.name} has no {package}; run there: python3 -m pip install {package}")
        return {
            **self._local().key(),
            "target": self.name,
            "runtime": runtime,
            "cpu": f"{found.environment['cpu']} at {self.board.name}",
            "cores": found.environment["cores"],
        }

    def lowerings(self, form: ChainSum) -> tuple[tuple[str, ...], ...]:
        """Ways to write a form down that make sense here, each with another result; the first is the default."""
        return self._local().lowerings(form)

    def measure(
        self, dense: FusedBlock, others: Sequence[FusedBlock], *, seconds: float, seed: int, progress: Progress
    ) -> list[Price | str]:
        """Prices of blocks beside the layer as it is, from runs interleaved with its own, all sent in one go."""
        from sepdeploy.planning.block_files import write_block_files

        progress.stage(f"writing {len(others)} forms of a layer as {self.format.value}")
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            reference, *files = write_block_files((dense, *others), Path(folder), self.format, self.precision)
            if isinstance(reference, str):
                return [f"the layer as it is cannot be measured: {reference}"] * len(others)
            is_channels_last = self.format is Format.TFLITE and not dense.is_linear
            written = [file for file in files if isinstance(file, Path)]
            models = tuple(Model(file, is_channels_last) for file in (reference, *written))
            progress.stage(f"timing {len(written)} forms of a layer on {self.board.name}")
            work = Work("differences", models, self.threads, seconds, seed)
            outcome = run_on_board(self.board, work, self._options(seconds, len(models))).outcome if written else []
        with understood(self.board.name):
            prices = [_price(found) for _, found in zip(written, outcome, strict=True)]
        left = iter(prices)
        return [file if isinstance(file, str) else next(left) for file in files]

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

    def _local(self) -> Target:
        """What makes the files here, and runs the like of them."""
        return (ORT if self.format is Format.ONNX else LITERT).make(self.precision, self.threads)


@cache
def _described(board: SshBoard, python: str | None) -> BoardReply:
    return run_on_board(board, Work("describe"), BoardOptions(limit_seconds=_START_SECONDS, python=python))


def _price(found: dict[str, Any] | str) -> Price | str:
    if isinstance(found, str):
        return found
    return Price(
        value=found["median_ms"],
        dense_value=found["reference_ms"],
        difference=found["difference_ms"],
        difference_low=found["low_ms"],
        difference_high=found["high_ms"],
        unit=_UNIT,
        repeats=found["repeats"],
        method=_METHOD,
    )


def _make(name: str, precision: Precision, threads: int) -> BoardTarget:
    python = os.environ.get(PYTHON_VARIABLE) or None
    return BoardTarget(name, SshBoard.of_target(name), python, target_format(name), precision, threads)


def board_kind(name: str) -> TargetKind:
    """The board with an address as its name.

    >>> board_kind("ssh://pi@board").format.value
    'tflite'
    """
    local = ORT if target_format(name) is Format.ONNX else LITERT
    return TargetKind(
        name, target_title(name), target_format(name), _METHOD, _UNIT, local.modules, local.install,
        partial(_make, name), ("ssh",), "apt-get install openssh-client",
    )  # fmt: skip
