from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from sepdeploy.bench.environment import cpu_name, environment, usable_cores


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: Some CPU @ 2.0GHz \nflags : x\nmodel name\t: Some CPU @ 2.0GHz\n", "Some CPU @ 2.0GHz"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd08\n", "Cortex-A72"),
        (
            "CPU implementer\t: 0x41\nCPU part\t: 0xd05\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n" * 2,
            "Cortex-A55 + Cortex-A76",
        ),
        ("CPU implementer\t: 0x61\nCPU part\t: 0x022\n", "Arm implementer 0x61 part 0x022"),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path / "cpuinfo") == name


def test_cpu_name_without_cpuinfo(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())


def test_cores_are_those_the_process_may_use() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert usable_cores() == len(allowed)


def test_environment() -> None:
    result = environment("onnxruntime 1.0", 3)
    assert (result.runtime, result.threads) == ("onnxruntime 1.0", 3)
    assert result.system == f"{platform.system()} {platform.machine()}"
    assert result.cpu
