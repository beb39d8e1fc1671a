"""The machine that a number was measured on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from sepdeploy.core.measurement import Environment

__all__ = ["cpu_name", "environment", "usable_cores"]

# Linux on Arm names no model, only the maker (0x41: Arm) and the part number of each core (MIDR_EL1).
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2",
}
_ARM_MAKER = 0x41


def environment(runtime: str, threads: int) -> Environment:
    """Describe this machine.

    Args:
        runtime: Name and version of the runtime, such as 'onnxruntime 1.31.1'.
        threads: Threads that the runtime was told to use.
    """
    return Environment(
        cpu=cpu_name(),
        cores=usable_cores(),
        system=f"{platform.system()} {platform.machine()}",
        runtime=runtime,
        threads=threads,
    )


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Model name of the processor; several kinds of cores are joined by ' + '.

    Args:
        cpuinfo: Linux's description of the processor; elsewhere Python's `platform` is asked.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+?)\s*$", text, flags=re.MULTILINE) or _arm_core_names(text)
    if names:
        return " + ".join(dict.fromkeys(names))
    return platform.processor() or platform.machine() or "unknown"


def _arm_core_names(text: str) -> list[str]:
    makers = re.findall(r"^CPU implementer\s*:\s*(0x[0-9a-fA-F]+)", text, flags=re.MULTILINE)
    parts = re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)", text, flags=re.MULTILINE)
    names = []
    for maker, part in zip(makers, parts, strict=False):
        is_known = int(maker, 16) == _ARM_MAKER and int(part, 16) in _ARM_PARTS
        names.append(_ARM_PARTS[int(part, 16)] if is_known else f"Arm implementer {maker} part {part}")
    return names
