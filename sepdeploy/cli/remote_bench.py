"""Targets of `sepdeploy bench` that are somewhere else, and the options that they take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from sepdeploy.bench.arm_cores import ArmCore
    from sepdeploy.core.measurement import Measured, Numerics
    from sepdeploy.core.progress import Progress

__all__ = ["REMOTE_TARGETS", "RemoteOptions", "check_remotely", "is_remote", "measure_remotely", "remote_options"]

REMOTE_TARGETS = (
    "a board (ssh://USER@HOST[:PORT]), an Android device (adb[:SERIAL]), the Arm host of a Docker engine (docker)"
)
"""What `--target` can be, for its help."""

_T = TypeVar("_T", bound=Callable[..., Any])
_ON_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """How things are measured somewhere else.

    Attributes:
        time_limit: Seconds that it may take there in all.
        ssh_config: Configuration of ssh in the place of the user's.
        board_python: Python on the board.
        board_wheels: Folder of wheels to send.
        benchmark_model: LiteRT's program for Android.
        image: Tag of the Docker image.
    """

    time_limit: float
    ssh_config: Path | None
    board_python: str | None
    board_wheels: Path | None
    benchmark_model: Path | None
    image: str


_OPTIONS = (
    click.option("--time-limit", default=600.0, show_default=True, type=click.FloatRange(0, min_open=True),
                 metavar="SECONDS", help="How long a board, a device or a container may take in all."),
    click.option("--ssh-config", type=_ON_PATH, envvar="SEPDEPLOY_SSH_CONFIG", show_envvar=True,
                 help="Configuration of ssh in the place of your own."),
    click.option("--board-python", metavar="PATH", envvar="SEPDEPLOY_BOARD_PYTHON", show_envvar=True,
                 help="Python on the board, such as that of a virtual environment "
                 "there; default: python3."),
    click.option("--board-wheels", type=_ON_PATH, metavar="FOLDER",
                 help="Wheels to send to a board on which numpy and the runtime are not installed."),
    click.option("--benchmark-model", type=_ON_PATH, help="LiteRT's program of that name, for the Android device."),
    click.option("--image", default="sepdeploy-arm64", show_default=True, metavar="TAG",
                 help="Docker image built from docker/arm64."),
)  # fmt: skip


def remote_options(command: _T) -> _T:
    """Give a command the options of remote targets; it takes `remote`."""

    @functools.wraps(command)
    def collecting(**arguments: Any) -> Any:
        remote = RemoteOptions(**{name: arguments.pop(name) for name in RemoteOptions.__slots__})
        return command(remote=remote, **arguments)

    decorated: Any = collecting
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def is_remote(target: str) -> bool:
    """Whether `target` is of a kind that this module measures on."""
    return target.partition(":")[0] in _MEASURES


def measure_remotely(
    target: str, paths: Sequence[Path], threads: int, seconds: float, options: RemoteOptions, progress: Progress
) -> Sequence[Measured]:
    """One result per file, in order; the first is what the others are compared with.

    Raises:
        UsageError: if the target, an option or a file is none.
        ToolError: if something is missing or fails there.
    """
    progress.stage(f"{target}: {len(paths)} files")
    return _MEASURES[target.partition(":")[0]](target, paths, threads, seconds, options, progress)


def _on_board(
    target: str, paths: Sequence[Path], threads: int, seconds: float, options: RemoteOptions, _progress: Progress
) -> Sequence[Measured]:
    from sepdeploy.bench.board_files import time_files_on_board
    from sepdeploy.bench.board_run import BoardOptions, Model
    from sepdeploy.bench.board_ssh import SshBoard
    from sepdeploy.core.ssh_address import SshAddress

    if options.ssh_config is not None and not options.ssh_config.is_file():
        raise UsageError(f"--ssh-config {options.ssh_config} does not exist or is not a file")
    board = SshBoard(SshAddress.parse(target.removesuffix(":ort")), options.ssh_config)
    how = BoardOptions(options.time_limit, options.board_python, _wheels(options.board_wheels))
    models = [Model(path) for path in paths]
    return time_files_on_board(board, models, threads=threads, seconds=seconds, seed=0, options=how)


def _wheels(folder: Path | None) -> tuple[Path, ...]:
    if folder is None:
        return ()
    found = tuple(sorted(folder.glob("*.whl")))
    if not found:
        raise UsageError(f"--board-wheels {folder} has no .whl files; sepdeploy doctor ssh://... says how to get them")
    return found


def _on_device(
    target: str, paths: Sequence[Path], threads: int, seconds: float, options: RemoteOptions, _progress: Progress
) -> Sequence[Measured]:
    from sepdeploy.bench.board_adb import AdbDevice, parse_adb, time_files_on_device

    serial = parse_adb(target)
    if options.benchmark_model is None:
        raise UsageError(
            "--target adb runs LiteRT's benchmark_model, which sepdeploy does not bring: build it for the device or "
            "take a nightly build from LiteRT's documentation, and name it with --benchmark-model PATH"
        )
    device = AdbDevice(serial, options.benchmark_model, options.time_limit)
    return time_files_on_device(device, paths, threads=threads, seconds=seconds)


def _in_docker(
    target: str, paths: Sequence[Path], threads: int, seconds: float, options: RemoteOptions, progress: Progress
) -> Sequence[Measured]:
    from sepdeploy.bench.docker_guest import count_in_docker, time_in_docker

    core = _core_in_docker(target, paths, threads)
    limit = options.time_limit
    if core is None:
        return time_in_docker(paths, image=options.image, threads=threads, seconds=seconds, seed=0, limit_seconds=limit)
    return count_in_docker(core, paths, progress, image=options.image, limit_seconds=limit)


def _core_in_docker(target: str, paths: Sequence[Path], threads: int) -> ArmCore | None:
    """The core that a container emulates; None for one that runs on the engine's own processor, or no container."""
    from sepdeploy.bench.docker_guest import core_of_target
    from sepdeploy.bench.files import describe_file

    core = core_of_target(target)
    for path in paths:
        describe_file(path)  # says what is wrong with one
    if core is not None and threads != 1:
        raise UsageError(f"{target} models one core: --threads must be 1, got {threads}")
    return core


def check_remotely(
    target: str, paths: Sequence[Path], threads: int, options: RemoteOptions, progress: Progress
) -> list[Numerics]:
    """How far outputs on a core that is emulated in a container are from those here; empty for other targets.

    Raises:
        UsageError: if the target or a file is none.
        ToolError: if something is missing or fails there, or a file computes something else.
    """
    if not target.startswith("docker:"):
        return []
    from sepdeploy.bench.arm_numerics import require_same
    from sepdeploy.bench.docker_guest import compare_in_docker

    core = _core_in_docker(target, paths, threads)
    if core is None:
        return []
    found = compare_in_docker(core, paths, progress, image=options.image, limit_seconds=options.time_limit)
    require_same(paths, found)
    return found


_Measure = Callable[[str, Sequence[Path], int, float, RemoteOptions, "Progress"], "Sequence[Measured]"]
_MEASURES: Mapping[str, _Measure] = MappingProxyType({"ssh": _on_board, "adb": _on_device, "docker": _in_docker})
"""What a target begins with, up to a colon -> what measures there."""
