"""Tells whether this process runs under an emulator: its clock then says nothing about any processor."""

from __future__ import annotations

import platform
import re
import struct
from pathlib import Path

__all__ = ["emulator"]

# From the ELF specification: e_machine, and what `uname -m` says on such a machine.
_ELF_MACHINES = {
    3: ("i386", "i686", "i586", "i486"),
    40: ("armv5tel", "armv6l", "armv7l", "armv8l", "arm"),
    62: ("x86_64", "amd64"),
    183: ("aarch64", "arm64"),
    243: ("riscv64", "riscv32"),
}
_SAME_KERNEL = ({"i386", "x86_64"}, {"armv7l", "aarch64"})
"""A 64-bit kernel runs 32-bit programs by itself."""

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
        A phrase, such as 'qemu-aarch64 on an x86_64 processor'.
    """
    machine = machine or platform.machine()
    own = proc / "thread-self"
    real = _elf_machine(own / "exe")
    name = _emulator_name(own / "maps")
    if real is not None and not _is_native(real, machine):
        return f"{name or 'an emulator'} on an {real} processor"
    if name is not None:
        return name
    if machine in _ELF_MACHINES[183] and _X86_LINES.search(_text(proc / "cpuinfo")):
        return "an emulator on an x86_64 processor"
    return None


def _elf_machine(path: Path) -> str | None:
    """Processor that a program is for."""
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError:
        return None
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    (number,) = struct.unpack("<H" if header[5] == 1 else ">H", header[18:20])
    names = _ELF_MACHINES.get(number)
    return names[0] if names else None


def _is_native(real: str, machine: str) -> bool:
    names = next(names for names in _ELF_MACHINES.values() if real in names)
    if machine in names:
        return True
    own = next((each[0] for each in _ELF_MACHINES.values() if machine in each), machine)
    return any({real, own} <= pair or (real in pair and machine in pair) for pair in _SAME_KERNEL)


def _emulator_name(maps: Path) -> str | None:
    """Name of a mapped program that is an emulator."""
    found = _EMULATORS.search(_text(maps))
    return found[0][1:] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
