"""What the counted Arm targets need on this machine."""

from __future__ import annotations

import platform
import re
import shutil

from sepdeploy.bench.outside_programs import find_program, run_program
from sepdeploy.core.readiness import Need
from sepdeploy.errors import ToolError

__all__ = ["arm_needs"]

_LIMIT_SECONDS = 20
_LLVM_VERSIONS = (19, 20, 21, 18)  # the first is what results were checked with
_LLVM_PACKAGE = "llvm-19"


def arm_needs() -> tuple[Need, ...]:
    """The emulator with plugins, what builds the plugin and the arm64 root, and the cycle model."""
    system = platform.system()
    if system != "Linux":
        return (
            Need(
                "Linux",
                problem=f"user-mode emulation runs on Linux only, this is {system}",
                fix="sepdeploy bench MODEL --target docker:cortex-a72   # in Docker, on any system",
            ),
        )
    return (_emulator(), *_compiler(), _program("mmdebstrap", "the arm64 root"), _cycle_model())


def _emulator() -> Need:
    """Only dynamically linked builds of QEMU take plugins, Debian's qemu-user-static does not."""
    name = "qemu-aarch64 with plugins"
    path = find_program("qemu-aarch64")
    if path is None:
        return Need(name, problem="qemu-aarch64 is not installed", packages=("qemu-user",))
    try:
        text = run_program([path, "--help"], limit_seconds=_LIMIT_SECONDS, purpose="asking QEMU for its options").output
    except ToolError as error:
        return Need(name, problem=str(error), packages=("qemu-user",))
    if "-plugin" not in text:
        return Need(
            name, problem=f"{path} takes no plugins (a static build)", packages=("qemu-user", "qemu-user-static-")
        )
    version = re.search(r"version (\d\S*)", text)
    return Need(name, found=f"{path}, version {version[1]}" if version else path)


def _compiler() -> tuple[Need, ...]:
    """The counting plugin is built on first use."""
    found = find_program("gcc") or find_program("cc")
    if found is None:
        return (Need("gcc", problem="no C compiler is installed", packages=("gcc", "libc6-dev")),)
    try:
        tried = run_program(
            [found, "-fsyntax-only", "-include", "stdio.h", "-x", "c", "/dev/null"],
            limit_seconds=_LIMIT_SECONDS,
            purpose="trying the C compiler",
        )
    except ToolError as error:
        return (Need("gcc", problem=str(error), packages=("gcc", "libc6-dev")),)
    if tried.code:
        return (Need("gcc", problem=f"{found} finds no C library to compile against", packages=("libc6-dev",)),)
    return (Need("gcc", found=found),)


def _program(name: str, purpose: str) -> Need:
    path = find_program(name)
    if path is None:
        return Need(name, problem=f"{name}, which makes {purpose}, is not installed", packages=(name,))
    return Need(name, found=path)


def _cycle_model() -> Need:
    """Modelled cycles come from llvm-mca; its models of the cores change with LLVM's version."""
    for version in _LLVM_VERSIONS:
        path = shutil.which(f"llvm-mca-{version}")
        if path is not None and shutil.which(f"llvm-mc-{version}") is not None:
            return Need("llvm-mca", found=path)
    return Need("llvm-mca", problem="llvm-mca and llvm-mc are not installed", packages=(_LLVM_PACKAGE,))
