"""Times whole files on a board."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sepdeploy.bench.board_run import Board, BoardOptions, Model, Work, emulated_error, run_on_board, understood
from sepdeploy.core.codec import from_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Latency
from sepdeploy.errors import ToolError

__all__ = ["time_files_on_board"]


def time_files_on_board(
    board: Board, models: Sequence[Model], *, threads: int, seconds: float, seed: int, options: BoardOptions
) -> list[Latency]:
    """Latency of each file, from the same interleaved rounds on the board (`timing.measure`).

    Args:
        board: Where.
        models: At least one; speed-ups are relative to the first.
        threads: Threads of the runtime.
        seconds: Time to spend on each.
        seed: Seed of the random inputs.
        options: How jobs run there.

    Raises:
        UsageError: if a file is missing, or the board's runtime cannot load it.
        ToolError: if the board cannot be reached, lacks something, is emulated, or the job fails there.
    """
    work = Work("latencies", tuple(models), threads, seconds, seed)
    reply = run_on_board(board, work, options)
    if reply.emulator is not None:  # whatever `options` allow
        raise emulated_error(board.name, reply.emulator)
    with understood(board.name):
        replies = zip(models, reply.outcome, reply.sent_sha256, strict=True)
        return [_latency(board, model, data, sent, reply.conditions) for model, data, sent in replies]


def _latency(
    board: Board, model: Model, data: Mapping[str, Any], sent_sha256: str, conditions: tuple[str, ...]
) -> Latency:
    """The latency that the board reports for a file, with where it comes from."""
    latency = from_json(Latency, json.dumps(data), name=f"the reply of {board.name}")
    if latency.artifact_sha256 != sent_sha256:
        raise ToolError(f"{model.path} changed on its way to {board.name}; run it again")
    environment = replace(latency.environment, conditions=(f"on {board.name}", *conditions))
    return replace(latency, environment=environment, artifact_sha256=sha256_of_file(model.path))
