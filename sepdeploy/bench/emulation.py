"""Tells whether this process runs under an emulator: its clock then says nothing about any processor."""

from __future__ import annotations

import platform
import re
import struct
from pathlib import Path

__all__ = ["emulator"]

# Architecture -> e_machine of its programs in the ELF specification, and what `uname -m` says there. Kernels of 64 bits
# run programs of 32 bits by themselves.
_ARCHITECTURES = {
    "x86": ((3, 62), re.compile(r"i[3-6]86|x86_64|amd64")),
    "Arm": ((40, 183), re.compile(r"arm.*|aarch64.*")),
    "RISC-V": ((243,), re.compile(r"riscv.*")),
}

_EMULATORS = re.compile(r"/[^/\n]*(qemu|rosetta|box64|fex)[^/\n]*$", re.MULTILINE | re.IGNORECASE)
_X86_LINES = re.compile(r"^vendor_id\s*:\s*(GenuineIntel|AuthenticAMD)", re.MULTILINE)


def emulator(proc: Path = Path("/proc"), machine: str | None = None) -> str | None:
    """What this process is emulated by; None where nothing says that it is.

    A user-mode emulator shows its guest what it expects in /proc/self, but not in /proc/thread-self, which is the same
    process: there the kernel names the program that it really runs. That program is for another processor, or called
    after an emulator. Where /proc/thread-self cannot be read, /proc/cpuinfo may still be of another processor.

    Args:
        proc: Where the kernel describes processes.
        machine: What the process takes its processor for; None asks `platform`.

    Returns:
        A phrase, such as 'qemu-aarch64 on x86'.
    """
    machine = (machine or platform.machine()).lower()
    own = proc / "thread-self"
    name = _emulator_name(own / "maps")
    real = _architecture_of(own / "exe")
    if real is None and _X86_LINES.search(_text(proc / "cpuinfo")):
        real = "x86"
    if real is not None and not _ARCHITECTURES[real][1].fullmatch(machine):
        return f"{name or 'an emulator'} on {real}"
    return name


def _architecture_of(path: Path) -> str | None:
    """Architecture that a program is for; None if it cannot be read or is for one that is not known here."""
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError:
        return None
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    (number,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])
    return next((name for name, (numbers, _) in _ARCHITECTURES.items() if number in numbers), None)


def _emulator_name(maps: Path) -> str | None:
    """Name of a mapped program that is an emulator."""
    found = _EMULATORS.search(_text(maps))
    return found[0][1:] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
