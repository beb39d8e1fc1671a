"""Whether this machine has what Arm cores are emulated with, and whether it works."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from sepdeploy.bench.arm_root import TOOLS
from sepdeploy.bench.outside_programs import find_program, run_program
from sepdeploy.core.readiness import Need
from sepdeploy.errors import ToolError

__all__ = ["arm_needs", "model_needs"]

_LIMIT_SECONDS = 20


def arm_needs() -> tuple[Need, ...]:
    """The emulator with plugins, what builds the plugin and the arm64 root, and the model of the cores."""
    system = platform.system()
    if system != "Linux":
        problem = f"user-mode emulation runs on Linux only, this is {system}"
        fix = "sepdeploy bench MODEL --target docker:cortex-a72   # in Docker; needs llvm-19 here"
        return (Need("Linux", problem=problem, fix=fix),)
    return tuple(map(_need, TOOLS))


def model_needs() -> tuple[Need, ...]:
    """The model of the cores alone: what is emulated in a container is modelled here."""
    return tuple(_need(name) for name in TOOLS if name.startswith("llvm-"))


def _need(name: str) -> Need:
    packages = tuple(TOOLS[name].split())
    path = find_program(name)
    if path is None:
        return Need(name, problem=f"{name} is not installed", packages=packages)
    try:
        return _PROBES[name](path, packages) if name in _PROBES else Need(name, found=path)
    except ToolError as error:
        return Need(name, problem=str(error), packages=packages)


def _emulator(path: str, packages: tuple[str, ...]) -> Need:
    """Only dynamically linked builds of QEMU take plugins, Debian's qemu-user-static does not."""
    name = "qemu-aarch64 with plugins"
    text = run_program([path, "--help"], limit_seconds=_LIMIT_SECONDS, purpose="asking QEMU for its options").output
    if "-plugin" not in text:
        problem = f"{path} takes no plugins (a static build)"
        return Need(name, problem=problem, packages=(*packages, "qemu-user-static-"))
    version = re.search(r"version (\d\S*)", text)
    return Need(name, found=f"{path}, version {version[1]}" if version else path)


def _compiler(path: str, packages: tuple[str, ...]) -> Need:
    command = [path, "-fsyntax-only", "-include", "stdio.h", "-x", "c", "/dev/null"]
    tried = run_program(command, limit_seconds=_LIMIT_SECONDS, purpose="trying the C compiler")
    if tried.code:
        return Need("gcc", problem=f"{path} finds no C library to compile against", packages=packages)
    return Need("gcc", found=path)


_PROBES: Mapping[str, Callable[[str, tuple[str, ...]], Need]] = MappingProxyType(
    {"qemu-aarch64": _emulator, "gcc": _compiler}
)
"""Program -> how to see that it is the right one."""
