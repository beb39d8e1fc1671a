"""`sepdeploy bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sepdeploy.cli.parameters import print_tables, shown_progress
from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from sepdeploy.core.measurement import Latency

__all__ = ["command"]

_ON_PATH = click.Path(path_type=Path)
_ABOVE_0 = click.FloatRange(0, min_open=True)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be timed and how."""

    paths: tuple[Path, ...]
    target: str
    threads: int
    seconds: float
    limit_seconds: float
    ssh_config: Path | None
    board_python: str | None
    board_wheels: Path | None
    benchmark_model: Path | None
    image: str


@click.command(short_help="Measure the latency of ONNX and TFLite files, here or on a board.")
@click.argument("artifacts", metavar="ARTIFACT...", type=_ON_PATH, nargs=-1, required=True)
@click.option("--target", metavar="TARGET", help="Where: ssh://USER@HOST[:PORT] for a board, adb[:SERIAL] for an "
              "Android device.  [default: this CPU]")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--seconds", default=2.0, show_default=True, type=_ABOVE_0, help="Measuring time per file.")
@click.option("--time-limit", default=600.0, show_default=True, type=_ABOVE_0, metavar="SECONDS",
              help="How long a board may take in all.")  # fmt: skip
@click.option("--ssh-config", type=_ON_PATH, help="Configuration of ssh in the place of your own.")
@click.option("--board-python", metavar="PATH", help="Python on the board, such as that of a virtual environment "
              "there.  [default: python3]")  # fmt: skip
@click.option("--board-wheels", type=_ON_PATH, metavar="FOLDER",
              help="Wheels to send to a board on which numpy and the runtime are not installed.")  # fmt: skip
@click.option("--benchmark-model", type=_ON_PATH, help="LiteRT's program of that name, built for the Android device.")
@click.option("--image", default="sepdeploy-arm64", show_default=True, metavar="TAG",
              help="Docker image of docker/arm64.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    artifacts: tuple[Path, ...],
    target: str | None,
    threads: int,
    seconds: float,
    time_limit: float,
    ssh_config: Path | None,
    board_python: str | None,
    board_wheels: Path | None,
    benchmark_model: Path | None,
    image: str,
    as_json: bool,
) -> None:
    """Time each ARTIFACT (.onnx or .tflite) on random inputs; several are interleaved, the first is the reference.

    A board needs python3 (3.10 or newer) with numpy and onnxruntime or ai-edge-litert, or --board-wheels; your key
    must be on it, and its host key known. Everything is removed from it at the end.

    \b
    Examples:
      sepdeploy bench demo/original/model.onnx demo/model.onnx
      sepdeploy bench demo/original/model.tflite demo/model.tflite --target ssh://pi@raspberrypi.local
      sepdeploy bench demo/model.int8.tflite --target adb --benchmark-model android_aarch64_benchmark_model
    """
    from sepdeploy.bench.outside_programs import ended_by_signals

    asked = _Asked(
        tuple(dict.fromkeys(artifacts)), target or "", threads, seconds, time_limit, ssh_config, board_python,
        board_wheels, benchmark_model, image,
    )  # fmt: skip
    with shown_progress(is_quiet=as_json) as progress, ended_by_signals():
        place = f" on {target}" if target else ""
        progress.stage(f"timing {len(asked.paths)} files{place}, {threads} threads")
        latencies = _latencies(asked)
    results = {str(path): latency for path, latency in zip(asked.paths, latencies, strict=True)}
    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        click.echo(json.dumps({path: to_data(latency) for path, latency in results.items()}, indent=1))
        return
    from sepdeploy.render.terminal import latency_table

    print_tables(latency_table(results))


def _latencies(asked: _Asked) -> list[Latency]:
    """One latency per file, from where it was asked for."""
    if not asked.target:
        return _timed_here(asked)
    if asked.target.startswith("ssh:"):
        return _timed_on_board(asked)
    if asked.target.partition(":")[0] == "adb":
        return _timed_on_device(asked)
    raise UsageError(f"there is no target '{asked.target}'; choose ssh://USER@HOST, adb or adb:SERIAL, or leave it out")


def _timed_here(asked: _Asked) -> list[Latency]:
    from sepdeploy.bench.session import open_session
    from sepdeploy.bench.timing import measure

    sessions = {str(path): open_session(path, threads=asked.threads) for path in asked.paths}
    reference = str(asked.paths[0]) if len(sessions) > 1 else None
    return list(measure(sessions, reference=reference, threads=asked.threads, seconds=asked.seconds).values())


def _timed_on_board(asked: _Asked) -> list[Latency]:
    from sepdeploy.bench.board_files import time_files_on_board
    from sepdeploy.bench.board_run import BoardOptions, Model
    from sepdeploy.bench.board_ssh import SshAddress, SshBoard

    if asked.ssh_config is not None and not asked.ssh_config.is_file():
        raise UsageError(f"--ssh-config {asked.ssh_config} does not exist or is not a file")
    board = SshBoard(SshAddress.parse(asked.target), asked.ssh_config)
    options = BoardOptions(asked.limit_seconds, asked.board_python, _wheels(asked.board_wheels))
    models = [Model(path) for path in asked.paths]
    return time_files_on_board(board, models, threads=asked.threads, seconds=asked.seconds, seed=0, options=options)


def _wheels(folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    found = tuple(sorted(folder.glob("*.whl")))
    if not found:
        raise UsageError(f"--board-wheels {folder} has no .whl files; sepdeploy doctor ssh://... says how to get them")
    return found


def _timed_on_device(asked: _Asked) -> list[Latency]:
    from sepdeploy.bench.board_adb import AdbDevice, parse_adb, time_files_on_device

    serial = parse_adb(asked.target)
    if asked.benchmark_model is None:
        raise UsageError(
            "--target adb runs LiteRT's benchmark_model, which sepdeploy does not bring: build it for the device or "
            "take a nightly build from LiteRT's documentation, and name it with --benchmark-model PATH"
        )
    device = AdbDevice(serial, asked.benchmark_model, asked.limit_seconds)
    return time_files_on_device(device, asked.paths, threads=asked.threads, seconds=asked.seconds)
