"""Talks to a Docker engine through its command-line client, and says what to do where that fails."""

from __future__ import annotations

import getpass
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sepdeploy.bench.arm_root import arm64_files, root_packages
from sepdeploy.bench.outside_programs import Finished, find_program, last_line, run_program
from sepdeploy.core.readiness import Need
from sepdeploy.errors import ToolError

__all__ = [
    "DEFAULT_IMAGE",
    "build_command",
    "diagnosis",
    "docker",
    "docker_needs",
    "image_need",
    "require_docker",
]

DEFAULT_IMAGE = "sepdeploy-arm64"
"""Tag of the image that docker/arm64/Dockerfile builds."""

_ANSWER_SECONDS = 30.0


def docker(arguments: Sequence[str], *, purpose: str, limit_seconds: float | None = None) -> Finished:
    """Run one docker command; DOCKER_HOST and contexts are the client's affair.

    Args:
        arguments: What comes after 'docker'.
        purpose: What it does for the user, for messages.
        limit_seconds: How long it may take; None for a question that is answered at once.

    Raises:
        ToolError: if there is no client or it takes too long.
    """
    path = find_program("docker")
    if path is None:
        raise ToolError(f"{purpose}: docker is not installed; sepdeploy doctor docker says how to install it")
    limit = _ANSWER_SECONDS if limit_seconds is None else limit_seconds
    return run_program([path, *arguments], limit_seconds=limit, purpose=purpose)


def docker_needs(image: str = DEFAULT_IMAGE) -> tuple[Need, ...]:
    """The client, an engine that answers, and the image."""
    client = find_program("docker")
    if client is None:
        return (_missing_client(),)
    engine = _engine_need()
    needs = (Need("docker", found=client), engine)
    return (*needs, image_need(image)) if engine.is_met else needs


def require_docker(image: str) -> None:
    """Check that `docker_needs` are met.

    Raises:
        ToolError: with the first problem and what to do.
    """
    for need in docker_needs(image):
        if not need.is_met:
            packages = f"apt-get install {' '.join(need.packages)}" if need.packages else need.fix
            raise ToolError(f"{need.problem}: run {packages}")


def image_need(image: str) -> Need:
    """Whether the engine has the image."""
    name = f"image {image}"
    try:
        found = docker(["image", "inspect", "--format", "{{.Id}}", "--", image], purpose="looking for the image")
    except ToolError as error:
        return Need(name, problem=str(error))
    if found.code == 0:
        return Need(name, found=found.output.strip())
    return Need(name, problem=f"there is no image {image}", fix=build_command(image))


def build_command(image: str) -> str:
    """What builds the image with the runtimes in the versions that are here; its folder comes with sepdeploy."""
    packages = f"PACKAGES={' '.join(root_packages())}"
    return shlex.join(["docker", "build", "-t", image, "--build-arg", packages, str(arm64_files())])


def _engine_need() -> Need:
    """Whether an engine answers."""
    name = "Docker engine"
    try:
        asked = docker(["version", "--format", "{{.Server.Version}} {{.Server.Arch}}"], purpose="asking the engine")
    except ToolError as error:
        return Need(name, problem=str(error), fix=_how_to_start())
    if asked.code == 0 and asked.output.strip():
        return Need(name, found=asked.output.strip())
    problem, fix = diagnosis(asked.errors or asked.output)
    return Need(name, problem=problem, fix=fix)


def diagnosis(message: str, image: str = DEFAULT_IMAGE) -> tuple[str, str]:
    """What is wrong and what to run, from what docker says; it has no codes for it."""
    text = message.lower()
    where = os.environ.get("DOCKER_HOST", "")
    at = f" at {where}" if where else ""
    if "permission denied" in text and ("socket" in text or "docker.sock" in text or "connect" in text):
        return f"you may not use the Docker engine{at}", f"sudo usermod -aG docker {_user()} && newgrp docker"
    if "cannot connect to the docker daemon" in text or "is the docker daemon running" in text:
        return f"no Docker engine is running{at}", _how_to_start()
    if "no such image" in text or "unable to find image" in text or "pull access denied" in text:
        return f"there is no image {image}", build_command(image)
    if "no space left on device" in text:
        return "the disk is full", "docker system prune   # asks before it removes anything"
    if "exec format error" in text:
        return "the image is for another processor", "build it on this machine"
    return f"docker says: {last_line(message)}", ""


def _how_to_start() -> str:
    if sys.platform == "darwin":
        return "open -a Docker"
    has_systemd = Path("/run/systemd/system").is_dir()
    return "sudo systemctl start docker" if has_systemd else "sudo service docker start"


def _missing_client() -> Need:
    problem = "docker is not installed"
    if platform.system() == "Linux":
        return Need("docker", problem=problem, packages=("docker.io",))
    fix = "brew install --cask docker" if sys.platform == "darwin" else "winget install Docker.DockerDesktop"
    return Need("docker", problem=problem, fix=fix)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "$USER"
