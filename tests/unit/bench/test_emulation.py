from __future__ import annotations

import struct
from pathlib import Path

import pytest

from sepdeploy.bench.emulation import emulator

X86, ARM64, ARM32 = 62, 183, 40


def proc(folder: Path, elf_machine: int | None, maps: str = "", cpuinfo: str = "") -> Path:
    own = folder / "thread-self"
    own.mkdir()
    if elf_machine is not None:
        (own / "exe").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, elf_machine))
    (own / "maps").write_text(maps)
    (folder / "cpuinfo").write_text(cpuinfo)
    return folder


@pytest.mark.parametrize(
    ("elf_machine", "maps", "cpuinfo", "machine", "expected"),
    [
        (X86, "", "vendor_id\t: GenuineIntel\n", "x86_64", None),
        (ARM64, "", "CPU part\t: 0xd08\n", "aarch64", None),
        (ARM64, "", "", "arm64", None),
        (ARM32, "", "", "aarch64", None),  # 32-bit programs on a 64-bit kernel
        (ARM64, "", "", "armv7l", None),
        (
            X86,
            "5600-5700 r-xp 0 08:01 12 /usr/bin/qemu-aarch64\n",
            "",
            "aarch64",
            "qemu-aarch64 on x86",
        ),
        (X86, "", "", "aarch64", "an emulator on x86"),
        (ARM64, "7f-80 r-xp 0 0:1 2 /run/rosetta/rosetta\n", "", "x86_64", "rosetta on Arm"),
        (ARM64, "7f-80 r-xp 0 0:1 2 /usr/bin/qemu-aarch64-static\n", "", "aarch64", "qemu-aarch64-static"),
        (None, "", "vendor_id\t: AuthenticAMD\n", "aarch64", "an emulator on x86"),
        (None, "", "", "aarch64", None),
        (ARM64, "7f r--p /home/pi/qemu-notes/libfoo.so\n", "", "aarch64", None),
    ],
)
def test_what_the_kernel_says(
    tmp_path: Path, elf_machine: int | None, maps: str, cpuinfo: str, machine: str, expected: str | None
) -> None:
    assert emulator(proc(tmp_path, elf_machine, maps, cpuinfo), machine) == expected


def test_this_machine_is_none() -> None:
    assert emulator() is None
