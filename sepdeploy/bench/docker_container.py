"""Containers of the arm64 image: no network, nobody's rights, little that can be written to, and none left behind."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sepdeploy.bench.board_run import PYTHON_PROGRAM
from sepdeploy.bench.docker_engine import DEFAULT_IMAGE, diagnosis, docker
from sepdeploy.bench.outside_programs import find_program
from sepdeploy.errors import ToolError

__all__ = ["NOBODY", "Container", "DockerBoard", "named_container"]

NOBODY = 65534
"""User and group in the container; the image's own."""

_PROGRAMS = "/arm64/programs"
_REMOVE_SECONDS = 60.0
_CONFINED = (
    "--rm",
    "--pull=never",
    "--init",
    "--network=none",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--pids-limit=256",
    f"--user={NOBODY}:{NOBODY}",
    "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
)


@dataclass(frozen=True, slots=True)
class Container:
    """A container that is to be run.

    Attributes:
        name: Its own, to remove it by.
        image: Tag of the image.
    """

    name: str
    image: str = DEFAULT_IMAGE

    def command(
        self,
        arguments: tuple[str, ...],
        *,
        mounts: Mapping[Path, str] | None = None,
        writable: Mapping[Path, str] | None = None,
        environment: Mapping[str, str] | None = None,
        entry: str | None = None,
        is_interactive: bool = False,
    ) -> list[str]:
        """Program and arguments that run it.

        Args:
            arguments: Of the entry point.
            mounts: Folders that it may read -> where they are in it.
            writable: Folders that it may write to -> where they are in it.
            environment: What it finds in its environment.
            entry: A program in the place of the image's entry point.
            is_interactive: Whether it reads our standard input.

        Raises:
            ToolError: if docker is not installed.
        """
        client = find_program("docker")
        if client is None:
            raise ToolError("docker is not installed; sepdeploy doctor docker says how to install it")
        words = [client, "run", *_CONFINED, f"--name={self.name}"]
        words += ["--interactive"] if is_interactive else []
        words += [f"--mount={_mount(path, place, 'readonly')}" for path, place in (mounts or {}).items()]
        words += [f"--mount={_mount(path, place)}" for path, place in (writable or {}).items()]
        words += [f"--env={name}={value}" for name, value in (environment or {}).items()]
        words += [f"--entrypoint={entry}"] if entry else []
        return [*words, "--", self.image, *arguments]


@contextmanager
def named_container(image: str) -> Iterator[Container]:
    """A container that is gone after the block, whatever happened in it."""
    container = Container(f"sepdeploy-{os.getpid()}-{secrets.token_hex(6)}", image)
    try:
        yield container
    finally:
        with suppress(ToolError):  # an engine that does not answer: what went wrong before is what matters
            docker(["rm", "--force", "--volumes", container.name], purpose="cleaning up", limit_seconds=_REMOVE_SECONDS)


def _mount(path: Path, place: str, *options: str) -> str:
    """A value of --mount, which docker reads as a line of CSV: any path may stand in it."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={path}", f"target={place}", *options])
    return line.getvalue()


@dataclass(frozen=True, slots=True)
class DockerBoard:
    """The image's Python as it is: on an Arm host it runs on the processor; see `Board`.

    Attributes:
        container: What to run it in.
    """

    container: Container

    @property
    def name(self) -> str:
        """As on the command line."""
        return "docker"

    def command(self) -> list[str]:
        """The docker client with its arguments."""
        return self.container.command(("-c", PYTHON_PROGRAM), entry=f"{_PROGRAMS}/python.sh", is_interactive=True)

    def explain(self, code: int, errors: str) -> ToolError:
        """What went wrong, from what docker or the shell in the container says."""
        if "exec format error" in errors.lower():
            return ToolError(
                "docker: the engine's machine is no Arm machine and does not run Arm programs; use an Arm host, or "
                "--target docker:cortex-a72 for counted instructions",
                stderr=errors,
            )
        problem, fix = diagnosis(errors, self.container.image)
        return ToolError(f"docker: {problem} (exit code {code}){f'; run {fix}' if fix else ''}", stderr=errors)
