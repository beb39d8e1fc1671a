"""The emulator of the arm64 image, and what runs in the image without one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sepdeploy.bench.arm_cores import ArmCore, find_core
from sepdeploy.bench.arm_counts import compare_counts
from sepdeploy.bench.arm_guest import GuestPlace, Launched
from sepdeploy.bench.arm_needs import model_needs
from sepdeploy.bench.arm_numerics import compare_numerics
from sepdeploy.bench.board_files import time_files_on_board
from sepdeploy.bench.board_run import BoardOptions, Model
from sepdeploy.bench.docker_container import DockerBoard, named_container
from sepdeploy.bench.docker_engine import diagnosis, require_docker
from sepdeploy.bench.outside_programs import last_line
from sepdeploy.bench.self_contained import self_contained
from sepdeploy.core.measurement import Counts, Latency, Numerics
from sepdeploy.core.progress import Progress
from sepdeploy.errors import ToolError, UsageError

__all__ = ["compare_in_docker", "core_of_target", "count_in_docker", "docker_place", "time_in_docker"]

_SCHEME = "docker:"
_OUTPUTS = "outputs"
_ENGINE_FAILED = "docker: "
_IMAGE_FAILED = "the image has no "
"""How messages begin, of the client and of the image's entry point."""


def core_of_target(target: str) -> ArmCore | None:
    """The core in 'docker:CORE'; None for 'docker', which is the engine's own processor.

    Raises:
        UsageError: if there is no such core.
    """
    if target == _SCHEME.rstrip(":"):
        return None
    if not target.startswith(_SCHEME):
        raise UsageError(f"'{target}' is no target: give docker:cortex-a72, or docker for the processor of an Arm host")
    return find_core(target.removeprefix(_SCHEME).removesuffix(":ort"))  # each file runs on its own runtime


def docker_place(core: ArmCore, image: str, limit_seconds: float) -> GuestPlace:
    """The emulator in the image.

    Files are copied for it, so that their names and permissions do not matter, and mounted to be read only.

    Args:
        core: What is emulated.
        image: Tag of the image.
        limit_seconds: After how long a container ends by itself, even if nobody is left to end it.
    """

    @contextmanager
    def launch(counts: Path, options: Sequence[str], paths: Sequence[Path]) -> Iterator[Launched]:
        with tempfile.TemporaryDirectory(prefix="sepdeploy-docker-") as folder, named_container(image) as container:
            models, written = Path(folder) / "models", Path(folder) / "counts"
            models.mkdir(mode=0o755)
            for each in (written, written / _OUTPUTS):
                each.mkdir()
                each.chmod(0o777)  # nobody writes there; the folder above is ours alone
            names = []
            for place, path in enumerate(paths):
                copy = models / f"{place}{path.suffix.lower()}"
                shutil.copyfile(self_contained(path, Path(folder)), copy)
                copy.chmod(0o644)
                names.append(f"/models/{copy.name}")
            inside, outputs = _outputs_inside(options)
            command = container.command(
                (core.name, *inside, *names),
                mounts={models: "/models"},
                writable={written: "/counts"},
                environment={"COUNTS": f"/counts/{counts.name}", "LIMIT": f"{limit_seconds:.0f}"},
            )
            yield command, None
            if (written / counts.name).is_file():
                shutil.copyfile(written / counts.name, counts)
            if outputs is not None:
                for path in (written / _OUTPUTS).iterdir():
                    shutil.copyfile(path, outputs / path.name)

    return GuestPlace(f"the qemu-aarch64 of the Docker image {image}", launch, limit_seconds)


def _outputs_inside(options: Sequence[str]) -> tuple[list[str], Path | None]:
    """Options of bench.py as they are in the container, and the folder here that the outputs are to go to."""
    inside = list(options)
    if "--outputs" not in inside:
        return inside, None
    place = inside.index("--outputs") + 1
    outputs = Path(inside[place])
    inside[place] = f"/counts/{_OUTPUTS}"
    return inside, outputs


def compare_in_docker(
    core: ArmCore, paths: Sequence[Path], progress: Progress, *, image: str, limit_seconds: float, seed: int = 0
) -> list[Numerics]:
    """Whether files compute in a container what they compute here; see `compare_numerics`.

    Args:
        core: What is emulated.
        paths: ONNX and TFLite files.
        progress: Told what is going on.
        image: Tag of the image.
        limit_seconds: After how long the container ends by itself.
        seed: Of the inputs.

    Raises:
        ToolError: if the engine or the image is missing or fails, or a file does not run on this machine.
    """
    with _explained(image):
        require_docker(image)
        return compare_numerics(core, paths, progress, seed=seed, place=docker_place(core, image, limit_seconds))


def count_in_docker(
    core: ArmCore, paths: Sequence[Path], progress: Progress, *, image: str, limit_seconds: float, seed: int = 0
) -> list[Counts]:
    """What one inference of each file executes, counted in a container; see `compare_counts`.

    Args:
        core: What is emulated.
        paths: ONNX and TFLite files.
        progress: Told what is going on.
        image: Tag of the image.
        limit_seconds: After how long the container ends by itself.
        seed: Of the random inputs.

    Raises:
        ToolError: if llvm-mca, the engine or the image is missing or fails, or a file cannot be counted.
    """
    missing = [need for need in model_needs() if need.problem]
    if missing:
        packages = " ".join(dict.fromkeys(package for need in missing for package in need.packages))
        problems = ", ".join(need.problem for need in missing)
        raise ToolError(f"the cores are modelled on this machine, and {problems}: run apt-get install {packages}")
    progress.stage(f"looking for the image {image}")
    with _explained(image):
        require_docker(image)
        return compare_counts(core, paths, progress, seed=seed, place=docker_place(core, image, limit_seconds))


@contextmanager
def _explained(image: str) -> Iterator[None]:
    """Let errors of the client and of the image say what to do."""
    try:
        yield
    except ToolError as error:
        if _IMAGE_FAILED in error.stderr:
            raise ToolError(f"{image}: {last_line(error.stderr)}", stderr=error.stderr) from error
        if _ENGINE_FAILED not in error.stderr:
            raise
        problem, fix = diagnosis(error.stderr, image)
        raise ToolError(f"{problem}{f'; run {fix}' if fix else ''}", stderr=error.stderr) from error


def time_in_docker(
    paths: Sequence[Path], *, image: str, threads: int, seconds: float, seed: int, limit_seconds: float
) -> list[Latency]:
    """Latency of each file on the processor of the engine's machine, which must be an Arm processor.

    Raises:
        UsageError: if a file is missing, or the runtime cannot load it.
        ToolError: if the engine or the image is missing or fails, or the container is emulated.
    """
    require_docker(image)
    with named_container(image) as container:
        return time_files_on_board(
            DockerBoard(container),
            [Model(path) for path in paths],
            threads=threads,
            seconds=seconds,
            seed=seed,
            options=BoardOptions(limit_seconds),
        )
